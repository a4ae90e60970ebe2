"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``.

Nothing of the inside is told: no host names, no stack. What a client can mend is 4xx; all
else is 503 with Retry-After (429 where the queue is full).
"""

import json
import logging
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.errors import ClusterError, QueueFull, RankLost
from cluster.api_keys import Unauthenticated
from models.errors import PromptError, SamplingError

logger = logging.getLogger("ringspan.http")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")  # X-Request-Id, for the log

SHOWN_CHARACTERS = 500  # of a message, which may quote what a client sent
# Of fields that take several forms, for pydantic tells what is wrong with each form.
FORMS = {
    "prompt": "must be a text, a list of texts, a list of token ids or a list of such lists",
    "stop": "must be a text or a list of at most 16 texts, each of 1 to 1024 characters",
    "messages": "must be objects with a role and a content, which is text or a list of text parts",
}


class ApiError(HTTPException):
    """An answer that is an error. FastAPI lets errors of this base through as they are."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
        message = self.message
        if len(message) > SHOWN_CHARACTERS:
            message = message[:SHOWN_CHARACTERS] + "..."
        return {
            "error": {
                "message": message,
                "type": kinds.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the whole answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), status=self.status, headers=headers)


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return JSON in ASCII: half of a surrogate pair, as a client may send, has no UTF-8."""
    return Response(
        json.dumps(body, separators=(",", ":")),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the error of a request that cannot be answered as it is."""
    return ApiError(400, message, code="invalid_value", param=param)


def as_api_error(error: BaseException, retry_after_s: int) -> ApiError:
    """Return what a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unauthenticated):
        return ApiError(401, str(error), code="invalid_api_key")
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, SamplingError):
        return ApiError(400, str(error), code="invalid_value", param=_first_word(str(error)))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after_s=retry_after_s)
    if isinstance(error, RankLost):
        message, code = "a rank of the cluster was lost: try again once it is up", "rank_lost"
    elif isinstance(error, ClusterError):
        message, code = "the cluster cannot answer now: try again later", "cluster_error"
    else:
        message, code = "the server failed at this request: try again later", "server_failed"
    log_error(error)
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def log_error(error: BaseException) -> None:
    """Say in the log what failed and where; messages of others' errors may quote a prompt."""
    if isinstance(error, ClusterError):
        logger.error("request %s: %s: %s", REQUEST_ID.get(), type(error).__name__, error)
        return
    stack = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: %s at\n%s", REQUEST_ID.get(), type(error).__name__, stack)


def _first_word(message: str) -> str | None:
    """Sampling errors begin with the parameter's name."""
    word = message.split(" ", 1)[0]
    return word if word.replace("_", "").isalnum() and word.islower() else None


def add_error_handlers(app: FastAPI) -> None:
    """Have FastAPI's own refusals told in the same shape."""

    async def refuse_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error).response()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        if error.status_code == 404:
            return ApiError(404, "there is no such path here", code="not_found").response()
        if error.status_code == 405:
            message = f"{request.method} is not what this path takes"
            return ApiError(405, message, code="method_not_allowed").response()
        return invalid("the body cannot be read: send a JSON object in UTF-8").response()

    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse)


def validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, in one sentence."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] in ("json_invalid", "json_type"):
        return invalid("the body is not JSON")
    if first["type"] in ("model_attributes_type", "dict_type", "missing") and not where:
        return invalid("the body must be a JSON object, sent with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    # Beside the fields' names the place tells which of a union's forms was tried: leave it out.
    param = where[0] if where and where[0].isidentifier() else None
    if param in FORMS and first["type"] != "value_error" and len(where) > 1:
        return invalid(f"{param} {FORMS[param]}", param)
    if param is not None:
        message = f"{param}: {message[0].lower()}{message[1:]}"
    return invalid(message, param)
