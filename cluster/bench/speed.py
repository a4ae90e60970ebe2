"""Prefill and decode: ours, against the ideal and against transformers.

Two ranks take the ring with pass-KV at any length: what ``auto`` makes of a short
prompt, which it leaves whole on one rank, says nothing of the ring.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.contestants import NewTokens, Ours, closing_all
from cluster.bench.runs import Measured, Pair, entry, interleave, paired_ratios
from cluster.bench.yardsticks import Ideal, Transformers
from models.config import read_model_config

PAIRS: list[Pair] = [
    ("N=1, 2 threads", "N=2"),
    ("transformers, 2 threads", "N=2"),
    ("transformers, 2 threads", "N=1, 2 threads"),
]
PREFILL_PAIRS: list[Pair] = [("N=1", "N=2"), ("N=2", "ideal N=2"), ("N=1", "ideal N=2")]


def add_flags(parser: argparse.ArgumentParser, lengths: str) -> None:
    """Add what is measured."""
    parser.add_argument("--lengths", default=lengths, help=f"of the context ({lengths})")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run (32)")


def measure_prefill(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return each contestant's runs and the ratios of their times."""
    max_tokens = max(options.lengths) + 1
    start = functools.partial(Ours, checkpoint=checkpoint, max_tokens=max_tokens, profile=profile)
    people: list[Ours | Transformers | Ideal] = [
        start("N=2", ranks=2, threads=1, algorithm="pass_kv"),
        start("N=1, 2 threads", ranks=1, threads=2),
        Transformers("transformers, 2 threads", checkpoint, 2),
        start("N=1", ranks=1, threads=1),
        Ideal("ideal N=2", checkpoint, 2, max_tokens),
    ]
    with closing_all(people):
        runs = _measure(options, checkpoint, {each.name: each.prefill for each in people})
    return {"runs": runs, "ratios": paired_ratios(runs, PAIRS + PREFILL_PAIRS)}


def measure_decode(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return each contestant's runs and the ratios of their times."""
    max_tokens = max(options.lengths) + options.steps + 1
    start = functools.partial(Ours, checkpoint=checkpoint, max_tokens=max_tokens, profile=profile)
    people: list[Ours | Transformers] = [
        start("N=2", ranks=2, threads=1, algorithm="pass_kv"),
        start("N=1, 2 threads", ranks=1, threads=2),
        Transformers("transformers, 2 threads", checkpoint, 2),
    ]
    with closing_all(people):
        actions = {
            each.name: functools.partial(each.decode, steps=options.steps) for each in people
        }
        runs = _measure(options, checkpoint, actions)
    return {"runs": runs, "ratios": paired_ratios(runs, PAIRS)}


def _measure(
    options: argparse.Namespace,
    checkpoint: Path,
    actions: Mapping[str, Callable[[Sequence[int]], Measured]],
) -> list[dict[str, Any]]:
    """Return one entry for each length and contestant, with every run."""
    tokens = NewTokens(read_model_config(checkpoint).vocab_size)
    entries: list[dict[str, Any]] = []
    for length in options.lengths:
        prompt = tokens.context(length)
        if length == options.lengths[0]:
            interleave(actions, [prompt])  # warm up
        measured = interleave(actions, [prompt] * options.repeats)
        print(f"{length} tokens: {options.repeats} rounds", file=sys.stderr)
        entries += [entry(name, done, tokens=length) for name, done in measured.items()]
    return entries
