"""Ours as a contestant: the whole system through its handle, in processes of its own.

All contestants live at once on one Ray, so that runs can be interleaved; who does
not run only waits.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.errors import ClusterError
from actors.messages import RequestOutput
from actors.records import StepRecord
from cluster.bench.runs import Measured, peak_rss_bytes, reset_peak_rss
from cluster.llm import LLM
from models.errors import PromptError
from models.sampling import SamplingParams

VOCABULARY = 256  # random prompts are of the first ids only: the demo model's others are commands
ANSWER_TOKENS = 16  # of a first turn


@dataclass(frozen=True)
class Ask:
    """A prompt, and how many tokens its answer has."""

    token_ids: Sequence[int]
    answer_tokens: int

    @property
    def prompt(self) -> dict[str, Sequence[int]]:
        """What `LLM` takes."""
        return {"prompt_token_ids": self.token_ids}

    def params(self) -> SamplingParams:
        """Greedy, and no end before the last token."""
        return SamplingParams(max_tokens=self.answer_tokens, temperature=0.0, ignore_eos=True)

    def check(self, name: str, made_tokens: int) -> None:
        """Refuse an answer that has another length than was asked for.

        Raises:
            ClusterError: It has.
        """
        if made_tokens != self.answer_tokens:
            raise ClusterError(
                f"{name} made {made_tokens} tokens where {self.answer_tokens} were asked for: what"
                " was measured is other work"
            )


class Contestant(Protocol):
    """Somebody in processes that end with `close`."""

    name: str

    def close(self) -> None:
        """End the processes."""


@contextlib.contextmanager
def closing_all(people: Sequence[Contestant]) -> Iterator[None]:
    """End all processes with the block."""
    try:
        yield
    finally:
        for person in people:
            person.close()


class Converses(Contestant, Protocol):
    """Somebody whose second turn is timed."""

    def begin(self, token_ids: Sequence[int]) -> None:
        """Compute a first turn, of so many tokens with its answer, in place of what was before."""

    def turn(self, new_ids: Sequence[int]) -> Measured:
        """Compute new tokens behind the first turn, and the token that follows them."""


class NewTokens:
    """Random tokens of which no two draws begin alike, so that none finds another's cached."""

    def __init__(self, vocab_size: int) -> None:
        """Draw the same tokens on every run."""
        self._ids = np.random.default_rng(0)
        self._vocabulary = min(VOCABULARY, vocab_size)
        self._draws = 0

    def __call__(self, count: int) -> list[int]:
        """Return so many tokens.

        Raises:
            PromptError: There are no more tokens to begin with.
        """
        if self._draws == self._vocabulary:
            raise PromptError(
                f"only {self._vocabulary} turns can begin with different tokens: ask for fewer"
                " --repeats"
            )
        first = self._draws
        self._draws += 1
        return [first, *self._ids.integers(0, self._vocabulary, count - 1).tolist()]

    def context(self, count: int) -> list[int]:
        """Return tokens of a first turn; behind it all draws are new again."""
        self._draws = 0
        return self._ids.integers(0, self._vocabulary, count).tolist()


