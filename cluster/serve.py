"""``ringspan serve``: a model behind OpenAI's HTTP API and gRPC, until Ctrl-C or SIGTERM.

uvicorn runs in the command's own process, beside Ray's driver. `app` is the same under Ray Serve.
"""

import argparse
import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.cluster_info import ClusterInfo
from cluster.api_keys import KEY_VARIABLE, read_api_keys
from cluster.arguments import add_cluster_flags, cluster_options
from cluster.backend import ClusterBackend
from cluster.http.app import build_app
from cluster.http.settings import Settings
from cluster.launch import RunningCluster, read_config
from cluster.metered import MeteredBackend
from cluster.serving import rpc_server, until_stopped
from cluster.tls import ServerTls
from configs import Config, ConfigError

if TYPE_CHECKING:
    from ray.serve import Application

# A peer that vanished without a word, as with its machine, is noticed within half a minute: who is
# silent is asked after 10 s, and what is sent must arrive within 20.
DEAD_PEERS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000),
)
# Flag names are keys of `server` with dashes for underscores.
SERVER_FLAGS: dict[str, dict[str, Any]] = {
    "--host": {"help": "address to listen at (127.0.0.1)"},
    "--port": {"type": int, "help": "of HTTP; 0: any that is free (8000)"},
    "--grpc-port": {"type": int, "help": "0: any that is free (50051)"},
    "--served-model-name": {
        "action": "append",
        "metavar": "NAME",
        "help": "that clients ask for; may be repeated (the directory's name)",
    },
    "--api-key-file": {"metavar": "FILE", "help": "with a key on each line, each a tenant"},
    "--ssl-certfile": {"metavar": "FILE", "help": "PEM: HTTP and gRPC are served over TLS"},
    "--ssl-keyfile": {"metavar": "FILE", "help": "PEM: of the certificate"},
    "--ssl-ca-certs": {
        "metavar": "FILE",
        "help": "PEM: clients must show a certificate signed by one of these",
    },
    "--max-requests": {"type": int, "help": "prompts under way at once, more are refused (512)"},
    "--grace-s": {"type": float, "help": "for running requests to end at a stop (15)"},
}


def app(arguments: Mapping[str, Any]) -> "Application":
    """Return the server as an application of Ray Serve: ``import_path: cluster.serve:app``.

    See `cluster.ray_serve.application`.
    """
    from cluster.ray_serve import application  # Ray Serve takes a second to import

    return application(arguments)


def add_command(commands: Any) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser("serve", help="serve a model by OpenAI's HTTP API and gRPC")
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"clients must send one of these, each a tenant; may be repeated. {KEY_VARIABLE} is"
        " one more, which no list of processes shows",
    )
    for name, settings in SERVER_FLAGS.items():
        group.add_argument(name, **settings)
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status."""
    config = _config(options)
    keys = read_api_keys(options.api_key, config.server.api_key_file)
    settings = Settings.of(config, keys)
    tls = ServerTls.of(config.server)
    # The ports are taken before minutes go into loading the model.
    _bind(settings.host, settings.grpc_port, "--grpc-port").close()  # gRPC opens it itself
    with _bind(settings.host, settings.port, "--port") as listener:
        if not keys and settings.ssl_ca_certs is None and not _is_loopback(listener):
            print(
                "ringspan: everybody who reaches this address can use the model: set"
                f" {KEY_VARIABLE} or --api-key-file",
                file=sys.stderr,
            )
        return _serve(config, settings, tls, listener)


def _config(options: argparse.Namespace) -> Config:
    given = cluster_options(options)
    keys = [name.removeprefix("--").replace("-", "_") for name in SERVER_FLAGS]
    server = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    file, overrides = given.pop("config_file"), given.pop("overrides")
    return read_config(options.model, file, overrides, {**given, "server": server})


def _bind(host: str, port: int, flag: str) -> socket.socket:
    """Return a socket that holds the address, or say in one sentence why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, option, value in DEAD_PEERS:
            listener.setsockopt(level, option, value)  # connections inherit them
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error, flag) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError, flag: str) -> ConfigError:
    return ConfigError(
        f"cannot listen at {host} port {port}: {os.strerror(error.errno or 0).lower()}; give"
        f" another --host or {flag}"
    )


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def _serve(
    config: Config, settings: Settings, tls: ServerTls | None, listener: socket.socket
) -> int:
    print(f"ringspan: loading {settings.names[0]} ...", flush=True)
    with RunningCluster(config) as cluster:
        backend = MeteredBackend(ClusterBackend(cluster), settings.names[0])
        app = build_app(backend, settings)

        async def serve() -> None:
            rpc = rpc_server(settings, backend, tls)
            grpc_port = await rpc.start()
            welcome = _welcome(listener, grpc_port, settings, cluster.info)
            try:
                await until_stopped(app, listener, welcome, settings.grace_s, rpc, tls)
            except OSError as error:
                raise _cannot_listen(settings.host, settings.port, error, "--port") from None
            finally:
                await rpc.stop(0.0)
            await backend.close()

        asyncio.run(serve())
    print("ringspan: stopped", flush=True)
    return 0


def _welcome(listener: socket.socket, grpc_port: int, settings: Settings, info: ClusterInfo) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    where = f"http{'' if settings.ssl_certfile is None else 's'}://{host}:{port}"
    keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key"
    return (
        f"ringspan: serving {', '.join(settings.names)} at {where}/v1 ({info.num_ranks} ranks,"
        f" up to {info.max_model_len} tokens, {keys}); {where}/health, {where}/metrics; gRPC at"
        f" {host}:{grpc_port}"
    )
