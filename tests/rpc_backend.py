"""A backend that answers by arithmetic, and a gRPC server around it in a thread of its own."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from actors.errors import UnknownRequest
from actors.messages import (
    FinishReason,
    Logprob,
    Logprobs,
    Progress,
    PromptReport,
    Request,
    RequestDelta,
    RequestMetrics,
    StepReport,
)
from actors.records import Restored, StepRecord
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


PROMPT_TOKENS, CACHED_TOKENS = 9, 4
MOST_LOGPROBS = 20
METRICS = RequestMetrics(queue_s=0.25, ttft_s=0.5, total_s=1.0)
STEP = StepRecord(
    number=7,
    phase="mixed",
    sequence_ids=(3, 4),
    prefill_tokens=5,
    decode_tokens=1,
    cached_tokens=2,
    algorithm="pass_kv",
    num_ranks=2,
    predicted_s=None,
    prices_s={"pass_kv": 0.5, "pass_q": 0.75},
    plan_s=0.125,
    wall_s=0.25,
    ranks_wall_s=(0.25, 0.125),
    ranks_parts_s=({"gemm": 0.125}, {}),
)
RESTORED = Restored(
    tokens=4, tokens_by_tier={"host": 4}, find_s=0.5, stage_s=0.0, copy_s=0.25, predicted_s=1.5
)


def place(token_id: int, count: int) -> Logprobs:
    """Return what is told of one token: itself, and as many others."""
    # A cluster has max_logprobs, and refuses more.
    ids = [token_id, *(token_id + 1 + index for index in range(min(count, MOST_LOGPROBS)))]
    return {
        each: Logprob(
            logprob=-each / 8, rank=index + 1, decoded_token=f"{each}" if each % 2 else None
        )
        for index, each in enumerate(ids)
    }


def prompt_report(request: Request) -> PromptReport:
    """Return what is told of a request's prompt; a text's ids are made up."""
    ids = (
        np.arange(PROMPT_TOKENS, dtype=np.int32) if request.token_ids is None else request.token_ids
    )
    count = request.params.prompt_logprobs
    if count is None:
        return PromptReport(token_ids=ids, logprobs=None)
    places = (place(int(each), count) for each in ids[1:])
    return PromptReport(token_ids=ids, logprobs=(None, *places))


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
        prompt_is_told = False
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
                is_last = index == params.n - 1 and reason is not None
                if is_last:
                    self.running.pop(request_id, None)
                prompt = None
                if request.reports and not prompt_is_told:
                    prompt_is_told = True
                    prompt = prompt_report(request)
                yield RequestDelta(
                    request_id=request_id,
                    index=index,
                    text="".join(f"{token_id}," for token_id in new),
                    token_ids=new,
                    finish_reason=reason,
                    logprobs=(
                        None
                        if params.logprobs is None
                        else tuple(place(each, params.logprobs) for each in new)
                    ),
                    prompt_tokens=PROMPT_TOKENS,
                    num_cached_tokens=CACHED_TOKENS,
                    metrics=METRICS if is_last else None,
                    prompt=prompt,
                    report=StepReport(steps=(STEP,), restored=RESTORED)
                    if is_last and request.reports
                    else None,
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
        thread.run(backend.close())
        thread.close()
