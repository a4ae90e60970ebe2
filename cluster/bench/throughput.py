"""Mixed requests together and one after another, against transformers' batch of all."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench.contestants import Ask, Ours, closing_all
from cluster.bench.runs import Measured, Pair, entry, interleave, paired_ratios
from cluster.bench.yardsticks import Transformers

TOGETHER, ALONE = "together", "one by one"
THEIRS = "transformers, 2 threads"
WARM_UP_REQUESTS = 2


def measure(
    options: argparse.Namespace, checkpoint: Path, profile: Path, vocabulary: int, threads: int
) -> dict[str, Any]:
    """Return everybody's runs, and the ratios of their times."""
    start = functools.partial(
        Ours,
        checkpoint=checkpoint,
        max_tokens=options.mixed_prompts[1] + options.mixed_answers[1],
        profile=profile,
        chunked=True,
    )
    ours = [start("N=1, 2 threads", ranks=1, threads=2)]
    if options.ranks > 1:
        ours.insert(0, start(f"N={options.ranks}", ranks=options.ranks, threads=threads))
    theirs = Transformers(THEIRS, checkpoint, 2)
    with closing_all([*ours, theirs]):
        actions: dict[str, Callable[[Sequence[Ask]], Measured]] = {}
        for person in ours:
            actions[f"{person.name}, {TOGETHER}"] = person.together
            actions[f"{person.name}, {ALONE}"] = person.one_by_one
        actions[theirs.name] = theirs.batch
        rounds = mixed_asks(options, vocabulary)
        interleave(actions, [next(rounds)[:WARM_UP_REQUESTS]])
        measured = interleave(actions, _told(rounds))
    sizes = next(mixed_asks(options, vocabulary))
    return {"throughput": report(sizes, measured, [person.name for person in ours])}


def mixed_asks(options: argparse.Namespace, vocabulary: int) -> Iterator[list[Ask]]:
    """Yield the requests of the warm-up and of each round: other tokens, always as many."""
    rng = np.random.default_rng(0)
    ends = options.mixed_prompts, options.mixed_answers
    sizes = [
        [int(rng.integers(least, most, endpoint=True)) for least, most in ends]
        for _ in range(options.mixed)
    ]
    for _ in range(1 + options.repeats):
        yield [
            Ask(rng.integers(0, vocabulary, prompt_tokens).tolist(), answer_tokens)
            for prompt_tokens, answer_tokens in sizes
        ]


def _told(rounds: Iterator[list[Ask]]) -> Iterator[list[Ask]]:
    for number, asks in enumerate(rounds, start=1):
        print(f"mixed requests: round {number}", file=sys.stderr)
        yield asks


def report(
    asks: Sequence[Ask], measured: Mapping[str, Sequence[Measured]], ours: Sequence[str]
) -> dict[str, Any]:
    """Return runs and ratios; tokens are those of the answers that were asked for."""
    tokens = sum(ask.answer_tokens for ask in asks)
    runs = [entry(name, done, tokens=tokens) for name, done in measured.items()]
    for run in runs:
        run["tokens_per_s"] = tokens / run["median_s"]
    pairs: list[Pair] = [(f"{name}, {ALONE}", f"{name}, {TOGETHER}") for name in ours]
    pairs += [(THEIRS, f"{name}, {TOGETHER}") for name in ours]
    return {
        "requests": len(asks),
        "prompt_tokens": sum(len(ask.token_ids) for ask in asks),
        "answer_tokens": tokens,
        "longest_answer": max(ask.answer_tokens for ask in asks),
        "runs": runs,
        "ratios": paired_ratios(runs, pairs),
    }


def lines(throughput: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    yield (
        f"throughput: {throughput['requests']} requests, {throughput['prompt_tokens']} tokens of"
        f" prompts, {throughput['answer_tokens']} of answers (transformers makes"
        f" {throughput['longest_answer']} for each)"
    )
    yield f"{'':28}{'median s':>10}{'tokens/s':>10}{'peak MiB':>10}"
    for run in throughput["runs"]:
        yield (
            f"{run['name']:28}{run['median_s']:>10.3f}{run['tokens_per_s']:>10.1f}"
            f"{run['peak_bytes'] / 2**20:>10.0f}"
        )
    yield "medians of paired ratios of seconds:"
    for each in throughput["ratios"]:
        yield f"  ({each['of']}) / ({each['over']}) = {each['median']:.3f}"
