"""Requests under way: handed to the scheduler, driven step by step, told, and ended.

Lives in the coordinator's event loop. What is decided is in `actors.scheduler`.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.answer import Answer, step_record
from actors.choice import Chooser
from actors.counts import Counts
from actors.errors import UnknownRequest
from actors.kv.finder import StoreFinder
from actors.kv.messages import RestoreChoice
from actors.messages import (
    FinishReason,
    PrefillChunk,
    Progress,
    Request,
    RequestDelta,
    RequestOutput,
    SequenceResult,
    StepResult,
)
from actors.offload import Lookup
from actors.ranks import Ranks
from actors.records import StepRecord
from actors.requests import OpenRequest, RequestReader
from actors.restore import RestorePlanner
from actors.scheduler import Scheduler, Step
from actors.trace import Tracer
from models.errors import PromptError

RECENT_S = 10.0  # over which rates of work are told
POLL_S = 0.01  # between two looks at what comes back, while nothing else is to be done
# A burst is followed by the next without a pause: it is handed out so long before the end of the
# one under way, of whose predicted time this share is believed.
LEAD_S = 0.015
BELIEVED = 0.8


@dataclass(frozen=True)
class StoreSide:
    """Who finds what the KV stores have, and who says how it comes back."""

    finder: StoreFinder
    planner: RestorePlanner


@dataclass(frozen=True)
class _Call:
    """A step that the ranks execute, or will next."""

    step: Step
    about: list[tuple[OpenRequest, Answer]]
    plan_s: float
    start_s: float
    results: asyncio.Task[list[StepResult]]


class Engine:
    """All requests of one cluster."""

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Scheduler,
        chooser: Chooser,
        reader: RequestReader,
        tracer: Tracer,
        stores: StoreSide | None = None,
    ) -> None:
        """Take what reads requests, what plans steps, and what executes them; then `run`."""
        self.scheduler = scheduler
        self._ranks = ranks
        self._chooser = chooser
        self._reader = reader
        self._tracer = tracer
        self._stores = stores
        self._store_calls: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()  # set where the scheduler may have something to do
        self._requests: dict[str, OpenRequest] = {}
        self._answers: dict[int, tuple[OpenRequest, Answer]] = {}  # by sequence, not complete
        self._under_way: Step | None = None
        self._failure: Exception | None = None  # that ended `run`
        self._recent: deque[tuple[float, StepRecord]] = deque()  # with the moment of its end
        self._counts = Counts()

    @property
    def failure(self) -> Exception | None:
        """What ended the steps of this cluster, or None."""
        return self._ranks.failure or self._failure

    async def generate(self, request: Request) -> RequestOutput:
        """Answer a request, beside others."""
        opened = await self._open(request)
        await asyncio.gather(*(answer.done for answer in opened.answers))
        # In a thread: a long prompt's log-probabilities are millions of objects, and heartbeats
        # must not wait for them.
        return await asyncio.to_thread(self._reader.output, opened)

    async def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """Answer a request, piece by piece as its tokens come."""
        opened = await self._open(request)
        opened.is_streamed = True
        to_end = len(opened.answers)
        try:
            while to_end:
                news = await opened.news.get()
                if isinstance(news, Exception):
                    raise news
                to_end -= news.finish_reason is not None
                if request.reports:
                    # In a thread, as of `generate`.
                    news = await asyncio.to_thread(self._reader.with_reports, opened, news)
                yield news
        finally:
            # Ray ends this call with the task that made it, before anybody there can cancel.
            if to_end and self._requests.get(request.request_id) is opened:
                self.cancel(request.request_id)

    def cancel(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request with what it has.

        Raises:
            UnknownRequest: It is not waiting or running.
        """
        opened = self._requests.get(request_id)
        if opened is None:
            raise _unknown(request_id)
        for answer in opened.answers:
            if self.scheduler.cancel(answer.generation, reason):
                self._complete(answer)
        self._work.set()

    async def progress(self, request_id: str | None = None) -> list[Progress]:
        """Return how far the prefill of a request has come, or of all that are not decoding yet.

        Raises:
            UnknownRequest: It is not waiting or running.
        """
        if request_id is not None and request_id not in self._requests:
            raise _unknown(request_id)
        share = 0.0
        if self._under_way is not None and self._under_way.plan.chunks:
            share = await self._ranks.ask(0, "progress")
        told = [
            self._progress(opened, share)
            for opened in self._requests.values()
            if opened.request.request_id == request_id
            or (request_id is None and not opened.answers[0].generation.made_tokens)
        ]
        if request_id is not None and not told:  # it ended while rank 0 was asked
            raise _unknown(request_id)
        return told

    def status(self) -> dict[str, Any]:
        """Return counts and recent rates, for people and programs."""
        scheduler = self.scheduler
        now_s = time.perf_counter()
        self._forget_old(now_s)
        span_s = max(1e-3, now_s - self._recent[0][0]) if self._recent else RECENT_S
        records = [record for _, record in self._recent]
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "requests": len(self._requests),
            "steps": scheduler.num_steps,
            "preemptions": scheduler.num_preemptions,
            "kept_sequences": scheduler.cache.num_kept,
            "kept_tokens": scheduler.cache.kept_tokens,
            "pages": scheduler.cache.page_counts(),
            "step_target_s": scheduler.limits.step_target_s,
            "prefill_tokens_per_s": sum(r.prefill_tokens for r in records) / span_s,
            "decode_tokens_per_s": sum(r.decode_tokens for r in records) / span_s,
            "restore": None if self._stores is None else self._stores.planner.status(),
            "counts": self._counts.told(),
            "heartbeat_ages_s": self._ranks.heartbeat_ages_s(),
        }

    async def run(self) -> None:
        """Execute step after step while there is something to do, until a step fails."""
        while True:
            await self._work.wait()
            try:
                start_s = time.perf_counter()
                step = self.scheduler.next_step()
                self._call_stores()
                if step is None and self.scheduler.awaits_rows:
                    await asyncio.sleep(POLL_S)
                    shares = await self._ranks.call("restoring", timeout_s=None)
                    self.scheduler.note_restoring(shares)
                    continue
                if step is None:
                    self._work.clear()
                    continue
                await self._execute(step, time.perf_counter() - start_s)
            except Exception as error:  # whoever waits is told, and who comes later too
                self._failure = error
                for opened in self._requests.values():
                    opened.fail(error)
                return

    async def _open(self, request: Request) -> OpenRequest:
        arrival_s = time.perf_counter()
        request = await self._reader.with_tokens(request)
        if self.failure is not None:
            raise self.failure
        if request.request_id in self._requests:
            raise PromptError(
                f"request_id {request.request_id!r} is under way: give each request its own"
            )
        opened = self._reader.read(request, arrival_s)
        begun: list[Answer] = []
        try:
            for answer in opened.answers:
                self.scheduler.add(answer.generation)
                begun.append(answer)
        except Exception:
            for answer in begun:
                self.scheduler.cancel(answer.generation)
            raise
        self._requests[request.request_id] = opened
        for answer in opened.answers:
            self._answers[answer.generation.sequence_id] = opened, answer
        if request.deadline_s is not None:
            left_s = arrival_s + request.deadline_s - time.perf_counter()
            asyncio.get_running_loop().call_later(left_s, self._expire, opened)
        self._work.set()
        return opened

    def _expire(self, opened: OpenRequest) -> None:
        if self._requests.get(opened.request.request_id) is opened:
            self.cancel(opened.request.request_id, "deadline")

    def _call_stores(self) -> None:
        """Have prompts looked up in the KV stores, and leases returned, beside the steps."""
        stores, offload = self._stores, self.scheduler.offload
        if stores is None or offload is None:
            return
        calls = [self._look_up(stores, lookup) for lookup in offload.take_lookups()]
        calls += [stores.finder.release(stored) for stored in offload.take_returned()]
        for call in calls:
            task = asyncio.create_task(call)
            self._store_calls.add(task)
            task.add_done_callback(self._store_calls.discard)

    async def _look_up(self, stores: StoreSide, lookup: Lookup) -> None:
        stored = None
        try:
            found = await stores.finder.find(lookup)
            choice = None
            if found is not None:
                # In a thread: a plan takes milliseconds, and steps are handed out meanwhile.
                choice = await asyncio.to_thread(stores.planner.choose, found)
                self._counts.add_decision(_decision(choice, lookup))
            if found is not None and choice is not None:
                if found.is_far and choice.recompute_to > lookup.start:
                    self.scheduler.begin_ahead(lookup, choice.recompute_to)
                    self._work.set()
                stored = await stores.finder.stage(found, choice)
        finally:
            self.scheduler.found(lookup, stored)
            self._work.set()

    async def _execute(self, step: Step, plan_s: float) -> None:
        """Execute a step, and the bursts that follow it without a pause."""
        call: _Call | None = self._hand_out(step, plan_s)
        begun_s = 0.0
        while call is not None:
            self._under_way = call.step
            following = None
            try:
                following = await self._follow(call)
                # No limit on a step as a whole: a dead or silent rank ends it by its heartbeat.
                results = await call.results
            except BaseException:
                call.results.cancel()
                if following is not None:
                    following.results.cancel()
                raise
            self._under_way = None
            begun_s = max(begun_s, call.start_s)
            begun_s, call = self._take(call, results, begun_s), following

    async def _follow(self, call: _Call) -> _Call | None:
        """Hand out the burst that follows a step, shortly before it ends, if there is one."""
        if call.step.plan.chunks or call.step.predicted_s is None:
            return None
        left_s = BELIEVED * call.step.predicted_s - LEAD_S
        await asyncio.wait({call.results}, timeout=max(0.0, left_s))
        if call.results.done():
            return None
        start_s = time.perf_counter()
        step = self.scheduler.following_burst(call.step)
        return None if step is None else self._hand_out(step, time.perf_counter() - start_s)

    def _hand_out(self, step: Step, plan_s: float) -> _Call:
        """Send a step's plan to all ranks."""
        start_s = time.perf_counter()
        about = [self._answers[each.sequence_id] for each in step.generations]
        for _, answer in about:
            answer.begin_s = answer.begin_s or start_s
        # Prompts are put into the object store once, not once for every rank.
        sent = ray.put(step.plan) if step.plan.chunks else step.plan
        results = asyncio.create_task(self._ranks.call("execute", sent, timeout_s=None))
        return _Call(step, about, plan_s, start_s, results)

    def _take(self, call: _Call, results: list[StepResult], begun_s: float) -> float:
        """Take the results of a step that began when the one before it had ended; return when."""
        step = call.step
        self.scheduler.advance(step, results)
        end_s = time.perf_counter()
        record = step_record(step, results, plan_s=call.plan_s, wall_s=end_s - begun_s)
        if call.about:  # else it only had blocks stored
            self._recent.append((end_s, record))
            self._forget_old(end_s)
            self._counts.add_step(record)
            self._tracer.add(begun_s, record, results)
        for index, (opened, answer) in enumerate(call.about):
            if answer.done.done():
                continue  # cancelled meanwhile
            part = step.plan.parts[index]
            sequences = [result.sequences[index] for result in results]
            answer.take(record, part, sequences)
            if isinstance(part, PrefillChunk) and part.behind_restored:
                self._take_restored(answer, sequences)
            if answer.generation.finish_reason is not None:
                self._complete(answer)
            else:
                opened.tell(answer)
        return end_s

    def _take_restored(self, answer: Answer, results: Sequence[SequenceResult]) -> None:
        """Learn from what came back before a chunk, and have it in the trace."""
        stored, _ = answer.generation.restored[-1]
        self._tracer.add_restore(stored.begin_s, answer.restored[-1])
        self._counts.add_restored(answer.restored[-1])
        if self._stores is not None and all(each.bad_from is None for each in results):
            self._stores.planner.observe(stored, [each.restore for each in results])
            self._stores.planner.note(answer.restored[-1])

    def _complete(self, answer: Answer) -> None:
        opened, _ = self._answers.pop(answer.generation.sequence_id)
        opened.tell(answer)
        answer.complete()
        generation = answer.generation
        if generation.made_tokens:
            self._counts.add_answer(
                len(generation.prompt), generation.num_cached_tokens, answer.restored
            )
        if all(each.done.done() for each in opened.answers):
            del self._requests[opened.request.request_id]

    def _progress(self, opened: OpenRequest, share: float) -> Progress:
        """Say how far a prompt is; ``share`` is that of the step under way."""
        answer = opened.answers[0]
        generation = answer.generation
        done, total = self.scheduler.progress(generation)
        step = self._under_way
        if step is not None and generation in step.generations[: len(step.plan.chunks)]:
            chunk = step.plan.chunks[step.generations.index(generation)]
            done = min(total, done + int(share * len(chunk.token_ids)))
        opened.furthest = done = max(opened.furthest, done)
        elapsed_s = time.perf_counter() - answer.begin_s if answer.begin_s else 0.0
        reused = generation.num_cached_tokens if answer.begin_s else 0
        work = functools.partial(self._chooser.prefill_work, reused)
        left_s = None
        if elapsed_s and work(done):
            left_s = elapsed_s * (work(total) - work(done)) / work(done)
        return Progress(
            request_id=opened.request.request_id,
            total_tokens=total,
            done_tokens=done,
            cached_tokens=reused,
            elapsed_s=elapsed_s,
            tokens_per_s=(done - reused) / elapsed_s if elapsed_s else 0.0,
            left_s=left_s,
        )

    def _forget_old(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()


def _decision(choice: RestoreChoice | None, lookup: Lookup) -> str:
    if choice is None:
        return "recompute"
    return "split" if choice.recompute_to > lookup.start else "load"


def _unknown(request_id: str) -> UnknownRequest:
    return UnknownRequest(f"no request {request_id!r} waits or runs: it has ended, or never was")
