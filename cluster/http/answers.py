"""The answers to one HTTP request, as the deltas of its prompts' requests come in."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from actors.errors import UnknownRequest
from actors.messages import (
    Logprobs,
    Progress,
    PromptReport,
    Request,
    RequestDelta,
    RequestMetrics,
)
from cluster.backend import Backend
from cluster.http.bodies import AnswerMetrics, CachedTokens, Usage
from cluster.http.errors import ApiError, as_api_error
from cluster.http.limits import Gate
from models.errors import RingspanError

CANCEL_TRIES = 50
CANCEL_PAUSE_S = 0.1


@dataclass(frozen=True)
class Piece:
    """What is new of one answer, of all prompts' answers in a row."""

    choice: int
    delta: RequestDelta


@dataclass
class Whole:
    """One answer, put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: str = ""
    stop_reason: int | str | None = None
    prompt: PromptReport | None = None  # where it was asked for

    def take(self, delta: RequestDelta) -> None:
        """Add a piece."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason


class Answers:
    """Streams of one or more requests as one. `close` cancels what has not ended."""

    def __init__(self, backend: Backend, requests: Sequence[Request], gate: Gate) -> None:
        """Begin all requests at once.

        Raises:
            ApiError: The server ends, or too many are under way.
        """
        self._backend = backend
        self._requests = requests
        self._gate = gate
        self._news: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._peeked: Piece | ApiError | None = None
        self._prompts: dict[int, tuple[int, int]] = {}  # by request: tokens, and cached ones
        self._reports: dict[int, PromptReport] = {}  # by request
        self._times: list[RequestMetrics] = []  # of the requests that have ended
        self._completion_tokens = 0
        self._to_end = sum(request.params.n for request in requests)
        self._stack = contextlib.ExitStack()
        # The first was let in with its HTTP request.
        self._stack.enter_context(gate.admit(len(requests) - 1))
        self._stack.enter_context(gate.listen(self._news.put_nowait))
        self._tasks = [
            asyncio.create_task(self._pump(index, request))
            for index, request in enumerate(requests)
        ]

    @property
    def ended(self) -> bool:
        """Whether all answers are complete."""
        return not self._to_end

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=CachedTokens(
                cached_tokens=sum(cached for _, cached in self._prompts.values())
            ),
        )

    @property
    def metrics(self) -> AnswerMetrics | None:
        """The times so far, or None where no request has ended."""
        if not self._times:
            return None
        first_s = min(each.ttft_s for each in self._times)
        generation_s = max(0.0, max(each.total_s for each in self._times) - first_s)
        answers = sum(request.params.n for request in self._requests)
        gaps = self._completion_tokens - answers
        return AnswerMetrics(
            time_to_first_token_ms=first_s * 1e3,
            queue_time_ms=min(each.queue_s for each in self._times) * 1e3,
            generation_time_ms=generation_s * 1e3,
            mean_itl_ms=generation_s * answers / gaps * 1e3 if gaps > 0 else None,
            tokens_per_second=self._completion_tokens / generation_s if generation_s else None,
        )

    async def cancel(self) -> None:
        """End what has not ended, with what it has; whoever reads is told so."""
        for _ in range(CANCEL_TRIES):
            was_there = False
            for request in self._requests:
                with contextlib.suppress(UnknownRequest):
                    await self._backend.cancel(request.request_id)
                    was_there = True
            if was_there or self.ended:
                return
            await asyncio.sleep(CANCEL_PAUSE_S)  # they are still on their way to the cluster

    async def begin(self, wait_s: float) -> bool:
        """Wait a moment for the first news, and raise it where it is an error; True, when done."""
        self._peeked = await self._next(wait_s)
        if isinstance(self._peeked, ApiError):
            raise self._peeked
        return True

    async def next(self, timeout_s: float | None = None) -> Piece | None:
        """Return what is new, or None where nothing is within ``timeout_s``.

        Raises:
            ApiError: A request failed, or the server ends.
        """
        news, self._peeked = self._peeked, None
        if news is None:
            news = await self._next(timeout_s)
        if news is None:
            return None
        if isinstance(news, ApiError):
            raise news
        delta = news.delta
        request = news.choice // self._requests[0].params.n
        if delta.index == 0 or request not in self._prompts:
            self._prompts[request] = delta.prompt_tokens, delta.num_cached_tokens
        self._completion_tokens += len(delta.token_ids)
        self._to_end -= delta.finish_reason is not None
        if delta.metrics is not None:
            self._times.append(delta.metrics)
        if delta.prompt is not None:
            self._reports[request] = delta.prompt
        return news

    async def collect(self) -> list[Whole]:
        """Return all answers, each whole."""
        wholes = [Whole() for _ in range(self._to_end)]
        while not self.ended:
            piece = await self.next()
            if piece is not None:
                wholes[piece.choice].take(piece.delta)
        for choice, whole in enumerate(wholes):
            whole.prompt = self._reports.get(choice // self._requests[0].params.n)
        return wholes

    async def progress(self) -> Progress | None:
        """Return how far the first prompt is, or None where nobody knows."""
        with contextlib.suppress(RingspanError):
            return (await self._backend.progress(self._requests[0].request_id))[0]
        return None

    async def close(self) -> None:
        """Cancel what has not ended. Twice is no error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._stack.close()

    async def _next(self, timeout_s: float | None) -> Piece | ApiError | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._news.get()
        except TimeoutError:
            return None

    async def _pump(self, index: int, request: Request) -> None:
        """Bring the news of one request."""
        first = index * request.params.n
        stream: AsyncIterator[RequestDelta] | None = None
        try:
            stream = self._backend.stream(request)
            async for delta in stream:
                self._news.put_nowait(Piece(first + delta.index, delta))
        except Exception as error:
            self._news.put_nowait(as_api_error(error, self._gate.retry_after_s))
        finally:
            # Closing the stream early is what cancels the request.
            if stream is not None and hasattr(stream, "aclose"):
                await stream.aclose()
