"""``ringspan generate``: answer prompts from the command line."""

import argparse
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
from cluster.llm import LLM
from cluster.trace import check_output, finish_trace


def add_command(commands: Any) -> None:
    """Add ``generate`` to the command line."""
    parser = commands.add_parser("generate", help="answer prompts")
    add_prompt_flags(parser)
    add_sampling_flags(parser)
    group = add_output_flags(parser)
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="record what every rank does when; see trace"
    )
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer the prompts of the command line in their order; return the exit status."""
    params, asked = sampling_params(options), prompts(options)
    if options.trace:
        check_output(options.trace)
    with LLM(options.model, **cluster_options(options)) as llm:
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
