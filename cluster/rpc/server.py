"""The gRPC server: Inference, health and reflection on one port."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.errors import ClusterError
from cluster.api_keys import ApiKeys
from cluster.backend import Backend
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import status_of
from cluster.rpc.limits import RpcLimits, server_options
from cluster.rpc.service import Context, InferenceService
from cluster.tls import ServerTls
from models.errors import RingspanError

LOG = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_S = 2.0  # how often the cluster is asked whether it lives
TELL_S = 3.0  # for streams to be told that the server stops


class RpcServer:
    """Serves one backend until `stop`. Lives in the event loop that starts it."""

    def __init__(
        self,
        backend: Backend,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_keys: Sequence[str] = (),
        limits: RpcLimits | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        """Only store. Port 0 is any free one; without ``api_keys`` everybody may call."""
        self._backend = backend
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._keys = ApiKeys(api_keys)
        self._limits = limits or RpcLimits()
        self._tls = tls
        self._server: grpc.aio.Server
        self._service: InferenceService
        self._health: Any
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; return the port.

        Raises:
            ClusterError: The address cannot be had.
        """
        self._service = InferenceService(self._backend, self._keys, self._limits)
        self._server = grpc.aio.server(
            options=server_options(self._limits),
            # A brake behind our own limit, which names its error; health needs room beside it.
            maximum_concurrent_rpcs=4 * self._limits.max_streams,
        )
        self._server.add_generic_rpc_handlers((_handlers(self._service),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        try:
            port: int = (
                self._server.add_insecure_port(self._address)
                if self._tls is None
                else self._server.add_secure_port(self._address, self._tls.grpc_credentials())
            )
        except RuntimeError:
            raise ClusterError(
                f"cannot listen on {self._address}: the port is in use, or the address is not of"
                " this machine"
            ) from None
        await self._server.start()
        await self._tell_health(True)
        self._watch = asyncio.create_task(self._watch_backend())
        return port

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more requests, let those under way end, tell the rest, and close the port."""
        if self._watch is not None:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        await self._service.drain(self._limits.grace_s if grace_s is None else grace_s)
        await self._server.stop(TELL_S)

    async def _watch_backend(self) -> None:
        """Let health say whether requests can be answered; a busy cluster can."""
        while True:
            lives = True
            try:
                lives = (await self._backend.status()).get("failure") is None
            except RingspanError:
                lives = False
            except Exception as error:
                LOG.error("the cluster's status cannot be read", exc_info=error)
                lives = False
            await self._tell_health(lives)
            await asyncio.sleep(HEALTH_S)

    async def _tell_health(self, lives: bool) -> None:
        told = health_pb2.HealthCheckResponse
        status = told.SERVING if lives else told.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """Return the service's methods; no error leaves them but as a status of ours."""
    unary = {
        "Cancel": (service.cancel, pb.CancelRequest),
        "Progress": (service.progress, pb.ProgressRequest),
        "Status": (service.status, pb.StatusRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _told(method),
            request_deserializer=_reader(kind),
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, (method, kind) in unary.items()
    }
    handlers["Generate"] = grpc.stream_stream_rpc_method_handler(
        _told(service.generate),
        request_deserializer=_reader(pb.GenerateRequest),
        response_serializer=pb.GenerateResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _reader(kind: Any) -> Callable[[bytes], Any]:
    """Return what reads a message, or None of what is none: gRPC would make INTERNAL of it."""

    def read(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return read


async def _abort(context: Context, error: Exception) -> None:
    status = status_of(error)
    await context.abort(status.code, status.sentence, status.metadata)


def _told(method: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(message: Any, context: Context) -> Any:
        try:
            return await method(message, context)
        except grpc.aio.InternalError:
            return None  # a write to a caller who has gone: nobody is there to be told
        except Exception as error:
            return await _abort(context, error)

    return call
