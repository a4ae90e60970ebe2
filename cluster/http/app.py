"""`build_app`: the FastAPI app of one server, in front of any `cluster.backend.Backend`."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from cluster.api_keys import ApiKeys
from cluster.backend import Backend
from cluster.http.answering import Server
from cluster.http.chat import chat
from cluster.http.completions import complete
from cluster.http.errors import ApiError, add_error_handlers, json_response
from cluster.http.limits import FrontDoor, Gate
from cluster.http.metrics import Metrics
from cluster.http.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from cluster.http.settings import Settings
from models.errors import RingspanError

STATUS_AGE_S = 1.0  # probes and dashboards share an answer of the coordinator for so long
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 503)
}


class StatusWatch:
    """Asks for the cluster's status, once at a time and not more often than of use."""

    def __init__(self, backend: Backend) -> None:
        """Know nothing yet."""
        self._backend = backend
        self._lock = asyncio.Lock()
        self._told: tuple[float, dict[str, Any] | None] | None = None

    async def status(self) -> dict[str, Any] | None:
        """Return what the cluster says of itself, or None where it does not answer."""
        async with self._lock:
            if self._told is None or time.monotonic() - self._told[0] > STATUS_AGE_S:
                try:
                    status: dict[str, Any] | None = await self._backend.status()
                except RingspanError:
                    status = None
                self._told = time.monotonic(), status
            return self._told[1]


def build_app(backend: Backend, settings: Settings) -> FastAPI:
    """Return the app; ``app.state.gate`` ends it (see `cluster.http.limits.Gate`)."""
    app = FastAPI(title="Ringspan", docs_url=None, redoc_url=None)
    gate = Gate(settings.max_requests, settings.retry_after_s)
    keys = ApiKeys(settings.api_keys)
    metrics = Metrics(settings.names[0])
    server = Server(backend=backend, settings=settings, gate=gate, keys=keys, metrics=metrics)
    watch = StatusWatch(backend)
    created = int(time.time())
    app.state.gate = gate
    add_error_handlers(app)
    app.add_middleware(
        FrontDoor,
        gate=gate,
        keys=keys,
        max_body_bytes=settings.body_limit_bytes(backend.facts.max_model_len),
        body_timeout_s=settings.body_timeout_s,
    )

    @app.post(
        "/v1/completions", response_model=None, responses={200: {"model": Completion}, **ERRORS}
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(server, request, body)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion}, **ERRORS},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat(server, request, body)

    @app.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **ERRORS})
    async def models() -> Response:
        length = backend.facts.max_model_len
        cards = [ModelCard(id=n, created=created, max_model_len=length) for n in settings.names]
        return json_response(ModelList(data=cards).model_dump())

    @app.get("/health", response_model=None, responses={503: {"model": ErrorBody}})
    async def health() -> Response:
        """200 where the coordinator answers, no rank is lost and new requests are let in."""
        status = None if gate.is_draining else await watch.status()
        if status is not None and status["failure"] is None:
            return Response(status_code=200)
        why = "the server is shutting down" if gate.is_draining else "the cluster has failed"
        message = f"{why}: try again later"
        raise ApiError(503, message, code="unhealthy", retry_after_s=settings.retry_after_s)

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        page = metrics.page(await watch.status())
        return Response(page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return app
