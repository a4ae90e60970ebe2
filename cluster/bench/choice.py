"""Pass-KV, pass-Q and what ``auto`` makes of their prices, over the miss rate.

The miss rate is T / (T + P), of T new and P cached tokens; T + P stays the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.choice_report import Row, row, summary, table
from cluster.bench.contestants import Converses, NewTokens, Ours, closing_all
from cluster.bench.runs import interleave
from models.config import read_model_config

__all__ = ["add_flags", "measure", "table"]

MISS = "1,2.5,5,10,20,40,60,80,100"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument("--tokens", type=int, default=16384, help="new and cached ones (16384)")
    parser.add_argument("--miss", default=MISS, help=f"per cent of them that are new ({MISS})")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return a row for each miss rate, and what the rows come to."""
    people = [
        Ours(
            rule,
            checkpoint,
            ranks=2,
            threads=1,
            max_tokens=options.tokens + 1,
            profile=profile,
            keeps=True,
            algorithm=rule,
        )
        for rule in ("pass_kv", "pass_q", "auto")
    ]
    with closing_all(people):
        tokens = NewTokens(read_model_config(checkpoint).vocab_size)
        rows = [
            measure_row(people, tokens, new_tokens, options.tokens, options.repeats)
            for new_tokens in new_token_counts(options.tokens, options.miss)
        ]
    return {"tokens": options.tokens, "rows": rows, **summary(rows)}


def new_token_counts(tokens: int, miss_percents: Sequence[float]) -> list[int]:
    """Return T for each miss rate, 1 at least, each once."""
    counts = [max(1, round(tokens * percent / 100)) for percent in miss_percents]
    return list(dict.fromkeys(counts))


def measure_row(
    people: Sequence[Converses], tokens: NewTokens, new_tokens: int, all_tokens: int, repeats: int
) -> Row:
    """Return what everybody takes for T new tokens behind cached ones."""
    cached_tokens = all_tokens - new_tokens
    context = tokens.context(cached_tokens)
    for person in people:
        person.begin(context)
    actions = {person.name: person.turn for person in people}
    interleave(actions, [tokens(new_tokens)])  # warm up
    measured = interleave(actions, (tokens(new_tokens) for _ in range(repeats)))
    print(f"{new_tokens} tokens after {cached_tokens}: {repeats} rounds", file=sys.stderr)
    return row(new_tokens, cached_tokens, measured)
