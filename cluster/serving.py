"""Servers in front of a cluster, until they are told to stop."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from cluster.backend import Backend
from cluster.http.limits import Gate
from cluster.http.settings import Settings
from cluster.rpc.limits import RpcLimits
from cluster.rpc.server import RpcServer
from cluster.tls import ServerTls

TOLD_S = 5.0  # for those who are told of the end to hear it
HEADER_BYTES = 32 * 2**10


def rpc_server(settings: Settings, backend: Backend, tls: ServerTls | None) -> RpcServer:
    """Return the gRPC server beside an HTTP server of these settings."""
    return RpcServer(
        backend,
        host=settings.host,
        port=settings.grpc_port,
        api_keys=settings.api_keys,
        limits=RpcLimits(max_streams=settings.max_requests),
        tls=tls,
    )


class _Server(uvicorn.Server):
    """A uvicorn that leaves signals to us: they first let requests end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def until_stopped(
    app: FastAPI,
    listener: socket.socket,
    welcome: str,
    grace_s: float,
    rpc: RpcServer | None = None,
    tls: ServerTls | None = None,
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
            **({} if tls is None else tls.uvicorn_options()),
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
            draining = asyncio.create_task(drain(gate, rpc, grace_s))
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, hurrying):
                task.cancel()
            gate.close()
            await gate.drain(TOLD_S)
            server.should_exit = True
        await serving


async def drain(gate: Gate, rpc: RpcServer | None, grace_s: float) -> None:
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
