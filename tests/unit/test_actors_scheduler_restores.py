"""Random restores on ranks that compute nothing: what comes early, late, damaged or never."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.choice import Chooser
from actors.generation import Generation
from actors.kv.messages import (
    Lease,
    RestoreChoice,
    RestorePart,
    StoredPrefix,
    rank_of_block,
)
from actors.kv.pieces import PieceId
from actors.messages import PrefillChunk, SequenceResult, StepResult, TokenIds
from actors.offload import Lookup, Offload
from actors.scheduler import Scheduler, Step
from models.sampling import SamplingParams
from tests.fake_ranks import SHAPE, make_scheduler
from tests.rates import FREE_RING, SLOW_RING

BLOCK = 16


class _Keys:
    block_tokens = BLOCK

    def keys(self, salt: str, token_ids: TokenIds, known: Sequence[bytes]) -> list[bytes]:
        return [
            b"".join([salt.encode(), token_ids[: (block + 1) * BLOCK].tobytes()])
            for block in range(len(token_ids) // BLOCK)
        ]

    def tenant(self, salt: str) -> bytes:
        return salt.encode()


class _Cluster:
    """A scheduler, and stores and ranks whose answers come from a random generator."""

    def __init__(self, scheduler: Scheduler, rng: np.random.Generator) -> None:
        self.scheduler = scheduler
        self.rng = rng
        assert scheduler.offload is not None
        self.offload = scheduler.offload
        self.staged: list[StoredPrefix] = []
        self.returned: list[StoredPrefix] = []
        self.restored_tokens = self.recomputed_chunks = self.damaged = 0
        self._late: list[tuple[int, Lookup, StoredPrefix | None]] = []  # told in this step
        self._steps = 0
        self._under_way: dict[int, int] = {}  # by sequence, the position its restore goes to

    def step(self) -> bool:
        self._steps += 1
        for told in [each for each in self._late if each[0] <= self._steps]:
            self._late.remove(told)
            self.scheduler.found(*told[1:])
        step = self.scheduler.next_step()
        for lookup in self.offload.take_lookups():
            self._answer(lookup)
        self.returned += self.offload.take_returned()
        if step is None and self.scheduler.awaits_rows:
            self.scheduler.note_restoring([self._shares()])
            return True
        if step is None:
            return bool(self._late) or self.scheduler.num_waiting > 0
        self._check(step)
        self.scheduler.advance(step, self._results(step))
        self.scheduler.cache.check_invariants()
        return True

    def _answer(self, lookup: Lookup) -> None:
        """Find nothing or some blocks, at once or later, of which some are recomputed."""
        blocks = int(self.rng.integers(0, len(lookup.keys) + 1))
        end = min(lookup.start + blocks * BLOCK, lookup.tokens)
        if end <= lookup.start:
            self.scheduler.found(lookup, None)
            return
        recomputed = int(self.rng.integers(0, blocks)) * int(self.rng.integers(0, 2))
        start = lookup.start + recomputed * BLOCK
        stored = self._stored(lookup, start, end) if self.rng.random() < 0.9 else None
        delay = int(self.rng.integers(0, 6))
        if delay == 0:
            self.scheduler.found(lookup, stored)
            return
        if self.rng.random() < 0.8:
            self.scheduler.begin_ahead(lookup, start)
        self._late.append((self._steps + delay, lookup, stored))

    def _stored(self, lookup: Lookup, start: int, end: int) -> StoredPrefix | None:
        if end <= start:
            return None
        num_ranks = self.scheduler.cache.num_ranks
        parts = []
        for at in range(start, end, BLOCK):
            piece = PieceId(bytes(32), 0, BLOCK, "raw")
            parts.append(
                RestorePart(
                    rank=rank_of_block(at // BLOCK, lookup.home, num_ranks),
                    start=at,
                    end=min(at + BLOCK, end),
                    block_start=at,
                    lease=Lease(lease_id=0, piece=piece, offset_bytes=0, size_bytes=1),
                    tier="host",
                )
            )
        load_s = float(self.rng.choice([0.0, 10.0]))
        stored = StoredPrefix(
            start=start,
            end=end,
            home=lookup.home,
            parts=tuple(parts),
            leases={},
            tokens_by_tier={},
            choice=RestoreChoice(recompute_to=start, load_s=load_s),
            begin_s=0.0,
            find_s=0.0,
            stage_s=0.0,
        )
        self.staged.append(stored)
        return stored

    def _check(self, step: Step) -> None:
        """Assert that rows have places before they come back, and are awaited before use."""
        tables = self.scheduler.cache._tables
        for order in step.plan.restores:
            for part in order.parts:
                run = tables[part.rank].run(order.sequence_id)
                held = run.rows_below(part.end) - run.rows_below(part.start)
                assert held == part.end - part.start
            self._under_way[order.sequence_id] = order.parts[-1].end
        for chunk in step.plan.chunks:
            assert sum(chunk.cached_rows) == chunk.start
            running = self.scheduler._running[chunk.sequence_id]
            target_s = self.scheduler.limits.step_target_s
            assert not running.waits_for_rows(target_s), "others would wait for them too"
            restored_to = self._under_way.get(chunk.sequence_id)
            assert chunk.behind_restored == (restored_to == chunk.start)
            if restored_to is not None:
                assert chunk.start + len(chunk.token_ids) < restored_to or chunk.behind_restored
                self.recomputed_chunks += not chunk.behind_restored

    def _results(self, step: Step) -> list[StepResult]:
        sequences = []
        for part in step.plan.parts:
            bad_from: int | None = None
            token_ids: tuple[int, ...] = ()
            if isinstance(part, PrefillChunk):
                if part.behind_restored:
                    self._under_way.pop(part.sequence_id)
                    if self.rng.random() < 0.2:
                        self.damaged += 1
                        first = max(0, part.start - 3 * BLOCK)
                        bad_from = self._bad_from(part.sequence_id, first, part.start)
                    else:
                        self.restored_tokens += 1
                if part.draw is not None:
                    token_ids = (7,)
            else:
                token_ids = (7,) * len(part.owners)
            sequences.append(SequenceResult(token_ids=token_ids, bad_from=bad_from))
        shares = self._shares()
        return [
            StepResult(
                rank=rank,
                number=step.plan.number,
                sequences=tuple(sequences),
                wall_s=0.0,
                parts_s={},
                restoring=shares,
            )
            for rank in range(self.scheduler.cache.num_ranks)
        ]

    def _shares(self) -> dict[int, float]:
        return {each: float(self.rng.choice([0.0, 0.5, 1.0])) for each in self._under_way}

    def _bad_from(self, sequence_id: int, first: int, end: int) -> int:
        """A position among those that came back, as ranks report it."""
        running = self.scheduler._running[sequence_id]
        assert running.stored is not None
        return int(self.rng.integers(max(running.computed, first), end))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_ranks=st.integers(1, 3),
    chooser=st.sampled_from([None, FREE_RING, SLOW_RING]),
    num_pages=st.sampled_from([20, 60, 1000]),
    max_num_batched_tokens=st.sampled_from([70, 8192]),
    step_target_s=st.sampled_from([1e-6, float("inf")]),
    decode_rides=st.booleans(),
)
def test_every_request_ends_whatever_the_stores_do(
    seed: int,
    num_ranks: int,
    chooser: object,
    num_pages: int,
    max_num_batched_tokens: int,
    step_target_s: float,
    decode_rides: bool,
) -> None:
    """Nobody waits for ever, all pages and all leases come back, once."""
    rng = np.random.default_rng(seed)
    scheduler = make_scheduler(
        num_ranks,
        num_pages=num_pages,
        page_tokens=16,
        chooser=chooser and Chooser("auto", SHAPE, chooser, num_ranks),  # type: ignore[arg-type]
        max_num_batched_tokens=max_num_batched_tokens,
        step_target_s=step_target_s,
        decode_rides=decode_rides,
        burst_steps=5,
    )
    scheduler.offload = Offload(_Keys(), 1)
    cluster = _Cluster(scheduler, rng)
    generations = []
    for number in range(1, int(rng.integers(2, 10))):
        prompt = np.arange(int(rng.integers(1, 180)), dtype=np.int32)
        if rng.random() < 0.6:
            prompt = prompt + 1000 * number
        generation = Generation(
            sequence_id=number,
            prompt=prompt,
            params=SamplingParams(max_tokens=int(rng.integers(1, 30)), temperature=0.0),
            seed=0,
            eos_ids=(),
            max_model_len=10_000,
        )
        scheduler.add(generation)
        generations.append(generation)
        for _ in range(int(rng.integers(0, 4))):
            cluster.step()
        if rng.random() < 0.2:
            scheduler.cancel(generations[int(rng.integers(0, len(generations)))])
    for _ in range(5000):
        if not cluster.step():
            break
    else:
        pytest.fail("an answer starves")

    for generation in generations:
        assert generation.finish_reason in ("length", "abort")
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    cluster.returned += cluster.offload.take_returned()
    assert sorted(map(id, cluster.returned)) == sorted(map(id, cluster.staged))
    scheduler.cache.clear()
    assert all(counts["free"] == counts["total"] for counts in scheduler.cache.page_counts())
