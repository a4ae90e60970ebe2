"""What a server is asked in a benchmark, when, and what came back: plans and samples.

All but `play` is pure. Latencies count from the moment at which a request was *planned*: a
load generator that falls behind, or a door that makes it wait, must not look fast.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.bench.contestants import Ask

# Least and most tokens of prompts and of answers, and the share of requests of that kind.
Shape = tuple[tuple[int, int], tuple[int, int], float]
MIXES: dict[str, tuple[Shape, ...]] = {
    "chat": (((64, 256), (16, 64), 1.0),),
    "long": (((1024, 4096), (8, 32), 1.0),),
    "mixed": (((64, 256), (16, 64), 0.9), ((1024, 4096), (8, 32), 0.1)),
}
Piece = tuple[tuple[int, ...], str | None]  # new token ids, and why the answer ended
Door = Callable[[Ask], AsyncIterator[Piece]]


@dataclass(kw_only=True)
class Sample:
    """One request; moments are of `time.perf_counter`."""

    planned_s: float
    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # a moment, its tokens
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """To the first token, from the planned moment."""
        return self.arrivals[0][0] - self.planned_s

    @property
    def e2el_s(self) -> float:
        """To the last token, from the planned moment."""
        return self.arrivals[-1][0] - self.planned_s

    @property
    def gaps_s(self) -> list[float]:
        """Between the pieces of the answer; a piece may have several tokens."""
        moments = [moment_s for moment_s, _ in self.arrivals]
        return [after - before for before, after in itertools.pairwise(moments)]

    @property
    def tpot_s(self) -> float | None:
        """Per token behind the first piece; None of an answer in one piece."""
        tokens = sum(tokens for _, tokens in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / tokens if tokens else None


def arrivals_s(rate: float, count: int, seed: int) -> list[float]:
    """Return when requests come, s from the start: a Poisson process, or all at 0 for inf."""
    if math.isinf(rate):
        return [0.0] * count
    gaps_s = np.random.default_rng(seed).exponential(1 / rate, count)
    moments: list[float] = (np.cumsum(gaps_s) - gaps_s[0]).tolist()
    return moments


def make_asks(
    shapes: Sequence[Shape], count: int, vocabulary: int, *, shared: float, seed: int, salt: int
) -> list[Ask]:
    """Return requests of a mix: ``seed`` gives their lengths, ``salt`` besides their tokens.

    ``shared`` is the share of each prompt that is the beginning of one text common to all.
    """
    lengths = np.random.default_rng(seed)
    tokens = np.random.default_rng((seed, salt))
    longest = max(prompt[1] for prompt, _, _ in shapes)
    common = tokens.integers(0, vocabulary, longest).tolist()
    weights = np.array([weight for _, _, weight in shapes])
    asks = []
    for kind in lengths.choice(len(shapes), count, p=weights / weights.sum()):
        prompt, answer, _ = shapes[kind]
        length = int(lengths.integers(prompt[0], prompt[1] + 1))
        head = int(length * shared)
        own = tokens.integers(0, vocabulary, length - head).tolist()
        made = int(lengths.integers(answer[0], answer[1] + 1))
        asks.append(Ask(common[:head] + own, made))
    return asks


async def play(door: Door, asks: Sequence[Ask], moments_s: Sequence[float]) -> list[Sample]:
    """Send each request at its moment, whatever became of earlier ones; return all samples."""
    begin_s = time.perf_counter()
    pairs = zip(asks, moments_s, strict=True)
    return await asyncio.gather(*(_send(door, ask, begin_s + at_s) for ask, at_s in pairs))


async def _send(door: Door, ask: Ask, planned_s: float) -> Sample:
    sample = Sample(planned_s=planned_s)
    await asyncio.sleep(max(0.0, planned_s - time.perf_counter()))
    sample.sent_s = time.perf_counter()
    try:
        async for token_ids, reason in door(ask):
            if token_ids:
                sample.arrivals.append((time.perf_counter(), len(token_ids)))
                sample.token_ids += token_ids
            sample.finish_reason = reason or sample.finish_reason
        if len(sample.token_ids) != ask.answer_tokens or sample.finish_reason != "length":
            sample.error = (
                f"{len(sample.token_ids)} tokens of {ask.answer_tokens}, ended by"
                f" {sample.finish_reason}"
            )
    except Exception as error:  # counted and told: one failed request must not end the run
        sample.error = f"{type(error).__name__}: {error}"[:300]
    return sample
