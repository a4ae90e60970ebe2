"""Which plan comes next, for all requests: events in, plans out. No Ray, no tensors, no clock.

Call `next_step`, have all ranks execute its plan, and hand their results to `advance`,
until `next_step` returns None. Prompts are prefilled in chunks that keep a step near its
target time; the answers that decode take one step beside each chunk, and bursts of steps
where no prompt is under way.

An answer runs as soon as its prompt fits beside the others. Where answers outgrow the
pages, the newest makes way: it waits again, and goes on from its tokens.
"""

import itertools
import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.admission import Admission, Place
from actors.choice import Choice, Chooser
from actors.device_cache import DeviceCache
from actors.errors import QueueFull
from actors.generation import Generation
from actors.kv.messages import StoredPrefix, part_spans
from actors.messages import DecodeRow, FinishReason, Plan, PrefillChunk, StepResult, TokenIds
from actors.offload import Lookup, Offload
from actors.plans import chunk_spans, owned_spans, spans_to_come
from actors.running import Entry, Running
from actors.step_sizes import Limits, StepSizes


@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan, the answers that it is for in the order of its parts, and what is expected of it."""

    plan: Plan
    generations: tuple[Generation, ...]
    new_tokens: int
    cached_tokens: int
    algorithm: str
    predicted_s: float | None
    choice: Choice | None = None  # of chunks
    riding_s: float | None = None  # the price of the rows beside them


class Scheduler:
    """Waiting and running answers of one cluster. Not thread-safe."""

    def __init__(
        self,
        cache: DeviceCache,
        chooser: Chooser,
        limits: Limits,
        offload: Offload | None = None,
    ) -> None:
        """Take the pages' bookkeeping, all free, the choice of algorithms, and the KV stores."""
        self.cache = cache
        self.offload = offload
        self.limits = limits
        self._chooser = chooser
        self._sizes = StepSizes(cache, chooser, limits)
        self._admission = Admission(cache, chooser, limits.decode_block_tokens)
        self._waiting: list[Entry] = []  # in order
        self._looked_up: list[Entry] = []  # that wait for the KV stores' answer
        self._running: dict[int, Running] = {}  # by sequence, in order of begin
        self._ended: tuple[int, ...] = ()
        self._arrivals = itertools.count()
        self._later_ids = itertools.count(-1, -1)  # of preempted answers that come back
        self.num_steps = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Answers that wait, for the first time or again."""
        return len(self._waiting) + len(self._looked_up)

    @property
    def num_running(self) -> int:
        """Answers that have begun and not ended."""
        return len(self._running)

    def add(self, generation: Generation) -> None:
        """Take an answer to make, behind those of its priority that wait.

        Raises:
            PromptError: It would not fit even if nothing else were there.
            QueueFull: Too many wait already.
        """
        if len(self._waiting) >= self.limits.max_queued_requests:
            raise QueueFull(
                f"{len(self._waiting)} answers wait already, as many as may: try again later, or"
                " raise scheduler.max_queued_requests"
            )
        self._admission.check(generation)
        insort(self._waiting, Entry(generation.priority, next(self._arrivals), generation))

    def cancel(self, generation: Generation, reason: FinishReason = "abort") -> bool:
        """End an answer with what it has; return False where it has ended already.

        What the ranks hold of it stays for others to share, as of every answer.
        """
        if generation.finish_reason is not None:
            return False
        generation.end(reason)
        for entry in [each for each in self._waiting if each.generation is generation]:
            self._waiting.remove(entry)
            self._give_back(entry)
        for running in list(self._running.values()):
            if running.generation is generation:
                self._stop(running)
        return True

    def found(self, lookup: Lookup, stored: StoredPrefix | None) -> None:
        """Take what the KV stores have of a prompt, or None: it waits again, in its place.

        One that has begun meanwhile (`begin_ahead`) goes on with it.
        """
        assert self.offload is not None
        entry = lookup.entry
        entry.coming = None
        if entry.generation.finish_reason is not None:  # cancelled meanwhile
            self._wait_no_more(entry)
            self.offload.give_back(stored)
            return
        entry.stored = stored
        if self._wait_no_more(entry):
            insort(self._waiting, entry)
        for running in self._running.values():
            if running.entry is entry:
                self._take_stored(running)

    def begin_ahead(self, lookup: Lookup, recompute_to: int) -> None:
        """Let a prompt begin up to a position while the KV stores bring what lies behind it."""
        if self._wait_no_more(lookup.entry) and lookup.entry.generation.finish_reason is None:
            lookup.entry.coming = recompute_to
            insort(self._waiting, lookup.entry)

    def _wait_no_more(self, entry: Entry) -> bool:
        """Let an entry not wait for the KV stores' first answer; return whether it did."""
        if entry not in self._looked_up:
            return False
        self._looked_up.remove(entry)
        return True

    def _take_stored(self, running: Running) -> None:
        """Let what the KV stores have come back, where it fits what the ranks hold."""
        entry = running.entry
        stored = entry.stored
        if stored is None:
            return
        if stored.home == running.home and running.computed < stored.end:
            running.stored, entry.stored = stored, None
        else:
            self._give_back(entry)

    def progress(self, generation: Generation) -> tuple[int, int]:
        """Return the tokens of an answer's prompt that are computed, or shared, and all of them."""
        total = len(generation.prompt)
        for running in self._running.values():
            if running.generation is generation:
                return min(total, running.computed), total
        return (total if generation.made_tokens else 0), total

    def next_step(self) -> Step | None:
        """Return what all ranks do next, or None where nothing is left to do."""
        self._admit()
        runs = sorted(self._running.values(), key=lambda running: running.entry)
        prefilling = [
            running for running in runs if running.remaining and not running.waits_for_stores
        ]
        prefilling = self._ready(prefilling)
        decoding = [running for running in runs if not running.remaining]
        step = None
        if prefilling and (self.limits.decode_rides or not decoding or self.num_steps % 2 == 0):
            step = self._mixed_step(prefilling, decoding if self.limits.decode_rides else [])
        if step is None and decoding:
            step = self._burst(decoding)
        if step is None and self._waiting and not self._running:
            # Whoever ran was preempted to the last: now there is room.
            return self.next_step()
        if step is None and self.offload is not None and self.offload.has_news:
            return self._step((), (), (), ())
        self.num_steps += step is not None
        return step

    def following_burst(self, step: Step) -> Step | None:
        """Return the burst that follows one whose results are not there yet, or None.

        Its rows go on from tokens that only the ranks know; those that stop in the first
        burst have none in the second. Where anything else is to be done there is none:
        call `advance` and `next_step`.
        """
        if step.plan.chunks or self._waiting or any(r.remaining for r in self._running.values()):
            return None
        ahead = {row.sequence_id: len(row.owners) for row in step.plan.rows}
        decoding = [
            running
            for running in self._running.values()
            if running.generation.tokens_to_come > ahead.get(running.sequence_id, math.inf)
        ]
        if len(decoding) < len(self._running) or not decoding:
            return None  # an answer ends: those that wait to share it, or its pages, may begin
        steps = self._sizes.burst(decoding)
        rows, riders = self._decode_rows(decoding, steps, ahead)
        if not rows:
            return None
        self.num_steps += 1
        return self._step((), (), rows, riders)

    def advance(self, step: Step, results: Sequence[StepResult]) -> list[Generation]:
        """Take what the ranks made of a step; return the answers that it completed."""
        self._observe(step, max(result.wall_s for result in results))
        self.note_restoring([result.restoring for result in results])
        done = []
        for index, part in enumerate(step.plan.parts):
            running = self._running.get(part.sequence_id)
            if running is None:
                continue  # cancelled meanwhile
            generation = running.generation
            token_ids = results[part.sampling_rank].sequences[index].token_ids
            if isinstance(part, PrefillChunk):
                damaged = [each.sequences[index].bad_from for each in results]
                self._take_chunk(
                    running, part, min((d for d in damaged if d is not None), default=None)
                )
                if running.remaining and part.draw is not None:
                    continue  # what was sampled is void
            else:
                running.computed += len(token_ids)
            generation.advance(token_ids)
            if generation.finish_reason is not None:
                self._stop(running)
                done.append(generation)
            else:
                self._store_blocks(running)
        return done

    @property
    def awaits_rows(self) -> bool:
        """Whether an answer waits for rows that come back: ask the ranks how far they are."""
        return any(r.waits_for_rows(self.limits.step_target_s) for r in self._running.values())

    def note_restoring(self, ranks: Sequence[Mapping[int, float]]) -> None:
        """Take which share of their layers is there, on each rank, of what comes back."""
        for running in self._running.values():
            shares = [of_rank.get(running.sequence_id, 1.0) for of_rank in ranks]
            running.restored_share = min(shares) if running.is_restoring else 0.0

    def _ready(self, prefilling: list[Running]) -> list[Running]:
        """Return those whose next chunk has not to wait for rows: a step waits for a short time."""
        most_s = self.limits.step_target_s
        return [running for running in prefilling if not running.waits_for_rows(most_s)]

    def _observe(self, step: Step, measured_s: float) -> None:
        if step.choice is None or any(each.is_restoring for each in self._running.values()):
            return
        if not step.plan.rows:
            self._chooser.observe(step.choice, measured_s)
        elif step.riding_s is not None:
            self._chooser.observe_mixed(step.choice, step.riding_s, measured_s)

    def _take_chunk(self, running: Running, chunk: PrefillChunk, bad_from: int | None) -> None:
        """Take what a chunk computed; rows from ``bad_from`` on are void and computed anew."""
        restored_from = running.computed
        end = chunk.start + len(chunk.token_ids)
        running.ends = running.ends[1:]
        running.computed = end if bad_from is None else bad_from
        running.sampling_rank = chunk.sampling_rank
        self.cache.accept(running.sequence_id, running.context[: running.computed])
        if bad_from is not None:
            self.cache.truncate(running.sequence_id, bad_from)
        if chunk.behind_restored and running.stored is not None:
            running.generation.take_restored(
                running.stored, min(chunk.start, running.computed) - restored_from
            )
            self._give_back(running)
            running.is_restoring = False

    def _store_blocks(self, running: Running) -> None:
        """Have those blocks stored that an answer has completed."""
        if self.offload is not None:
            self.offload.note(running, running.generation.context()[: running.computed])

    def _give_back(self, holder: Entry | Running) -> None:
        """Need what the KV stores have no more."""
        if self.offload is not None:
            self.offload.give_back(holder.stored)
        holder.stored = None

    def _stop(self, running: Running) -> None:
        """Let an answer run no more; what was accepted of it is kept for others."""
        self._store_blocks(running)
        self._give_back(running)
        # What was computed behind a stop is not part of the answer.
        self.cache.accept(running.sequence_id, running.generation.context()[: running.computed])
        self.cache.finish(running.sequence_id)
        del self._running[running.sequence_id]
        self._ended += (running.sequence_id,)

    def _admit(self) -> None:
        """Let those that wait begin, in order, as far as their prompts fit."""
        passed: list[Entry] = []
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            entry = self._waiting[0]
            context = entry.generation.context()
            match = self._admission.match(entry, context)
            waits = self._admission.waits_to_share(entry, context, match, self._running.values())
            if not waits:
                place = self._admission.place(entry, context, match, self._running.values())
                if place is None:
                    break
                if self.offload and self.offload.wants(entry, context, place.match.tokens):
                    self.offload.ask(entry, context, place.match.tokens, place.home)
                    self._looked_up.append(entry)
                else:
                    self._begin(entry, context, place)
            self._waiting.pop(0)
            if waits:
                passed.append(entry)
        for entry in passed:
            insort(self._waiting, entry)

    def _begin(self, entry: Entry, context: TokenIds, place: Place) -> None:
        generation = entry.generation
        sequence_id = next(self._later_ids) if entry.has_begun else generation.sequence_id
        self.cache.begin(sequence_id, generation.cache_salt, place.match, place.final_rows)
        if not entry.has_begun:
            generation.num_cached_tokens = min(place.match.tokens, len(generation.prompt))
        entry.has_begun = True
        entry.was_looked_up = False  # it is again where it has to make way
        running = Running(entry, sequence_id, context, place.home, place.match.tokens)
        self._take_stored(running)
        self._running[sequence_id] = running

    def _mixed_step(self, prefilling: list[Running], decoding: list[Running]) -> Step | None:
        """Return a step of chunks, with one decode step of each answer beside them."""
        rows, riders = self._decode_rows(decoding, 1)
        for running in prefilling:
            if running.stored is not None and not running.is_restoring:
                self._begin_restore(running, riders)
        prefilling = [running for running in prefilling if running.sequence_id in self._running]
        prefilling = self._ready(prefilling)
        chunks: list[PrefillChunk] = []
        begun: list[Running] = []
        counts = self._sizes.chunks(prefilling, riders, others_wait=bool(self._waiting))
        for running, count in zip(prefilling, counts, strict=True):
            if count and running.sequence_id in self._running:
                chunk = running.chunk(count, self._sizes.rows_before(running))
                # The rows of chunks beside a restore are grown before it.
                if running.ends or self._grow(running, chunk_spans(chunk), [*riders, *begun]):
                    chunks.append(chunk)
                    begun.append(running)
        if not chunks:
            # The rows are grown: they must be computed.
            return self._step((), (), rows, riders) if rows else None
        return self._step(chunks, begun, rows, riders)

    def _begin_restore(self, running: Running, placed: list[Running]) -> None:
        """Have what is stored of a prompt come back, while what lies before it is computed.

        A run's rows ascend, so those that are computed meanwhile are grown first: the
        chunks are cut here. The answer may have to make way; see `_grow`.
        """
        stored, position, ends = running.stored, running.computed, []
        assert stored is not None
        assert self.offload is not None
        others_are = len(self._running) > 1 or bool(self._waiting)
        while position < stored.start:
            rows = self.cache.rows(running.sequence_id, position)
            left = stored.start - position
            count = self._sizes.chunk(running, rows, left, others_are=others_are)
            if not self._grow(running, spans_to_come(position, count, rows, running.home), placed):
                return
            position += count
            ends.append(position)
        parts = self.offload.order(running.sequence_id, stored, running.computed)
        if self._grow(running, part_spans(parts, self.cache.num_ranks), placed):
            running.is_restoring, running.ends = True, tuple(ends)

    def _burst(self, decoding: list[Running]) -> Step | None:
        """Return a burst of decode steps of all answers, near the target in length."""
        rows, riders = self._decode_rows(decoding, self._sizes.burst(decoding))
        return self._step((), (), rows, riders) if rows else None

    def _decode_rows(
        self,
        decoding: list[Running],
        most_steps: int,
        ahead_of: Mapping[int, int] | None = None,
    ) -> tuple[list[DecodeRow], list[Running]]:
        """Return a row of each answer that finds room, and these answers.

        ``ahead_of`` are the steps of each that are under way; then nobody is preempted.
        """
        rows: list[DecodeRow] = []
        riders: list[Running] = []
        for running in decoding:
            ahead = (ahead_of or {}).get(running.sequence_id, 0)
            position = running.computed + ahead
            most = min(most_steps, running.generation.tokens_to_come - ahead)
            # Fewer steps are better than a preemption.
            for steps in sorted({most, 1})[::-1]:
                if running.sequence_id not in self._running:
                    break  # preempted by an older one
                owners, state = running.owners(
                    steps,
                    self.cache.rows(running.sequence_id, position),
                    self.limits.decode_block_tokens,
                )
                spans = owned_spans(position, owners, self.cache.num_ranks)
                may_preempt = steps == 1 and ahead_of is None
                if self._grow(running, spans, riders if may_preempt else None):
                    running.owner, running.decoded = state
                    rows.append(running.row(owners, ahead))
                    riders.append(running)
                    break
        return rows, riders

    def _grow(
        self,
        running: Running,
        spans: Sequence[Sequence[tuple[int, int]]],
        placed: list[Running] | None,
    ) -> bool:
        """Make room for new rows; the newest answers make way that are not ``placed`` yet.

        With ``placed`` None nobody makes way. Returns False where there is no room, or
        where the answer itself had to make way.
        """
        while True:
            try:
                self.cache.grow(running.sequence_id, spans)
            except MemoryError:
                if placed is None:
                    return False
                kept = {id(each) for each in placed}
                newest = max(
                    (each for each in self._running.values() if id(each) not in kept),
                    key=lambda each: each.entry,
                )
                self._preempt(newest)
                if newest is running:
                    return False
            else:
                return True

    def _preempt(self, running: Running) -> None:
        """Let an answer wait again; it goes on from its tokens, and from what is left of its KV."""
        # Alone and without room: its rows lie badly on the ranks, so they are computed anew.
        running.entry.shares = len(self._running) > 1
        self._stop(running)
        insort(self._waiting, running.entry)
        self.num_preemptions += 1

    def _step(
        self,
        chunks: Sequence[PrefillChunk],
        begun: Sequence[Running],
        rows: Sequence[DecodeRow],
        riders: Sequence[Running],
    ) -> Step:
        runs = [*begun, *riders]
        choice = None
        if chunks:
            choice = self._chooser.prefill(
                [
                    self._sizes.shape(run, len(chunk.token_ids))
                    for run, chunk in zip(begun, chunks, strict=True)
                ]
            )
        riding_s = self._chooser.riding(self._sizes.rows_of(riders)) if choice and riders else None
        plan = Plan(
            number=self.num_steps,
            cache_ops=self.cache.take_ops(),
            ended=self._take_ended(),
            chunks=tuple(chunks),
            rows=tuple(rows),
            algorithm="pass_kv" if choice is None else choice.algorithm,
            stores=() if self.offload is None else self.offload.take_stores(),
            restores=() if self.offload is None else self.offload.take_orders(self._running),
        )
        return Step(
            plan=plan,
            generations=tuple(run.generation for run in runs),
            new_tokens=sum(len(chunk.token_ids) for chunk in chunks)
            + sum(len(row.owners) for row in rows),
            cached_tokens=sum(run.start for run in runs),
            algorithm=_algorithm(plan, choice),
            predicted_s=self._predicted_s(choice, rows, riders, riding_s),
            choice=choice,
            riding_s=riding_s,
        )

    def _predicted_s(
        self,
        choice: Choice | None,
        rows: Sequence[DecodeRow],
        riders: Sequence[Running],
        riding_s: float | None,
    ) -> float | None:
        if choice is not None:
            if riding_s is None:
                return choice.predicted_s
            return self._chooser.mixed(choice, riding_s)
        if not rows:
            return None
        return self._chooser.decode(
            self._sizes.rows_of(riders), max(len(row.owners) for row in rows)
        )

    def _take_ended(self) -> tuple[int, ...]:
        ended, self._ended = self._ended, ()
        return ended


def _algorithm(plan: Plan, choice: Choice | None) -> str:
    """Say how a step goes round."""
    if choice is not None:
        return "whole" if choice.whole else choice.algorithm
    return "all_gather" if any(row.home is None for row in plan.rows) else "whole"
