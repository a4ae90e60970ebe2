"""A backend whose requests are counted, whichever door they come through."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from actors.messages import Progress, Request, RequestDelta
from actors.texts import Text, Tokens
from cluster.backend import Backend, ModelFacts
from cluster.metrics import Metrics


class MeteredBackend:
    """Passes every call on, and watches every stream."""

    def __init__(self, backend: Backend, model_name: str) -> None:
        """Wrap a backend; ``metrics`` begins at zero."""
        self.metrics = Metrics(model_name)
        self._backend = backend

    @property
    def facts(self) -> ModelFacts:
        """See `Backend`."""
        return self._backend.facts

    def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """See `Backend`."""
        begin_s = time.perf_counter()
        return self._watched(request, begin_s, self._backend.stream(request))

    async def _watched(
        self, request: Request, begin_s: float, deltas: AsyncIterator[RequestDelta]
    ) -> AsyncIterator[RequestDelta]:
        watch = self.metrics.watch(begin_s, request.params.n)
        try:
            async for delta in deltas:
                watch.take(delta, time.perf_counter())
                yield delta
        finally:
            watch.close()
            # Closing the stream early is what cancels the request.
            if hasattr(deltas, "aclose"):
                await deltas.aclose()

    async def cancel(self, request_id: str) -> None:
        """See `Backend`."""
        await self._backend.cancel(request_id)

    async def progress(self, request_id: str | None) -> list[Progress]:
        """See `Backend`."""
        return await self._backend.progress(request_id)

    async def status(self) -> dict[str, Any]:
        """See `Backend`."""
        return await self._backend.status()

    async def tokenize(self, text: Text) -> Tokens:
        """See `Backend`."""
        return await self._backend.tokenize(text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """See `Backend`."""
        return await self._backend.detokenize(token_ids)

    async def close(self) -> None:
        """See `Backend`."""
        await self._backend.close()
