"""The second turn of a conversation: what keeping the first one's KV is worth."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.contestants import Converses, NewTokens, Ours, closing_all
from cluster.bench.runs import Pair, entry, interleave, paired_ratios
from cluster.bench.yardsticks import Transformers
from models.config import read_model_config

KEPT, ANEW = "N=2, kept", "N=2, anew"
ONE, THEIRS = "N=1, 2 threads, kept", "transformers, kept"  # two threads as well
PAIRS: list[Pair] = [(ANEW, KEPT), (ONE, KEPT), (THEIRS, KEPT), (THEIRS, ONE)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument(
        "--lengths", default="4096,32768", help="of the first turn with its answer (4096,32768)"
    )
    parser.add_argument("--new-tokens", type=int, default=256, help="of the second turn (256)")
    parser.add_argument("--repeats", type=int, default=3, help="second turns behind each (3)")


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return each contestant's runs and the ratios of their times."""
    max_tokens = max(options.lengths) + options.new_tokens + 1
    start = functools.partial(Ours, checkpoint=checkpoint, max_tokens=max_tokens, profile=profile)
    people: list[Converses] = [
        start(KEPT, ranks=2, threads=1, keeps=True),
        start(ANEW, ranks=2, threads=1),
        start(ONE, ranks=1, threads=2, keeps=True),
        Transformers(THEIRS, checkpoint, 2),
    ]
    with closing_all(people):
        tokens = NewTokens(read_model_config(checkpoint).vocab_size)
        runs = [
            each
            for length in options.lengths
            for each in second_turns(people, tokens, length, options.new_tokens, options.repeats)
        ]
    return {
        "new_tokens": options.new_tokens,
        "runs": runs,
        "ratios": paired_ratios(runs, PAIRS),
    }


def second_turns(
    people: Sequence[Converses], tokens: NewTokens, length: int, new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Return an entry for everybody: ``repeats`` other second turns behind one first turn."""
    first_turn = tokens.context(length)
    for person in people:
        person.begin(first_turn)
    actions = {person.name: person.turn for person in people}
    interleave(actions, [tokens(new_tokens)])  # warm up
    measured = interleave(actions, (tokens(new_tokens) for _ in range(repeats)))
    print(f"{new_tokens} tokens after {length}: {repeats} rounds", file=sys.stderr)
    return [entry(name, done, tokens=length) for name, done in measured.items()]
