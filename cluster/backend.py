"""What servers need of a cluster, for an event loop: HTTP and gRPC sit on the same few calls."""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.errors import ClusterError, UnknownRequest
from actors.messages import Progress, Request, RequestDelta
from actors.texts import Text, Tokens
from cluster.launch import RunningCluster
from models.errors import RingspanError

ASK_S = 20.0  # for the coordinator to answer what needs no step
# A request that is left may still be on its way to the coordinator: it is looked for so often.
CANCEL_TRIES = 100  # longer than a chat template may take
CANCEL_PAUSE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a server checks requests against before they reach the cluster."""

    max_model_len: int  # tokens of prompt and answer
    has_tokenizer: bool


class Backend(Protocol):
    """A cluster as its servers see it. Every call may raise a `RingspanError`."""

    @property
    def facts(self) -> ModelFacts:
        """What the model takes."""
        ...

    def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """Answer a request piece by piece; whoever closes the iterator early cancels it.

        It may begin before the iterator is asked: who never asks must `cancel`.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """End a request with what it has; `UnknownRequest` where it is not under way."""
        ...

    async def progress(self, request_id: str | None) -> list[Progress]:
        """Return how far one prefill has come, or all; `UnknownRequest` where it is none."""
        ...

    async def status(self) -> dict[str, Any]:
        """Return what the cluster is and does."""
        ...

    async def tokenize(self, text: Text) -> Tokens:
        """Return a text's tokens."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...

    async def close(self) -> None:
        """Wait for what is under way behind the callers' backs."""
        ...


class ClusterBackend:
    """A `RunningCluster` as a backend. Lives in one event loop."""

    def __init__(self, cluster: RunningCluster) -> None:
        """Take a cluster that is up; its owner closes it."""
        self._cluster = cluster
        self._tasks: set[asyncio.Task[None]] = set()  # cancellations under way

    @property
    def facts(self) -> ModelFacts:
        """What the model takes."""
        info = self._cluster.info
        return ModelFacts(max_model_len=info.max_model_len, has_tokenizer=info.has_tokenizer)

    def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """See `Backend`: it begins at once, while a server still writes to its client."""
        return self._deltas(request, self._cluster.submit("stream", request))

    async def _deltas(self, request: Request, references: Any) -> AsyncIterator[RequestDelta]:
        has_begun = ended = False
        try:
            async for reference in references:
                delta = await self._cluster.result_async(reference)
                has_begun = True
                yield delta
            ended = True
        except RingspanError:
            ended = True
            raise
        finally:
            if not ended:
                self._leave(request.request_id, 1 if has_begun else CANCEL_TRIES)

    async def cancel(self, request_id: str) -> None:
        """End a request with what it has; `UnknownRequest` where it is not under way."""
        await self._ask("cancel", request_id)

    async def progress(self, request_id: str | None) -> list[Progress]:
        """Return how far one prefill has come, or all; `UnknownRequest` where it is none."""
        told: list[Progress] = await self._ask("progress", request_id)
        return told

    async def status(self) -> dict[str, Any]:
        """Return what the cluster is and does."""
        status: dict[str, Any] = await self._ask("status")
        return status

    async def tokenize(self, text: Text) -> Tokens:
        """Return a text's tokens."""
        tokens: Tokens = await self._ask("tokenize", text)
        return tokens

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: str = await self._ask("detokenize", list(token_ids))
        return text

    async def close(self) -> None:
        """Wait for cancellations under way: nobody is left to read those answers."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(ASK_S):
                return await self._cluster.result_async(self._cluster.submit(method, *args))
        except TimeoutError:
            raise ClusterError(f"the coordinator gave no answer within {ASK_S:g} s") from None

    def _leave(self, request_id: str, tries: int) -> None:
        """Cancel a request behind whoever left it: they may be cancelled themselves."""
        self._spawn(self._cancel_left(request_id, tries))

    async def _cancel_left(self, request_id: str, tries: int) -> None:
        with contextlib.suppress(ClusterError):
            for _ in range(tries):
                with contextlib.suppress(UnknownRequest):
                    await self.cancel(request_id)
                    return
                await asyncio.sleep(CANCEL_PAUSE_S)

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: what a task of Ray has called is cancelled with it.
        task = asyncio.create_task(call, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
