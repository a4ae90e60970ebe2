"""Streamed answers beside a long prompt: who waits for whom."""

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.records import StepRecord
from cluster.bench.contestants import Ask, Ours, closing_all
from cluster.bench.latency_report import (
    BOTH,
    LONG,
    RIDES,
    STREAMS,
    TURNS,
    Arrivals,
    Scene,
    gaps,
    ratios,
    run_entry,
)
from cluster.bench.outside import report as outside_report
from cluster.bench.runs import interleave
from cluster.llm import LLM

LIMIT_S = 3600.0
WARM_UP_TOKENS = 1024  # of the long prompt, before anything is measured


@dataclass(frozen=True)
class Cast:
    """The prompts of one round."""

    streams: tuple[Ask, ...]
    long: Ask


def measure(
    options: argparse.Namespace, checkpoint: Path, profile: Path, vocabulary: int, threads: int
) -> dict[str, Any]:
    """Return what streams and the long prompt took, and what steps took outside the model."""
    start = functools.partial(
        Ours,
        checkpoint=checkpoint,
        ranks=options.ranks,
        threads=threads,
        max_tokens=max(options.long + 1, options.prompt + options.answer),
        profile=profile,
        chunked=True,
    )
    people = [start(RIDES), start(TURNS, decode_rides=False)]
    with closing_all(people):
        casts = list(_casts(options, vocabulary))
        scenes = _play(people, casts)
        # The same streams once more, as requests: a stream brings no records of its steps.
        bursts = [people[0].together(cast.streams) for cast in casts][1:]
        targets_s = {each.name: each.llm.status()["step_target_s"] for each in people}
    runs = [
        run_entry((cluster, scene), targets_s[cluster], scenes[f"{cluster}: {scene}"])
        for cluster in (RIDES, TURNS)
        for scene in (STREAMS, BOTH, LONG)
    ]
    mixed = [step for scene in scenes[f"{RIDES}: {BOTH}"] for step in scene.steps]
    sizes = {name: getattr(options, name) for name in ("streams", "prompt", "answer", "long")}
    latency = {**sizes, "ranks": options.ranks, "runs": runs, "ratios": ratios(runs)}
    return {"latency": latency, "outside": outside_report(bursts, mixed)}


def _play(people: Sequence[Ours], casts: Sequence[Cast]) -> dict[str, list[Scene]]:
    """Return every scene of every cluster, a run for each cast but the first, which warms up."""
    actions = {
        f"{person.name}: {name}": functools.partial(play, person.llm)
        for person in people
        for name, play in SCENES.items()
    }
    interleave(actions, casts[:1])
    return interleave(actions, _told(casts[1:]))


def _told(casts: Iterable[Cast]) -> Iterator[Cast]:
    for number, cast in enumerate(casts, start=1):
        print(f"streams and a long prompt: round {number}", file=sys.stderr)
        yield cast


def _casts(options: argparse.Namespace, vocabulary: int) -> Iterator[Cast]:
    """Yield the prompts of the warm-up and of each round; no two rounds have the same."""
    rng = np.random.default_rng(0)

    def ask(prompt_tokens: int, answer_tokens: int) -> Ask:
        return Ask(rng.integers(0, vocabulary, prompt_tokens).tolist(), answer_tokens)

    long_tokens = min(options.long, WARM_UP_TOKENS)
    for _ in range(1 + options.repeats):
        streams = tuple(ask(options.prompt, options.answer) for _ in range(options.streams))
        yield Cast(streams, ask(long_tokens, 1))
        long_tokens = options.long


def streams_alone(llm: LLM, cast: Cast) -> Scene:
    """Stream all short answers."""
    return _stream(llm, cast.streams, None)


def streams_and_long(llm: LLM, cast: Cast) -> Scene:
    """Stream all short answers, and hand the long prompt in once each has its first token.

    Raises:
        ClusterError: The streams had ended before the long prompt came.
    """
    scene = _stream(llm, cast.streams, cast.long)
    gaps(scene)  # tells now, and not after an hour, that there is nothing to compare
    return scene


def long_alone(llm: LLM, cast: Cast) -> Scene:
    """Compute the long prompt."""
    return _stream(llm, (), cast.long)


def _stream(llm: LLM, streams: Sequence[Ask], long: Ask | None) -> Scene:
    begun = threading.Semaphore(0)

    def read(ask: Ask) -> Arrivals:
        arrivals: list[tuple[float, int]] = []
        try:
            for delta in llm.stream(ask.prompt, ask.params()):
                arrivals.append((time.perf_counter(), len(delta.token_ids)))
                if len(arrivals) == 1:
                    begun.release()
        finally:
            if not arrivals:
                begun.release()  # what went wrong is told by the future
        ask.check("a stream", sum(tokens for _, tokens in arrivals))
        return tuple(arrivals)

    span_s: tuple[float, float] | None = None
    steps: tuple[StepRecord, ...] = ()
    with ThreadPoolExecutor(max(1, len(streams))) as readers:
        futures = [readers.submit(read, ask) for ask in streams]
        for _ in futures:
            begun.acquire(timeout=LIMIT_S)
        if long is not None:
            start_s = time.perf_counter()
            steps = llm.generate(long.prompt, long.params())[0].steps
            span_s = start_s, time.perf_counter()
        arrivals = tuple(future.result() for future in futures)
    return Scene(arrivals=arrivals, long_span_s=span_s, steps=steps)


SCENES: dict[str, Callable[[LLM, Cast], Scene]] = {
    STREAMS: streams_alone,
    BOTH: streams_and_long,
    LONG: long_alone,
}
