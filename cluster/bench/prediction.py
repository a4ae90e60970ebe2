"""How far predicted seconds are from measured ones, over new and cached tokens."""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench.choice_report import relative_errors
from cluster.bench.contestants import NewTokens, Ours, closing_all
from cluster.bench.runs import Measured, heading, interleave
from models.config import read_model_config

NEW, CACHED = "16,64,256,1024,4096", "0,1024,8192,32768"
ANSWER_TOKENS = 33  # of each turn: the prefill's, and two bursts of decode
PHASES = ("prefill", "decode")
# What predictions are compared with.
CLOCKS = {"wall": "wall_s", "ranks": "slowest_rank_s"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument("--new", default=NEW, help=f"tokens of a turn ({NEW})")
    parser.add_argument("--cached", default=CACHED, help=f"tokens before it ({CACHED})")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return every step with its prediction, and the errors of each phase."""
    max_tokens = max(options.cached) + max(options.new) + ANSWER_TOKENS
    start = functools.partial(
        Ours, checkpoint=checkpoint, max_tokens=max_tokens, profile=profile, keeps=True
    )
    people = [start("N=2", ranks=2, threads=1), start("N=1, 2 threads", ranks=1, threads=2)]
    with closing_all(people):
        tokens = NewTokens(read_model_config(checkpoint).vocab_size)
        steps = [
            step
            for cached_tokens in options.cached
            for step in _turns(people, tokens, cached_tokens, options.new, options.repeats)
        ]
    return {"steps": steps, "errors": errors(steps)}


def _turns(
    people: Sequence[Ours],
    tokens: NewTokens,
    cached_tokens: int,
    new_token_counts: Sequence[int],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    context = tokens.context(cached_tokens)
    for person in people:
        person.begin(context)
    actions = {
        person.name: functools.partial(person.turn, answer_tokens=ANSWER_TOKENS)
        for person in people
    }
    interleave(actions, [tokens(new_token_counts[0])])  # warm up
    for new_tokens in new_token_counts:
        measured = interleave(actions, (tokens(new_tokens) for _ in range(repeats)))
        print(f"{new_tokens} tokens after {cached_tokens}: {repeats} rounds", file=sys.stderr)
        for name, done in measured.items():
            for run in done:
                yield from step_rows(name, new_tokens, cached_tokens, run)


def step_rows(
    name: str, new_tokens: int, cached_tokens: int, run: Measured
) -> list[dict[str, Any]]:
    """Return a row for each step of a run; the tokens are those of its prefill."""
    return [
        {
            "name": name,
            "new_tokens": new_tokens,
            "cached_tokens": cached_tokens,
            "phase": step.phase,
            "algorithm": step.algorithm,
            "step_tokens": step.new_tokens,
            "predicted_s": step.predicted_s,
            "prices_s": step.prices_s,
            "wall_s": step.wall_s,
            "slowest_rank_s": max(step.ranks_wall_s),
        }
        for step in run.steps
    ]


def errors(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return median and 90th percentile of ``|predicted / measured - 1|`` by phase and ring."""
    found = []
    for name in dict.fromkeys(step["name"] for step in steps):
        for phase in PHASES:
            of = [step for step in steps if (step["name"], step["phase"]) == (name, phase)]
            if of:
                by_clock = {clock: _spread(of, key) for clock, key in CLOCKS.items()}
                found.append({"name": name, "phase": phase, "steps": len(of), **by_clock})
    return found


def _spread(steps: Sequence[dict[str, Any]], measured: str) -> dict[str, float]:
    of = relative_errors([s["predicted_s"] for s in steps], [s[measured] for s in steps])
    median, p90 = np.percentile(of, [50, 90])
    return {"median": float(median), "p90": float(p90)}


def table(report: dict[str, Any]) -> str:
    """Return a report as text: errors first, then medians of each shape."""
    lines = [heading(report), "", "|predicted / measured - 1|: median, 90th percentile"]
    lines.append(f"{'':16}{'':9}{'steps':>6}{'coordinator':>18}{'slowest rank':>18}")
    for each in report["errors"]:
        spreads = "".join(
            f"{each[clock]['median']:>10.1%}{each[clock]['p90']:>8.1%}" for clock in CLOCKS
        )
        lines.append(f"{each['name']:16}{each['phase']:9}{each['steps']:>6}{spreads}")
    lines += [
        "",
        f"{'new':>8}{'cached':>8}  {'':16}{'':9}{'':12}{'measured ms':>12}{'predicted':>11}",
    ]
    lines += _shape_lines(report["steps"])
    return "\n".join(lines)


def _shape_lines(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for step in steps:
        names = ("new_tokens", "cached_tokens", "name", "phase", "algorithm")
        shapes.setdefault(tuple(step[name] for name in names), []).append(step)
    for (new, cached, name, phase, algorithm), of in shapes.items():
        measured, predicted = (
            float(np.median([step[key] for step in of])) * 1e3 for key in ("wall_s", "predicted_s")
        )
        yield (
            f"{new:>8}{cached:>8}  {name:16}{phase:9}{algorithm:12}{measured:>12.1f}"
            f"{predicted:>11.1f}"
        )
