"""A client of the HTTP app in the test's own process, in front of a `FakeBackend`."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx

from cluster.backend import Backend
from cluster.http.app import build_app
from cluster.http.bodies import ErrorBody
from cluster.http.settings import Settings
from tests.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
FAST = Settings(names=("m",), keep_alive_s=0.01, progress_s=0.005, first_wait_s=0.01)


def run(test: Callable[["Asker"], Coroutine[Any, Any, None]], given: Settings = FAST) -> None:
    """Run a test against one app."""

    async def go() -> None:
        async with asyncio.timeout(60):
            backend = FakeBackend()
            await test(Asker(backend, backend, given))

    asyncio.run(go())


class Asker:
    """A client of one app."""

    def __init__(self, backend: FakeBackend, served: Backend, given: Settings = FAST) -> None:
        """Serve a backend, be it wrapped or as it is."""
        self.backend = backend
        self.app = build_app(served, given)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://test"
        )

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(
            path, content=content, headers={"content-type": "application/json", **names}
        )

    async def refused(self, path: str, body: object, **headers: str) -> tuple[int, str, str]:
        """Return status, code and message of an error that has OpenAI's shape."""
        return read_error(await self.post(path, body, **headers))


def read_error(response: httpx.Response) -> tuple[int, str, str]:
    error = ErrorBody.model_validate_json(response.content).error
    assert "Traceback" not in error.message
    if response.status_code in (429, 503):
        assert int(response.headers["retry-after"]) > 0
    return response.status_code, error.code or "", error.message


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """Return a stream's chunks, without comments; the last event says that it is over."""
    events = [each for each in response.text.split("\n\n") if each and not each.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in events[:-1]]
