"""The doors of one running cluster: the handle, gRPC and HTTP.

The servers run in a Ray actor, a process of their own that shares the cluster with the
handle in this one: the load generator does not take the servers' time, nor they its.
"""

import asyncio
import itertools
import json
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import uvicorn

from actors.errors import ClusterError
from cluster.backend import ClusterBackend
from cluster.bench.contestants import Ask
from cluster.bench.serve_load import Piece
from cluster.client import Client
from cluster.http.app import build_app
from cluster.http.settings import Settings
from cluster.launch import RunningCluster
from cluster.prompt import make_request
from cluster.rpc.server import RpcServer

MODEL = "bench"
HTTP_LIMIT_S = 3600.0


class FrontEnds:
    """Both servers of a cluster that somebody else owns; a Ray actor."""

    async def start(self, cluster: RunningCluster) -> tuple[int, int]:
        """Listen on loopback; return the ports of HTTP and gRPC."""
        backend = ClusterBackend(cluster)
        self._rpc = RpcServer(backend)
        rpc_port = await self._rpc.start()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        # As `ringspan serve` has it.
        config = uvicorn.Config(
            build_app(backend, Settings(names=(MODEL,))),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
        )
        self._http = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._http._serve([listener]))
        while not self._http.started:
            if self._serving.done():
                raise ClusterError("the HTTP server of the benchmark did not start")
            await asyncio.sleep(0.01)
        return listener.getsockname()[1], rpc_port


class HandleDoor:
    """What `LLM.stream` does, for an event loop."""

    def __init__(self, cluster: RunningCluster) -> None:
        """Take a cluster that is up."""
        self._backend = ClusterBackend(cluster)
        self._numbers = itertools.count()
        self._name = secrets.token_hex(4)

    async def __call__(self, ask: Ask) -> AsyncIterator[Piece]:
        """Answer piece by piece."""
        request_id = f"bench-{self._name}-{next(self._numbers)}"
        request = make_request(request_id, ask.prompt, ask.params())
        async for delta in self._backend.stream(request):
            yield delta.token_ids, delta.finish_reason

    async def close(self) -> None:
        """Wait for what is being cancelled."""
        await self._backend.close()


class RpcDoor:
    """gRPC, by `Client`."""

    def __init__(self, target: str, api_key: str | None) -> None:
        """Take ``host:port``."""
        self._client = Client(target, api_key=api_key)

    async def __call__(self, ask: Ask) -> AsyncIterator[Piece]:
        """Answer piece by piece."""
        async for delta in self._client.astream(ask.prompt, ask.params()):
            yield delta.token_ids, delta.finish_reason

    async def close(self) -> None:
        """End the connection."""
        await self._client.aclose()
        self._client.close()


class HttpDoor:
    """POST /v1/completions, streamed; lines are read as they come."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """Take the server's address, without /v1."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url, self._model = f"{url.rstrip('/')}/v1/completions", model
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=HTTP_LIMIT_S),
        )

    async def __call__(self, ask: Ask) -> AsyncIterator[Piece]:
        """Answer piece by piece."""
        body = {
            **({} if self._model is None else {"model": self._model}),
            "prompt": ask.token_ids,
            "max_tokens": ask.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise ClusterError(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield _piece(json.loads(line[6:]))

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise ClusterError(event["error"]["message"])
    choices: Sequence[dict[str, Any]] = event["choices"]
    if not choices:
        return (), None
    return tuple(choices[0].get("token_ids") or ()), choices[0].get("finish_reason")
