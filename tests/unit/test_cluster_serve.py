"""The server of ``ringspan serve`` on real sockets and signals, in front of a fake cluster."""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cluster import serve
from cluster.http.app import build_app
from cluster.http.settings import Settings
from cluster.serving import until_stopped
from configs import ConfigError, ServerConfig
from tests.checkpoints import write_llama_checkpoint
from tests.fake_backend import FakeBackend

FAST = Settings(names=("m",), keep_alive_s=0.01, first_wait_s=0.01)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.01)


def options(checkpoint: Path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    return parser.parse_args(["serve", str(checkpoint), *flags])


def test_address_in_use_or_not_ours_is_one_sentence() -> None:
    """Said before a model is loaded, with the flag that helps."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}: address"):
            serve._bind("127.0.0.1", port, "--port")
        with pytest.raises(ConfigError, match="give another --host or --grpc-port"):
            serve._bind("127.0.0.1", port, "--grpc-port")
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1 port 0: cannot assign"):
        serve._bind("192.0.2.1", 0, "--port")


def test_flags_are_keys_of_the_server(tmp_path: Path) -> None:
    """A flag goes before the file's key, and a ``key=value`` before the flag."""
    checkpoint = write_llama_checkpoint(tmp_path / "llama")
    file = tmp_path / "server.yaml"
    file.write_text("server:\n  port: 1\n  grpc_port: 2\n  served_model_name: [a, b]\n")
    flags = ["server.max_requests=8", "--config", str(file), "--port", "3", "--max-requests", "7"]

    config = serve._config(options(checkpoint, *flags))

    assert (config.server.port, config.server.grpc_port, config.server.max_requests) == (3, 2, 8)
    assert Settings.of(config, ()).names == ("a", "b")
    assert Settings.of(serve._config(options(checkpoint)), ()).names == ("llama",)


def test_every_flag_is_a_key() -> None:
    keys = {name.removeprefix("--").replace("-", "_") for name in serve.SERVER_FLAGS}
    assert keys <= {field.name for field in dataclasses.fields(ServerConfig)}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--grace-s", "-1"], "server.grace_s must be >= 0 and finite, got -1.0"),
        (["--port", "70000"], "server.port must be 0 to 65535, got 70000"),
        (["--port", "9", "--grpc-port", "9"], "must differ, got 9 twice"),
        (["--max-requests", "0"], "server.max_requests must be 1 to 2000, got 0"),
        (["--served-model-name", ""], "a name without a character"),
        (["--ssl-certfile", "a"], "go together: give both"),
        (["--ssl-ca-certs", "a"], "server.ssl_ca_certs needs server.ssl_certfile"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, flags: list[str], told: str
) -> None:
    checkpoint = write_llama_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=told):
        serve._config(options(checkpoint, *flags))


def test_vanished_clients_and_signals() -> None:
    """Who leaves ends its request; one signal shuts the door, another tells who is inside."""

    async def test() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        app = build_app(backend, FAST)
        with serve._bind("127.0.0.1", 0, "--port") as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            served = asyncio.create_task(until_stopped(app, listener, "up", 600.0))
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
