"""``ringspan generate``: answer prompts from the command line, or a file of them into a file."""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from actors.messages import RequestOutput
from cluster.arguments import (
    add_cluster_flags,
    add_output_flags,
    add_prompt_flags,
    add_sampling_flags,
    cluster_options,
    prompts,
    sampling_params,
)
from cluster.batch import Batch, BatchRun
from cluster.client_flags import add_client_flags, make_client, refuse_client_flags
from cluster.llm import LLM
from cluster.trace import check_output, finish_trace
from configs import ConfigError
from models.errors import PromptError

BATCH_SUFFIX = ".jsonl"
TARGET_IN_FLIGHT = 128  # lines of a batch that a server, which others use too, is asked at a time


def add_command(commands: Any) -> None:
    """Add ``generate`` to the command line."""
    parser = commands.add_parser("generate", help="answer prompts")
    add_prompt_flags(parser, nargs="?")
    add_sampling_flags(parser)
    group = add_output_flags(parser)
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="record what every rank does when; see trace"
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"of a --prompt-file that ends in {BATCH_SUFFIX}, with one JSON object a line: the"
        " answers; the same command goes on where an earlier run of it ended",
    )
    add_client_flags(parser, target=None, text="ask a running server by gRPC, instead of MODEL")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer the prompts of the command line; return the exit status."""
    _check(options)
    if any(path.suffix == BATCH_SUFFIX for path in options.prompt_file):
        return _run_batch(options)
    if options.output is not None:
        raise PromptError(f"--output needs a --prompt-file that ends in {BATCH_SUFFIX}")
    params, asked = sampling_params(options), prompts(options)
    if options.trace:
        check_output(options.trace)
    with _answerer(options) as llm:
        if options.trace:
            llm.start_trace()
        for output in llm.generate(asked, params, use_tqdm=sys.stderr.isatty()):
            print_output(output, as_json=options.json, log_steps=options.log_steps)
        if options.trace:
            print(finish_trace(llm, options.trace).text(), file=sys.stderr)
    return 0


def print_output(output: RequestOutput, *, as_json: bool, log_steps: bool) -> None:
    """Print one answer on stdout, and its steps on stderr where they are asked for."""
    if log_steps:
        for record in output.steps:
            print(record.line(), file=sys.stderr)
    if as_json:
        print(json.dumps(dataclasses.asdict(output)))
        return
    for completion in output.outputs:
        print(completion.text or " ".join(map(str, completion.token_ids)))


def _run_batch(options: argparse.Namespace) -> int:
    """Answer the lines of a file; return 1 where one has failed."""
    given = [*options.prompt, *options.prompt_file, *options.prompt_token_ids]
    if len(given) != 1:
        raise PromptError(f"a --prompt-file that ends in {BATCH_SUFFIX} must be the only prompt")
    if options.output is None:
        raise PromptError(f"a --prompt-file that ends in {BATCH_SUFFIX} needs --output FILE")
    for flag in ("trace", "json", "log_steps"):
        if getattr(options, flag):
            name = flag.replace("_", "-")
            raise PromptError(f"--{name} is not for a --prompt-file that ends in {BATCH_SUFFIX}")
    batch = Batch(
        lines=options.prompt_file[0],
        output=options.output,
        defaults=sampling_params(options),
        cache_salt=options.cache_salt,
    )
    with BatchRun(batch) as run:
        if options.model is not None:
            run.check_model(_name(options.model))
        if not run.is_done:
            with _answerer(options) as llm:
                model = _name(options.model or llm.status()["model"])
                most = TARGET_IN_FLIGHT if options.target else 2 * llm.config.max_num_seqs
                run.answer(llm, model=model, in_flight=most)
        tally = run.tally
    print(f"ringspan: {tally.line()}", file=sys.stderr)
    if tally.failed:
        print(
            f'ringspan: {tally.failed} of {tally.total} lines failed: see "error" in'
            f" {options.output}, and run this again to try them again",
            file=sys.stderr,
        )
    return 1 if tally.failed else 0


def _name(model: str | Path) -> str:
    return Path(model).expanduser().resolve().name


def _check(options: argparse.Namespace) -> None:
    """Refuse flags of a cluster of our own beside a server that runs, and the other way round."""
    if options.target is None:
        if options.model is None:
            raise ConfigError("give MODEL, the directory of a checkpoint, or --target HOST:PORT")
        refuse_client_flags(options)
        return
    own = {key: value for key, value in cluster_options(options).items() if value}
    wrong = "MODEL" if options.model is not None else next(iter(own), None)
    if wrong is not None:
        raise ConfigError(f"leave {wrong} out: the server at {options.target} has its own")
    if options.trace:
        raise ConfigError("--trace is for a cluster of this command's own")


def _answerer(options: argparse.Namespace) -> "contextlib.AbstractContextManager[Any]":
    """Return a cluster of our own, or the handle of a server that runs."""
    if options.target is None:
        return LLM(options.model, **cluster_options(options))
    return make_client(options)
