"""A backend that answers by arithmetic, and a gRPC server around it in a thread of its own."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from actors.errors import UnknownRequest
from actors.messages import FinishReason, Progress, Request, RequestDelta
from actors.texts import Text, Tokens
from cluster.backend import ModelFacts
from cluster.rpc.limits import RpcLimits
from cluster.rpc.server import RpcServer
from cluster.tls import ServerTls
from models.draw import answer_seed

WAIT_S = 30.0  # for what comes at once
MOST_TOKENS = 32  # of an answer, whatever is asked for
Result = TypeVar("Result")


def next_token(request: Request, seed: int, token_ids: list[int]) -> int:
    """A token that follows from prompt, seed and the answer so far, as a model's would."""
    prompt = request.text or request.messages
    if request.token_ids is not None:
        prompt = request.token_ids.tobytes().hex()
    digest = hashlib.blake2b(repr((prompt, seed, token_ids)).encode(), digest_size=2)
    return int.from_bytes(digest.digest(), "little") % 500


class FakeBackend:
    """Answers with one token a delta.

    As in a cluster a request runs until its end or a `cancel`, whether anybody listens or not.
    """

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.running: dict[str, Request] = {}
        self.error: Exception | None = None  # raised instead of an answer
        self.facts = ModelFacts(max_model_len=10**7, has_tokenizer=True)
        self.failure: str | None = None
        self.hold_at: int | None = None  # answers wait before this token until they are cancelled
        self._cancelled: dict[str, asyncio.Event] = {}

    async def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        request_id, params = request.request_id, request.params
        self.running[request_id] = request
        cancelled = self._cancelled[request_id] = asyncio.Event()
        most = min(params.max_tokens, MOST_TOKENS)
        for index in range(params.n):
            seed = answer_seed(params.seed or 0, index)
            tokens = list(request.answer_ids)
            reason: FinishReason | None = None
            while reason is None:
                await asyncio.sleep(0)
                if len(tokens) == self.hold_at:
                    await cancelled.wait()
                new: tuple[int, ...] = ()
                if cancelled.is_set():
                    reason = "abort"
                else:
                    new = (next_token(request, seed, tokens),)
                    tokens += new
                    reason = "length" if len(tokens) >= most else None
                if index == params.n - 1 and reason:
                    self.running.pop(request_id, None)
                yield RequestDelta(
                    request_id=request_id,
                    index=index,
                    text="".join(f"{token_id}," for token_id in new),
                    token_ids=new,
                    finish_reason=reason,
                )

    async def cancel(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is None:
            raise UnknownRequest(f"no request {request_id!r}")
        self._cancelled[request_id].set()

    async def progress(self, request_id: str | None) -> list[Progress]:
        return [
            Progress(
                request_id=each,
                total_tokens=100,
                done_tokens=40,
                cached_tokens=0,
                elapsed_s=1.0,
                tokens_per_s=40.0,
                left_s=None,
            )
            for each in self.running
            if request_id in (None, each)
        ]

    async def tokenize(self, text: Text) -> Tokens:
        raise NotImplementedError

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        raise NotImplementedError

    async def close(self) -> None:
        pass

    async def status(self) -> dict[str, Any]:
        return {"requests": len(self.running), "failure": self.failure}


class ServerThread:
    """An event loop in a thread, for servers that are called from the test's own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@contextmanager
def serve(
    backend: Any,
    *,
    limits: RpcLimits | None = None,
    api_keys: tuple[str, ...] = (),
    tls: ServerTls | None = None,
) -> Iterator[tuple[str, RpcServer, ServerThread]]:
    """Serve a backend on a free port; give its address, the server and its thread."""
    thread = ServerThread()
    server = RpcServer(backend, limits=limits, api_keys=api_keys, tls=tls)
    port = thread.run(server.start())
    try:
        yield f"127.0.0.1:{port}", server, thread
    finally:
        thread.run(server.stop(0.0))
        thread.close()
