"""Server-sent events: pieces of answers as they come, and signs of life between them."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.messages import RequestDelta
from cluster.http.answers import Answers, Piece
from cluster.http.bodies import AnswerMetrics, PromptProgress, Usage
from cluster.http.errors import as_api_error
from cluster.http.settings import Settings

KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients skip it
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")


class Chunks(Protocol):
    """Makes chunks of one kind of answer."""

    def first(self) -> Iterable[BaseModel]:
        """Return what is told before anything is known."""
        ...

    def piece(self, piece: Piece) -> BaseModel | None:
        """Return a piece's chunk, or None where it has nothing to tell yet."""
        ...

    def progress(self, progress: PromptProgress) -> BaseModel:
        """Return a chunk without answers that tells how far the prefill is."""
        ...

    def usage(self, usage: Usage | None, metrics: AnswerMetrics | None) -> BaseModel:
        """Return the chunk behind all answers."""
        ...


async def events(
    answers: Answers,
    chunks: Chunks,
    settings: Settings,
    *,
    include_usage: bool,
    include_metrics: bool,
    return_progress: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; an error on the way is told as its last one."""
    begin_s = sent_s = time.perf_counter()
    shown: PromptProgress | None = None
    prefills = return_progress
    try:
        for chunk in chunks.first():
            yield _data(chunk)
        while not answers.ended:
            piece = await answers.next(settings.progress_s if prefills else settings.keep_alive_s)
            now_s = time.perf_counter()
            new: list[bytes] = []
            if prefills:
                told = await _progress(answers, piece, now_s - begin_s)
                if told is not None and (shown is None or told.processed > shown.processed):
                    new.append(_data(chunks.progress(told)))
                    shown = told
                prefills = piece is None
            if piece is not None:
                chunk_of_piece = chunks.piece(piece)
                new += [] if chunk_of_piece is None else [_data(chunk_of_piece)]
            if not new and now_s - sent_s >= settings.keep_alive_s:
                new.append(KEEP_ALIVE)
            for event in new:
                yield event
                sent_s = now_s
        if include_usage or include_metrics:
            usage = answers.usage if include_usage else None
            yield _data(chunks.usage(usage, answers.metrics if include_metrics else None))
    except Exception as error:
        yield b"data: %s\n\n" % _encode(as_api_error(error, settings.retry_after_s).body())
    finally:
        await answers.close()
    yield DONE


async def _progress(
    answers: Answers, piece: Piece | None, elapsed_s: float
) -> PromptProgress | None:
    """Return how far the first prompt is; with its first piece it is done."""
    time_ms = int(elapsed_s * 1e3)
    if piece is not None:
        delta: RequestDelta = piece.delta
        return PromptProgress(
            total=delta.prompt_tokens,
            cache=delta.num_cached_tokens,
            processed=delta.prompt_tokens,
            time_ms=time_ms,
        )
    told = await answers.progress()
    if told is None:
        return None
    return PromptProgress(
        total=told.total_tokens,
        cache=told.cached_tokens,
        processed=told.done_tokens,
        time_ms=time_ms,
    )


def _data(chunk: BaseModel) -> bytes:
    return b"data: %s\n\n" % _encode(chunk.model_dump(exclude_none=False))


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


class EventStream(Response):
    """Sends events until they end or the client goes; then they are closed at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: AsyncGenerator[bytes, None],
        send_timeout_s: float,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        """Take the events, and what is to be called behind them, also where none was sent.

        A client that does not take an event within ``send_timeout_s`` is gone.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._send_timeout_s = send_timeout_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; return when all is sent or nobody listens."""
        try:
            await unless_gone(self._send(send), receive)
        finally:
            await self._stream.aclose()
            await self._close()

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        with contextlib.suppress(TimeoutError):
            async for event in self._stream:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result | None:
    """Return what ``work`` does, or None, with it cancelled, as soon as the client goes."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
