"""The calls of ``ringspan.v1.Inference``: who may, what is under way, and what becomes of it.

A call's errors are raised here by name; `cluster.rpc.server` makes statuses of them.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import grpc

from actors.errors import ClusterError, QueueFull, UnknownRequest
from actors.messages import Progress, Request, RequestDelta
from cluster.api_keys import ApiKeys, cache_salt
from cluster.backend import Backend
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import LimitExceeded, ServerUnavailable
from cluster.rpc.limits import RpcLimits
from cluster.rpc.reports import write_reports
from cluster.rpc.upload import RequestReader
from cluster.rpc.wire import write_delta, write_progress
from models.errors import PromptError, RingspanError

FREE_TRIES = 20  # a cancel may overtake the request that it is for
FREE_PAUSE_S = 0.1

Context: TypeAlias = grpc.aio.ServicerContext
Message = TypeVar("Message")


@dataclass(eq=False)
class _Stream:
    """A request under way. The backend knows it under an id of ours: clients' may collide."""

    tenant: str
    client_id: str
    backend_id: str
    has_begun: bool = False  # the backend has told something of it, be it an error
    dropped: RingspanError | None = None  # its client is told this instead of the rest


class InferenceService:
    """Answers calls from a backend; keeps of a request no more than that it is under way."""

    def __init__(self, backend: Backend, keys: ApiKeys, limits: RpcLimits) -> None:
        """Begin with no request."""
        self.is_draining = False
        self._backend = backend
        self._keys = keys
        self._limits = limits
        self._calls = 0  # of Generate
        self._streams: dict[tuple[str, str], _Stream] = {}  # by tenant and client's id
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._cancels: set[asyncio.Task[None]] = set()

    async def generate(
        self, messages: AsyncIterator[pb.GenerateRequest | None], context: Context
    ) -> None:
        """Answer one prompt. Where the caller goes away this task is cancelled, wherever it is."""
        tenant = self._tenant(context)
        self._check_capacity()
        self._calls += 1
        self._all_ended.clear()
        try:
            asked, attempt = await self._read(messages)
            stream = self._begin(tenant, asked.request_id, attempt)
            request = replace(
                asked,
                request_id=stream.backend_id,
                cache_salt=cache_salt(tenant, asked.cache_salt),
            )
            try:
                await self._answer(stream, request, context)
            finally:
                if self._streams.get((tenant, stream.client_id)) is stream:
                    del self._streams[tenant, stream.client_id]
        finally:
            self._calls -= 1
            if not self._calls:
                self._all_ended.set()

    async def cancel(self, message: pb.CancelRequest | None, context: Context) -> pb.CancelResponse:
        """End a request with what it has."""
        tenant = self._tenant(context)
        stream = self._find(tenant, _checked(message).request_id)
        await self._backend.cancel(stream.backend_id)
        return pb.CancelResponse()

    async def progress(
        self, message: pb.ProgressRequest | None, context: Context
    ) -> pb.ProgressResponse:
        """Tell how far prefills have come, of the caller's own requests."""
        tenant = self._tenant(context)
        asked = _checked(message).request_id
        told: list[Progress]
        if asked:
            told = await self._backend.progress(self._find(tenant, asked).backend_id)
        else:
            told = await self._backend.progress(None)
        own = {
            stream.backend_id: stream.client_id
            for stream in self._streams.values()
            if stream.tenant == tenant
        }
        return pb.ProgressResponse(
            requests=[
                write_progress(progress, own[progress.request_id])
                for progress in told
                if progress.request_id in own
            ]
        )

    async def status(self, message: pb.StatusRequest | None, context: Context) -> pb.StatusResponse:
        """Tell what the cluster is and does."""
        self._tenant(context)
        _checked(message)
        status: dict[str, Any] = await self._backend.status()
        return pb.StatusResponse(json=json.dumps(status, default=str))

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, wait for those under way, and tell the rest that it is over."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended.wait(), grace_s)
        for stream in list(self._streams.values()):
            self._drop(stream, ServerUnavailable("the server stops: take the answer up elsewhere"))

    def _tenant(self, context: Context) -> str:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                return self._keys.tenant(value if isinstance(value, str) else None)
        return self._keys.tenant(None)

    def _check_capacity(self) -> None:
        if self.is_draining:
            raise ServerUnavailable("the server is about to stop")
        if self._calls >= self._limits.max_streams:
            raise QueueFull(f"this server answers {self._limits.max_streams} requests at a time")

    async def _read(
        self, messages: AsyncIterator[pb.GenerateRequest | None]
    ) -> tuple[Request, int]:
        reader = RequestReader(self._limits)
        upload = aiter(messages)
        limit_s = self._limits.upload_timeout_s
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    message = await anext(upload)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise LimitExceeded(f"no piece of the prompt came for {limit_s:g} s") from None
            reader.take(_checked(message))
        return reader.finish()

    def _begin(self, tenant: str, client_id: str, attempt: int) -> _Stream:
        earlier = self._streams.get((tenant, client_id))
        if earlier is not None:
            if not attempt:
                raise PromptError(
                    f"request_id {client_id!r} is under way: give each request its own"
                )
            # Its connection broke, which we may learn later than its client does.
            self._drop(earlier, ServerUnavailable("another try has taken over"))
        stream = _Stream(tenant, client_id, f"rpc-{secrets.token_hex(8)}")
        self._streams[tenant, client_id] = stream
        return stream

    async def _answer(self, stream: _Stream, request: Request, context: Context) -> None:
        """Tell deltas until the answers are complete; whoever stops to listen ends the request."""
        begin_s = time.perf_counter()
        first_s = None
        tokens = 0
        to_end = request.params.n
        deltas = self._backend.stream(request)
        try:
            started = pb.Started(request_id=stream.client_id)
            await context.write(pb.GenerateResponse(started=started))
            while to_end:
                delta = await self._next(stream, deltas)
                first_s = first_s or time.perf_counter()
                tokens += len(delta.token_ids)
                to_end -= delta.finish_reason is not None
                for report in write_reports(delta, with_ids=request.token_ids is None):
                    await context.write(report)
                await context.write(pb.GenerateResponse(delta=write_delta(delta)))
        finally:
            if to_end:
                self._cancel_later(stream)
        end_s = time.perf_counter()
        done = pb.Done(
            prompt_tokens=None if request.token_ids is None else len(request.token_ids),
            completion_tokens=tokens,
            ttft_s=(first_s or end_s) - begin_s,
            total_s=end_s - begin_s,
        )
        await context.write(pb.GenerateResponse(done=done))

    async def _next(self, stream: _Stream, deltas: AsyncIterator[RequestDelta]) -> RequestDelta:
        try:
            delta = await anext(deltas)
        except StopAsyncIteration:
            raise ClusterError("an answer ended without a finish reason") from None
        except Exception:
            stream.has_begun = True
            raise
        stream.has_begun = True
        if stream.dropped is not None:
            raise stream.dropped
        return delta

    def _find(self, tenant: str, client_id: str) -> _Stream:
        stream = self._streams.get((tenant, client_id))
        if stream is None:
            raise UnknownRequest(
                f"no request {client_id!r} waits or runs: it has ended, or never was"
            )
        return stream

    def _drop(self, stream: _Stream, reason: RingspanError) -> None:
        stream.dropped = reason
        self._cancel_later(stream)

    def _cancel_later(self, stream: _Stream) -> None:
        """Cancel in a task of its own: the call that this is for may be cancelled itself."""
        task = asyncio.create_task(self._free(stream))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _free(self, stream: _Stream) -> None:
        for _ in range(1 if stream.has_begun else FREE_TRIES):
            try:
                await self._backend.cancel(stream.backend_id)
                return
            except UnknownRequest:
                await asyncio.sleep(FREE_PAUSE_S)
            except RingspanError:
                return  # there is no cluster left that works on it


def _checked(message: Message | None) -> Message:
    """Refuse what is no message of its kind: `cluster.rpc.server` makes None of it."""
    if message is None:
        raise PromptError("this is no message of ringspan.v1")
    return message
