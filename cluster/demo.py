"""``ringspan demo`` and ``ringspan needle``: a model that needs no download, and a right answer."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.arguments import add_cluster_flags, add_output_flags, cluster_options
from cluster.generate import print_output
from cluster.llm import LLM
from models.errors import PromptError
from models.needle_checkpoint import write_needle_checkpoint
from models.needle_text import make_demo, question
from models.sampling import SamplingParams

DEPTHS = (0.02, 0.5, 0.97)  # of the sentences that are asked for
MIN_TOKENS, MAX_TOKENS = 512, 2**20 - 64


def add_demo_command(commands: Any) -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser(
        "demo", help="find planted sentences in a long text that is sharded over the ring"
    )
    parser.add_argument("--context-tokens", type=int, default=16384, help="of the text (16384)")
    parser.add_argument("--seed", type=int, default=0, help="another text for another seed")
    add_output_flags(parser)
    add_cluster_flags(parser)
    parser.set_defaults(run=run_demo)


def add_needle_command(commands: Any) -> None:
    """Add ``needle`` to the command line."""
    parser = commands.add_parser("needle", help="write the demo's checkpoint")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.set_defaults(run=run_needle)


def run_needle(options: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    write_needle_checkpoint(options.directory, options.dtype)
    print(f"wrote the needle checkpoint to {options.directory}")
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """Ask for sentences at several depths; return 0 only if every answer is right."""
    if not MIN_TOKENS <= options.context_tokens <= MAX_TOKENS:
        raise PromptError(
            f"--context-tokens must be {MIN_TOKENS} to {MAX_TOKENS}, got {options.context_tokens}"
        )
    demo = make_demo(options.context_tokens, options.seed, DEPTHS)
    say = _silence if options.json else print
    with tempfile.TemporaryDirectory(prefix="ringspan-needle-") as directory:
        write_needle_checkpoint(Path(directory) / "needle")
        say("starting a Ray cluster and loading the needle model on every rank ...")
        with LLM(Path(directory) / "needle", **cluster_options(options)) as llm:
            say(f"{options.context_tokens} tokens over {llm.info.num_ranks} ranks")
            right = [_ask(llm, options, demo.prompt_text, *asked, say) for asked in demo.questions]
    say(f"{sum(right)} of {len(right)} answers are right")
    return 0 if all(right) else 1


def _ask(
    llm: LLM, options: argparse.Namespace, text: str, key: str, expected: str, say: Any
) -> bool:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    output = llm.generate(text + question(key), params, use_tqdm=sys.stderr.isatty())[0]
    if options.json or options.log_steps:
        print_output(output, as_json=options.json, log_steps=options.log_steps)
    completion, ttft_s = output.outputs[0], output.metrics.ttft_s
    right = completion.text == expected and completion.finish_reason == "stop"
    say(f"{question(key).strip()}{completion.text}")
    say(
        f"  {'right' if right else f'WRONG, expected{expected}'}; first token after {ttft_s:.1f} s:"
        f" {len(output.prompt_token_ids) - output.num_cached_tokens} tokens computed,"
        f" {output.num_cached_tokens} reused"
    )
    return right


def _silence(*words: object) -> None:
    """Say nothing: with --json, stdout is for programs."""
