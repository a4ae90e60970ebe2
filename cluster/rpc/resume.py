"""A request of a client from its first try to its last: what is asked, what came, what is left.

A server keeps nothing of a stream that broke. Prompt and received tokens are sent again,
with the seed of the first try: draws follow from the seed and a token's index, penalties
and stop texts from the tokens, so the answer goes on as if nothing had happened.
"""

import functools
import operator
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from actors.errors import QueueFull
from actors.messages import (
    CompletionOutput,
    FinishReason,
    Logprobs,
    PromptReport,
    Request,
    RequestDelta,
    RequestMetrics,
    RequestOutput,
)
from actors.records import Restored, StepRecord
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import CallError, ServerUnavailable, error_of, is_broken, retry_s
from cluster.rpc.reports import ReportReader
from cluster.rpc.upload import write_request
from cluster.rpc.wire import read_delta
from models.draw import answer_seed

MAX_TRIES = 8  # in a row that bring no token, about 11 s
RESUME_TRIES = 66  # the same of an answer that has begun, about 5 min: a model may be loading again
FIRST_PAUSE_S = 0.1  # doubled with each
LONGEST_PAUSE_S = 5.0
LEAST_DEADLINE_S = 0.001


@dataclass
class _Received:
    """One answer as far as it came."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ResumableRequest:
    """Decides; the calls themselves are made by `cluster.client`."""

    def __init__(self, request: Request, target: str) -> None:
        """Take a request; where it has no seed, one is drawn that holds for all tries."""
        if request.params.seed is None:
            params = replace(request.params, seed=secrets.randbits(63))
            request = replace(request, params=params)
        self.request = request
        self._target = target
        self._received = [_Received() for _ in range(request.params.n)]
        self._attempt = 0
        self._tries = 0  # in a row that brought nothing
        self._only: int | None = None  # the answer that this try is for; None: all of them
        self._start_s = time.perf_counter()
        self._first_s: float | None = None
        # What was told beside the answers, by all tries.
        self._reports = ReportReader(request.token_ids)
        self._prompt: PromptReport | None = None
        self._steps: list[StepRecord] = []
        self._restored: Restored | None = None
        self._cached_tokens: int | None = None
        self._queue_s = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all answers have ended."""
        return all(answer.finish_reason is not None for answer in self._received)

    def messages(self) -> list[pb.GenerateRequest]:
        """Return what the next try sends: for all answers, or for the first that is not complete.

        Raises:
            PromptError: The prompt cannot be sent.
            SamplingError: A sampling parameter cannot be sent.
        """
        asked = self.request
        self._only = None
        if any(answer.token_ids or answer.finish_reason for answer in self._received):
            self._only = next(
                index for index, each in enumerate(self._received) if each.finish_reason is None
            )
            seed = asked.params.seed
            assert seed is not None
            asked = replace(
                asked,
                params=replace(asked.params, n=1, seed=answer_seed(seed, self._only)),
                answer_ids=tuple(self._received[self._only].token_ids),
            )
        if self._prompt is not None:
            asked = replace(asked, params=replace(asked.params, prompt_logprobs=None))
        self._reports = ReportReader(asked.token_ids)
        if asked.deadline_s is not None and self._attempt:
            left_s = asked.deadline_s - (time.perf_counter() - self._start_s)
            asked = replace(asked, deadline_s=max(left_s, LEAST_DEADLINE_S))
        messages = write_request(asked, self._attempt)
        self._attempt += 1
        self._tries += 1
        return messages

    def take(self, response: pb.GenerateResponse) -> RequestDelta | None:
        """Take what the server told; return what of it is for the caller."""
        event = response.WhichOneof("event")
        if event in ("prompt_report", "step_report"):
            self._reports.take(response)
        if event != "delta":
            return None
        delta = read_delta(
            response.delta,
            self.request.request_id,
            with_logprobs=self.request.params.logprobs is not None,
        )
        delta = self._reports.add_to(delta)
        if self._only is not None:
            delta = replace(delta, index=self._only)
        delta = self._take_reports(delta)
        answer = self._received[delta.index]
        answer.token_ids += delta.token_ids
        answer.texts.append(delta.text)
        answer.logprobs += delta.logprobs or ()
        answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
        self._first_s = self._first_s or time.perf_counter()
        self._tries = 0
        return delta

    def _take_reports(self, delta: RequestDelta) -> RequestDelta:
        """Keep what a delta tells beside its answer; return it without what was told before."""
        if delta.index == 0 and self._cached_tokens is None:
            self._cached_tokens = delta.num_cached_tokens
        if delta.metrics is not None:
            self._queue_s = delta.metrics.queue_s
        if delta.report is not None:
            self._steps += delta.report.steps
            parts = [self._restored, delta.report.restored]
            restored = [part for part in parts if part is not None]
            self._restored = functools.reduce(operator.add, restored) if restored else None
        if delta.prompt is not None and self._prompt is not None:
            return replace(delta, prompt=None)
        self._prompt = self._prompt or delta.prompt
        return delta

    def pause_s(self, error: CallError | None) -> float:
        """Return how long to wait before the next try, after a call that ended early.

        ``error`` is None where the call ended without one.

        Raises:
            RingspanError: No further try may help: what the server said.
        """
        if error is None:
            if self._tries < self._most_tries:
                return 0.0
            raise ServerUnavailable(f"the server at {self._target} ends streams before their time")
        named = error_of(error, self._target)
        # A queue that is full has no place for a new request, but one under way may wait for it.
        may_wait = isinstance(named, QueueFull) and self._attempt > 1
        if self._tries >= self._most_tries or not (is_broken(error) or may_wait):
            raise named from None
        pause_s = FIRST_PAUSE_S * 2 ** max(0, self._tries - 1)
        return min(LONGEST_PAUSE_S, max(pause_s, retry_s(error) or 0.0))

    @property
    def _most_tries(self) -> int:
        return MAX_TRIES if self._first_s is None else RESUME_TRIES

    def output(self) -> RequestOutput:
        """Return the complete answers.

        Times to the first token and to the end are the client's own. Steps and restores are those
        of tries that came to an end.
        """
        now_s = time.perf_counter()
        asked, prompt = self.request, self._prompt
        return RequestOutput(
            request_id=asked.request_id,
            prompt=asked.text,
            prompt_token_ids=() if prompt is None else tuple(prompt.token_ids.tolist()),
            outputs=tuple(self._completions()),
            num_cached_tokens=self._cached_tokens or 0,
            metrics=RequestMetrics(
                queue_s=self._queue_s,
                ttft_s=(self._first_s or now_s) - self._start_s,
                total_s=now_s - self._start_s,
            ),
            steps=tuple(self._steps),
            prompt_logprobs=None if prompt is None else prompt.logprobs,
            restored=self._restored,
        )

    def _completions(self) -> Iterator[CompletionOutput]:
        asks_logprobs = self.request.params.logprobs is not None
        for index, answer in enumerate(self._received):
            assert answer.finish_reason is not None
            own = [next(iter(place.values())).logprob for place in answer.logprobs]
            yield CompletionOutput(
                index=index,
                text="".join(answer.texts),
                token_ids=tuple(answer.token_ids),
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
                logprobs=tuple(answer.logprobs) if asks_logprobs else None,
                cumulative_logprob=sum(own) if asks_logprobs else None,
            )
