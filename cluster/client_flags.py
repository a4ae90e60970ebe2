"""Flags of commands that ask a running server."""

import argparse
import os

from cluster.api_keys import KEY_VARIABLE
from cluster.client import Client
from cluster.tls import ClientTls
from configs import ConfigError

# Of them, those that make no sense without a server.
CLIENT_FLAGS = ("api_key", "tls", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_FILES = {
    "--ssl-ca-certs": "PEM: who signs the server's certificate (the system's authorities)",
    "--ssl-certfile": "PEM: for a server that asks for a certificate",
    "--ssl-keyfile": "PEM: of the certificate",
}


def add_client_flags(parser: argparse.ArgumentParser, *, target: str | None, text: str) -> None:
    """Add ``--target``, with this default and help, and how the server is reached."""
    group = parser.add_argument_group("server")
    group.add_argument("--target", metavar="HOST:PORT", default=target, help=text)
    group.add_argument(
        "--api-key", metavar="KEY", help=f"for the server; {KEY_VARIABLE} is not shown by lists"
    )
    group.add_argument("--tls", action="store_true", default=None, help="implied by the next three")
    for name, file in _TLS_FILES.items():
        group.add_argument(name, metavar="FILE", help=file)


def make_client(options: argparse.Namespace) -> Client:
    """Return the handle that the flags ask for.

    Raises:
        ClusterError: The key or a file cannot be used.
    """
    files = options.ssl_ca_certs, options.ssl_certfile, options.ssl_keyfile
    tls = None
    if options.tls or any(files):
        tls = ClientTls(ca_certs=files[0], certfile=files[1], keyfile=files[2])
    key = options.api_key or os.environ.get(KEY_VARIABLE)
    return Client(options.target, api_key=key, tls=tls)


def refuse_client_flags(options: argparse.Namespace) -> None:
    """Refuse what is for a server where none is named.

    Raises:
        ConfigError: Such a flag is given.
    """
    for name in CLIENT_FLAGS:
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is for --target HOST:PORT")
