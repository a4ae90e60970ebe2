"""How long a step is: how many tokens of each prompt, how many steps of a decode burst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.choice import Chooser
from actors.chunks import size_chunks
from actors.device_cache import DeviceCache
from actors.running import Running
from models.cost import SequenceShape

LONE_STEPS = 4  # a step that nobody waits for may take so many times the target


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the scheduler keeps to; see `configs.Config` for each."""

    decode_block_tokens: int
    burst_steps: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    long_prefill_token_threshold: int = 0  # 0: none
    step_target_s: float = float("inf")
    decode_rides: bool = True


class StepSizes:
    """Sizes the steps of one cluster by price; nothing is changed here."""

    def __init__(self, cache: DeviceCache, chooser: Chooser, limits: Limits) -> None:
        """Take the pages' bookkeeping, the prices, and what to keep to."""
        self._cache = cache
        self._chooser = chooser
        self._limits = limits

    def chunks(
        self, prefilling: Sequence[Running], riders: Sequence[Running], *, others_wait: bool
    ) -> list[int]:
        """Return how many tokens of each prompt fit a step of the target's length."""
        limits = self._limits
        room = max(1, limits.max_num_batched_tokens - len(riders))
        riding_s = self._chooser.riding(self.rows_of(riders))

        def price(counts: Sequence[int]) -> float:
            shapes = [
                self.shape(running, count)
                for running, count in zip(prefilling, counts, strict=True)
                if count
            ]
            if riding_s is None:
                return float(sum(counts))
            choice = self._chooser.prefill(shapes) if shapes else None
            if riders:
                return self._chooser.mixed(choice, riding_s)
            return 0.0 if choice is None else choice.predicted_s or 0.0

        nobody_waits = not riders and not others_wait and len(prefilling) == 1
        target_s = limits.step_target_s * (LONE_STEPS if nobody_waits else 1)
        wanted = [running.next_end - running.start for running in prefilling]
        counts = size_chunks(
            wanted,
            price,
            limit=float(room) if riding_s is None else target_s,
            max_tokens=room,
            longest=limits.long_prefill_token_threshold or room,
        )
        # Chunks whose rows are grown come whole: the oldest prompt's now, others when they fit.
        return [
            count if count == most or not running.ends else most * (index == 0)
            for index, (running, count, most) in enumerate(
                zip(prefilling, counts, wanted, strict=True)
            )
        ]

    def chunk(self, running: Running, rows: tuple[int, ...], left: int, *, others_are: bool) -> int:
        """Return the tokens of one prompt's chunk behind these rows, in a step of others too."""
        limits = self._limits
        steps, room = float(LONE_STEPS), limits.max_num_batched_tokens
        if others_are:
            steps, room = 0.5, max(1, room // 2)

        def price(counts: Sequence[int]) -> float:
            shape = SequenceShape(new_tokens=counts[0], cached_rows=rows, whole_rank=running.home)
            return self._chooser.prefill([shape]).predicted_s or 0.0

        return size_chunks(
            [left],
            lambda counts: price(counts) if counts[0] else 0.0,
            limit=steps * limits.step_target_s,
            max_tokens=room,
            longest=limits.long_prefill_token_threshold or room,
        )[0]

    def shape(self, running: Running, count: int) -> SequenceShape:
        """Return what a chunk of so many tokens is to the prices."""
        rows = self.rows_before(running)
        return SequenceShape(new_tokens=count, cached_rows=rows, whole_rank=running.home)

    def rows_before(self, running: Running) -> tuple[int, ...]:
        """Return how many rows each rank holds before the next chunk, with restored ones."""
        position = running.start if running.is_restoring else running.computed
        return self._cache.rows(running.sequence_id, position)

    def burst(self, decoding: Sequence[Running]) -> int:
        """Return how many steps a burst has, so that it is near the target in length."""
        rows_of = self.rows_of(decoding)
        first_s, second_s = (self._chooser.decode(rows_of, count) for count in (1, 2))
        steps = self._limits.burst_steps
        if first_s is not None and second_s is not None and second_s > first_s:
            more = (self._limits.step_target_s - first_s) / (second_s - first_s)
            steps = 1 + max(0, min(steps - 1, math.floor(min(more, steps))))
        return steps

    def rows_of(self, runs: Sequence[Running]) -> list[tuple[int, ...]]:
        """Return the rows of each answer on each rank, ``(rows,)`` where it is whole."""
        return [
            self._cache.rows(run.sequence_id, run.computed) if run.home is None else (run.computed,)
            for run in runs
        ]
