"""``ringspan serve``: a model behind OpenAI's HTTP API, until Ctrl-C or SIGTERM.

uvicorn runs in the command's own process, beside Ray's driver.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from actors.cluster_info import ClusterInfo
from cluster.arguments import add_cluster_flags, cluster_options
from cluster.backend import ClusterBackend
from cluster.http.app import build_app
from cluster.http.limits import Gate
from cluster.http.settings import Settings
from cluster.launch import RunningCluster, read_config
from cluster.metered import MeteredBackend
from cluster.rpc.server import RpcServer
from configs import Config, ConfigError

KEY_VARIABLE = "RINGSPAN_API_KEY"
TOLD_S = 5.0  # for those who are told of the end to hear it
HEADER_BYTES = 32 * 2**10


def add_command(commands: Any) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser("serve", help="serve a model by OpenAI's HTTP API")
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    group.add_argument("--grpc-port", type=int, default=50051, help="0: any that is free (50051)")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"clients must send one of these, each a tenant; may be repeated. {KEY_VARIABLE} is"
        " one more, which no list of processes shows",
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="that clients ask for; may be repeated (the directory's name)",
    )
    group.add_argument(
        "--grace-s", type=float, default=15.0, help="for running requests to end at a stop (15)"
    )
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status."""
    settings = _settings(options)
    given = cluster_options(options)
    config = read_config(options.model, given.pop("config_file"), given.pop("overrides"), given)
    # The port is taken before minutes go into loading the model.
    _bind(options.host, options.grpc_port).close()  # gRPC opens it itself
    with _bind(options.host, options.port) as listener:
        if not settings.api_keys and not _is_loopback(listener):
            print(
                "ringspan: everybody who reaches this address can use the model: set"
                f" {KEY_VARIABLE}",
                file=sys.stderr,
            )
        return _serve(config, settings, listener, options)


def _settings(options: argparse.Namespace) -> Settings:
    keys = list(options.api_key)
    # Taken out: the ranks' processes inherit the environment.
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ.pop(KEY_VARIABLE))
    if not 0 <= options.grace_s < float("inf"):
        raise ConfigError(f"--grace-s must be >= 0 and finite, got {options.grace_s}")
    name = Path(options.model).expanduser().resolve().name
    try:
        return Settings(
            names=tuple(options.served_model_name) or (name,), api_keys=tuple(dict.fromkeys(keys))
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address, or say in one sentence why there is none."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port must be 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen at {host} port {port}: {os.strerror(error.errno or 0).lower()}; give"
        " another --host or --port"
    )


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def _serve(
    config: Config, settings: Settings, listener: socket.socket, options: argparse.Namespace
) -> int:
    print(f"ringspan: loading {settings.names[0]} ...", flush=True)
    with RunningCluster(config) as cluster:
        backend = MeteredBackend(ClusterBackend(cluster), settings.names[0])
        app = build_app(backend, settings)

        async def serve() -> None:
            host, port = listener.getsockname()[:2]
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            rpc = RpcServer(
                backend,
                host=options.host,
                port=options.grpc_port,
                api_keys=settings.api_keys,
            )
            grpc_port = await rpc.start()
            welcome = _welcome(where, settings, cluster.info) + f"; gRPC at {host}:{grpc_port}"
            try:
                await _until_stopped(app, listener, welcome, options.grace_s, rpc)
            except OSError as error:
                raise _cannot_listen(host, port, error) from None
            finally:
                await rpc.stop(0.0)
            await backend.close()

        asyncio.run(serve())
    print("ringspan: stopped", flush=True)
    return 0


def _welcome(where: str, settings: Settings, info: ClusterInfo) -> str:
    keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key"
    return (
        f"ringspan: serving {', '.join(settings.names)} at {where}/v1 ({info.num_ranks} ranks,"
        f" up to {info.max_model_len} tokens, {keys}); {where}/health, {where}/metrics"
    )


class _Server(uvicorn.Server):
    """A uvicorn that leaves signals to us: they first let requests end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _until_stopped(
    app: FastAPI,
    listener: socket.socket,
    welcome: str,
    grace_s: float,
    rpc: RpcServer | None = None,
) -> None:
    """Serve until a signal; then let nobody in, wait for a while, and tell who is left."""
    gate: Gate = app.state.gate
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=int(TOLD_S),
        )
    )
    with _stop_signals() as (stop, hurry):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            print(welcome, flush=True)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            print(f"ringspan: stopping; requests have {grace_s:g} s to end", flush=True)
            draining = asyncio.create_task(_drain(gate, rpc, grace_s))
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, hurrying):
                task.cancel()
            gate.close()
            await gate.drain(TOLD_S)
            server.should_exit = True
        await serving


async def _drain(gate: Gate, rpc: RpcServer | None, grace_s: float) -> None:
    """Let requests end at both doors, for so long."""
    if rpc is None:
        await gate.drain(grace_s)
    else:
        await asyncio.gather(gate.drain(grace_s), rpc.stop(grace_s))


@contextlib.contextmanager
def _stop_signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Set the first event at a first signal, the second at another one."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    try:
        yield stop, hurry
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
