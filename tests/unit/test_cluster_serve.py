"""The server of ``ringspan serve`` on real sockets and signals, in front of a fake cluster."""

import argparse
import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable

import httpx
import pytest

from cluster import serve
from cluster.http.app import build_app
from cluster.http.settings import Settings
from configs import ConfigError
from tests.fake_backend import FakeBackend

FAST = Settings(names=("m",), keep_alive_s=0.01, first_wait_s=0.01)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.01)


def options(**changes: object) -> argparse.Namespace:
    given = {"model": "/models/llama", "api_key": [], "served_model_name": [], "grace_s": 1.0}
    return argparse.Namespace(**{**given, **changes})


def test_address_in_use_or_not_ours_is_one_sentence() -> None:
    """Said before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}: address"):
            serve._bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--port must be 0 to 65535"):
        serve._bind("127.0.0.1", 70_000)
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1 port 0: cannot assign"):
        serve._bind("192.0.2.1", 0)


def test_key_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' processes inherit it, and have no use for the key."""
    monkeypatch.setenv("RINGSPAN_API_KEY", "secret")

    settings = serve._settings(options(api_key=["other"]))

    assert settings.api_keys == ("other", "secret")
    assert "RINGSPAN_API_KEY" not in os.environ
    assert settings.names == ("llama",)


@pytest.mark.parametrize("changes", [{"api_key": [""]}, {"grace_s": -1.0}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        serve._settings(options(**changes))


def test_vanished_clients_and_signals() -> None:
    """Who leaves ends its request; one signal shuts the door, another tells who is inside."""

    async def test() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        app = build_app(backend, FAST)
        with serve._bind("127.0.0.1", 0) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            served = asyncio.create_task(serve._until_stopped(app, listener, "up", 600.0))
            await until(lambda: bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
            for stream in (True, False):
                await leave(url, backend, stream)
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                body = {"prompt": "abc", "stream": True}
                asked = [
                    asyncio.create_task(client.post("/v1/completions", json=body))
                    for _ in range(20)
                ]
                await until(lambda: len(backend.open) == 20)
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: bool(app.state.gate.is_draining))
                refused = await client.post("/v1/completions", json=body)
                assert refused.status_code == 503
                assert refused.headers["retry-after"]
                os.kill(os.getpid(), signal.SIGINT)
                for response in await asyncio.gather(*asked):
                    error, done = response.text.split("\n\n")[-3:-1]
                    told = json.loads(error.removeprefix("data: "))["error"]
                    assert told["code"] == "shutting_down"
                    assert done == "data: [DONE]"
            async with asyncio.timeout(60):
                await served
        assert not backend.open

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(test())
    assert signal.getsignal(signal.SIGTERM) is before


async def leave(url: str, backend: FakeBackend, stream: bool) -> None:
    """Ask, and close the connection once the request is under way."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"prompt": "abc", "stream": stream}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: bool(backend.open))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: not backend.open)