class Ours:
    """The whole system through its handle: Ray, coordinator, ranks."""

    def __init__(
        self,
        name: str,
        checkpoint: Path,
        *,
        ranks: int,
        threads: int,
        max_tokens: int,
        profile: Path,
        keeps: bool = False,
        algorithm: str = "auto",
        decode_rides: bool = True,
        chunked: bool = False,
        store_bytes: int = 0,
    ) -> None:
        """Bring a cluster up.

        Args:
            name: In tables.
            checkpoint: Of the model.
            ranks: Of the ring, on this machine.
            threads: Of each rank.
            max_tokens: Of the longest prompt with its answer.
            profile: Directory of the measured rates that contestants of one shape share.
            keeps: KV of earlier turns is reused.
            algorithm: ``ring.algorithm``.
            decode_rides: ``scheduler.decode_rides``.
            chunked: Prompts are prefilled in chunks, as they are served; else each in one step,
                whose price and parts can be compared.
            store_bytes: ``kv_store.host_memory_bytes``.
        """
        self.name = name
        self._keeps = keeps
        self._context: list[int] = []
        scheduler: dict[str, Any] = {"decode_rides": decode_rides}
        if not chunked:
            scheduler["step_target_s"] = 1e6
        self.llm = LLM(
            checkpoint,
            device="cpu",
            context_parallel_size=ranks,
            threads_per_rank=threads,
            max_model_len=max_tokens,
            enable_prefix_caching=keeps,
            ring={"algorithm": algorithm},
            max_num_batched_tokens=8192 if chunked else max(8192, max_tokens),
            scheduler=scheduler,
            profile={"directory": str(profile)},
            kv_store={"host_memory_bytes": store_bytes},
        )
        self._pids = [worker.pid for worker in self.llm.info.workers]

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        """Compute a prompt and its first token."""
        return self._prefill(token_ids, 1)[0]

    def first_token(self, token_ids: Sequence[int]) -> Measured:
        """Return the time from a prompt's arrival to its first token, on empty devices."""
        self.llm.reset_prefix_cache()
        self._reset_peak()
        output = self._run(token_ids, 1)
        parts = _parts_s(output.steps[0])
        return Measured(output.metrics.ttft_s, self._peak_bytes(), parts, output.steps)

    def decode(self, token_ids: Sequence[int], steps: int) -> Measured:
        """Return the mean time of one greedy decode step behind a prompt."""
        self._reset_peak()
        bursts = self._run(token_ids, 1 + steps).steps[1:]
        parts: Counter[str] = Counter()
        for burst in bursts:
            parts.update({part: seconds / steps for part, seconds in _parts_s(burst).items()})
        seconds = sum(burst.wall_s for burst in bursts) / steps
        return Measured(seconds, self._peak_bytes(), dict(parts), bursts)

    def begin(self, token_ids: Sequence[int]) -> None:
        """Compute a first turn, of so many tokens with its answer, in place of what was before."""
        self.llm.reset_prefix_cache()
        self._context = list(token_ids)
        if self._keeps and self._context:
            # KV is held of all tokens but the last one sampled.
            answer_tokens = min(ANSWER_TOKENS, len(self._context) - 1)
            del self._context[len(self._context) - answer_tokens :]
            output = self._run(self._context, answer_tokens + 1)
            self._context += output.outputs[0].token_ids[:answer_tokens]

    def turn(self, new_ids: Sequence[int], answer_tokens: int = 1) -> Measured:
        """Compute new tokens behind the first turn; the time is that of the prefill.

        Raises:
            ClusterError: Another number of tokens was cached than the first turn had.
        """
        measured, found = self._prefill([*self._context, *new_ids], answer_tokens)
        expected = len(self._context) if self._keeps else 0
        if found != expected:
            raise ClusterError(
                f"{self.name} found {found} tokens cached, not {expected}: what was measured is"
                " no second turn; is there memory for the KV of all turns?"
            )
        return measured

    def together(self, asks: Sequence[Ask]) -> Measured:
        """Answer requests that are handed in at once; the time is the caller's."""

        async def answer_all() -> list[RequestOutput]:
            return await asyncio.gather(
                *(self.llm.agenerate(ask.prompt, ask.params()) for ask in asks)
            )

        return self._timed(asks, lambda: asyncio.run(answer_all()))

    def one_by_one(self, asks: Sequence[Ask]) -> Measured:
        """Answer requests of which each is handed in when the one before has its answer."""
        return self._timed(
            asks, lambda: [self.llm.generate(ask.prompt, ask.params())[0] for ask in asks]
        )

    def close(self) -> None:
        """End the processes."""
        self.llm.close()

    def _timed(
        self, asks: Sequence[Ask], answer: Callable[[], Sequence[RequestOutput]]
    ) -> Measured:
        self._reset_peak()
        start_s = time.perf_counter()
        outputs = answer()
        seconds = time.perf_counter() - start_s
        for ask, output in zip(asks, outputs, strict=True):
            ask.check(self.name, len(output.outputs[0].token_ids))
        by_number = {step.number: step for output in outputs for step in output.steps}
        steps = tuple(by_number[number] for number in sorted(by_number))
        return Measured(seconds, self._peak_bytes(), steps=steps)

    def _prefill(self, token_ids: Sequence[int], max_tokens: int) -> tuple[Measured, int]:
        self._reset_peak()
        output = self._run(token_ids, max_tokens)
        step = output.steps[0]
        measured = Measured(step.wall_s, self._peak_bytes(), _parts_s(step), output.steps)
        return measured, output.num_cached_tokens

    def _reset_peak(self) -> None:
        for pid in self._pids:
            reset_peak_rss(pid)

    def _peak_bytes(self) -> int:
        return max(map(peak_rss_bytes, self._pids))

    def _run(self, token_ids: Sequence[int], max_tokens: int) -> RequestOutput:
        ask = Ask(token_ids, max_tokens)
        return self.llm.generate(ask.prompt, ask.params())[0]


def _parts_s(step: StepRecord) -> dict[str, float]:
    """Return where a step's time went: the mean over its ranks, and what Ray took on top."""
    total: Counter[str] = Counter()
    for parts_s in step.ranks_parts_s:
        total.update(parts_s)
    mean = {part: seconds / step.num_ranks for part, seconds in total.items()}
    mean["other"] = sum(step.ranks_wall_s) / step.num_ranks - sum(mean.values())
    mean["ray"] = step.wall_s - max(step.ranks_wall_s)
    return mean
