"""What `/openapi.json` says beside what FastAPI finds out by itself: errors, streams, keys."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from cluster.http.bodies import ErrorBody
from cluster.http.limits import OPEN_PATHS, REQUEST_ID_HEADER

EVENT = {  # whose data is a chunk, an error or [DONE]
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAM = {"text/event-stream": {"schema": EVENT}}
ERROR = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
STATUSES = (400, 401, 404, 405, 408, 413, 429, 503)


def answers(
    model: type[BaseModel] | None, more: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of an operation: its answer, and all errors there are."""
    told: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in STATUSES}
    if model is not None:
        told[200] = {"model": model, "content": more or {}}
    return told


def make_schema_honest(app: FastAPI, keys_are_needed: bool) -> None:
    """Take out FastAPI's own error, which is never sent, and name the header and the key."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = make()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status in STATUSES:  # FastAPI takes them for text where answers are
                    operation["responses"][str(status)]["content"] = {"application/json": ERROR}
                operation.setdefault("parameters", []).append(_REQUEST_ID)
                if keys_are_needed and path in OPEN_PATHS:
                    operation["security"] = []
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if keys_are_needed:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


_REQUEST_ID = {
    "name": REQUEST_ID_HEADER.decode(),
    "in": "header",
    "required": False,
    "description": "Sent back with the answer, and named in the server's log.",
    "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,128}$"},
}
