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
    add_sampling_flags,
    cluster_options,
    sampling_params,
)
from cluster.llm import LLM, Prompt
from models.errors import PromptError


def add_command(commands: Any) -> None:
    """Add ``generate`` to the command line."""
    parser = commands.add_parser("generate", help="answer prompts")
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="a text; may be repeated")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument(
        "--prompt-token-ids", action="append", default=[], metavar="1,2,3", help="instead of text"
    )
    add_sampling_flags(parser)
    add_output_flags(parser)
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer the prompts of the command line in their order; return the exit status."""
    params, prompts = sampling_params(options), _prompts(options)
    with LLM(options.model, **cluster_options(options)) as llm:
        for prompt in prompts:
            for output in llm.generate([prompt], params, use_tqdm=sys.stderr.isatty()):
                print_output(output, as_json=options.json, log_steps=options.log_steps)
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


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    prompts: list[Prompt] = [*options.prompt]
    prompts += [_read(path) for path in options.prompt_file]
    prompts += [{"prompt_token_ids": _ids(text)} for text in options.prompt_token_ids]
    if not prompts:
        raise PromptError("no prompt: give --prompt, --prompt-file or --prompt-token-ids")
    return prompts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompt file {path}: {error}") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(f"--prompt-token-ids must be integers, got {text!r}") from None
