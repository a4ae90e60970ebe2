"""`build_app`: the FastAPI app of one server, in front of any `cluster.backend.Backend`."""

import asyncio
import time
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from cluster.api_keys import ApiKeys
from cluster.backend import Backend
from cluster.http.answering import Server
from cluster.http.bodies import (
    Cancelled,
    ChatCompletion,
    Completion,
    Detokenized,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
)
from cluster.http.chat import chat
from cluster.http.completions import complete
from cluster.http.errors import ApiError, add_error_handlers, json_response
from cluster.http.limits import FrontDoor, Gate
from cluster.http.openapi import STREAM, answers, make_schema_honest
from cluster.http.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from cluster.http.settings import Settings
from cluster.http.tokens import detokenize, tokenize
from cluster.metered import MeteredBackend
from cluster.metrics import Metrics
from models.errors import RingspanError

try:
    VERSION = package_version("ringspan")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "unknown"
STATUS_AGE_S = 1.0  # probes and dashboards share an answer of the coordinator for so long


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
    """Return the app; ``app.state.gate`` ends it (see `cluster.http.limits.Gate`).

    Give a `MeteredBackend` where requests come through other doors too: all of its are counted.
    """
    if not isinstance(backend, MeteredBackend):
        backend = MeteredBackend(backend, settings.names[0])
    app = FastAPI(title="Ringspan", version=VERSION, docs_url=None, redoc_url=None)
    gate = Gate(settings.max_requests, settings.retry_after_s)
    keys = ApiKeys(settings.api_keys)
    server = Server(backend=backend, settings=settings, gate=gate, keys=keys)
    app.state.gate = gate
    add_error_handlers(app)
    app.add_middleware(
        FrontDoor,
        gate=gate,
        keys=keys,
        max_body_bytes=settings.body_limit_bytes(backend.facts.max_model_len),
        body_timeout_s=settings.body_timeout_s,
    )
    _add_answers(app, server)
    _add_tokens(app, server)
    _add_models(app, server)
    _add_probes(app, server, backend.metrics)
    make_schema_honest(app, keys.are_needed)
    return app


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", response_model=None, responses=answers(Completion, STREAM))
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(server, request, body)

    @app.post(
        "/v1/chat/completions", response_model=None, responses=answers(ChatCompletion, STREAM)
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat(server, request, body)

    @app.post("/v1/cancel/{answer_id}", response_model=None, responses=answers(Cancelled))
    async def cancel(request: Request, answer_id: str) -> Response:
        """End an answer of the same API key with what it has; ``id`` is told in its chunks."""
        await server.cancel(request, answer_id)
        return json_response(Cancelled(id=answer_id).model_dump())


def _add_tokens(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", response_model=None, responses=answers(Tokenized))
    async def tokens_of(body: TokenizeRequest) -> Response:
        return json_response((await tokenize(server, body)).model_dump())

    @app.post("/detokenize", response_model=None, responses=answers(Detokenized))
    async def text_of(body: DetokenizeRequest) -> Response:
        return json_response((await detokenize(server, body)).model_dump())


def _add_models(app: FastAPI, server: Server) -> None:
    created = int(time.time())

    def card(name: str) -> ModelCard:
        length = server.backend.facts.max_model_len
        return ModelCard(id=name, created=created, max_model_len=length)

    @app.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def models() -> Response:
        cards = [card(name) for name in server.settings.names]
        return json_response(ModelList(data=cards).model_dump())

    # A name may have slashes.
    @app.get("/v1/models/{model_name:path}", response_model=None, responses=answers(ModelCard))
    async def model(model_name: str) -> Response:
        return json_response(card(server.model_name(model_name)).model_dump())

    @app.get("/version", response_model=None, responses=answers(Version))
    async def version() -> Response:
        return json_response(Version(version=VERSION).model_dump())


def _add_probes(app: FastAPI, server: Server, metrics: Metrics) -> None:
    gate, settings = server.gate, server.settings
    watch = StatusWatch(server.backend)

    async def health() -> Response:
        """200 where the coordinator answers, no rank is lost and new requests are let in."""
        status = None if gate.is_draining else await watch.status()
        if status is not None and status["failure"] is None:
            return Response(status_code=200)
        why = "the server is shutting down" if gate.is_draining else "the cluster has failed"
        message = f"{why}: try again later"
        raise ApiError(503, message, code="unhealthy", retry_after_s=settings.retry_after_s)

    for path, method in (("/health", "GET"), ("/ping", "GET"), ("/ping", "POST")):
        app.add_api_route(
            path,
            health,
            methods=[method],
            response_class=Response,
            responses=answers(None),
            operation_id=f"{path[1:]}_{method.lower()}",
        )

    @app.get("/metrics", response_class=PlainTextResponse, responses=answers(None))
    async def prometheus() -> Response:
        page = metrics.page(await watch.status())
        return Response(page, headers={"Content-Type": CONTENT_TYPE_LATEST})
