"""What a front end needs of a cluster, and a running one behind it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from actors.errors import ClusterError
from actors.messages import Progress, Request, RequestDelta
from cluster.launch import RunningCluster

ANSWER_S = 30.0  # for all but answers


class Backend(Protocol):
    """Answers requests. Errors are those of `LLM`."""

    def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """Answer a request piece by piece; each of its n answers ends with a finish reason."""
        ...

    async def cancel(self, request_id: str) -> None:
        """End a request with what it has, or raise `UnknownRequest`."""
        ...

    async def progress(self, request_id: str | None) -> list[Progress]:
        """Return how far one prefill has come, or all; `UnknownRequest` where it is none."""
        ...

    async def status(self) -> dict[str, Any]:
        """Return what the cluster is and does; ``failure`` is not None where a rank is lost."""
        ...


class ClusterBackend:
    """A running cluster as a `Backend`."""

    def __init__(self, cluster: RunningCluster) -> None:
        """Take a cluster; closing it is its owner's."""
        self._cluster = cluster

    async def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """See `Backend.stream`."""
        references = self._cluster.submit("stream", request)
        async for reference in references:
            yield await self._cluster.result_async(reference)

    async def cancel(self, request_id: str) -> None:
        """See `Backend.cancel`."""
        await self._ask("cancel", request_id)

    async def progress(self, request_id: str | None) -> list[Progress]:
        """See `Backend.progress`."""
        told: list[Progress] = await self._ask("progress", request_id)
        return told

    async def status(self) -> dict[str, Any]:
        """See `Backend.status`."""
        status: dict[str, Any] = await self._ask("status")
        return status

    async def _ask(self, method: str, *args: Any) -> Any:
        reference = self._cluster.submit(method, *args)
        try:
            return await asyncio.wait_for(self._cluster.result_async(reference), ANSWER_S)
        except TimeoutError:
            raise ClusterError(f"the coordinator gave no answer within {ANSWER_S:g} s") from None
