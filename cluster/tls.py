"""TLS of servers and clients: PEM files, read once, and refused in one sentence."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from actors.errors import ClusterError
from configs import ConfigError, ServerConfig


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """A server's certificate with its key, and who signs those of clients."""

    certfile: Path
    keyfile: Path
    ca_certs: Path | None  # None: clients need no certificate

    @classmethod
    def of(cls, config: ServerConfig) -> "ServerTls | None":
        """Return what a configuration asks for; None: no TLS.

        Raises:
            ConfigError: A file cannot be read, is no PEM, or the key is another certificate's.
        """
        if config.ssl_certfile is None or config.ssl_keyfile is None:
            return None
        ca_certs = None if config.ssl_ca_certs is None else Path(config.ssl_ca_certs)
        tls = cls(
            certfile=Path(config.ssl_certfile), keyfile=Path(config.ssl_keyfile), ca_certs=ca_certs
        )
        # Both servers find what is wrong only when a client comes, and say it in few words.
        _check(tls.certfile, tls.keyfile, tls.ca_certs)
        return tls

    def uvicorn_options(self) -> dict[str, Any]:
        """Return the arguments of `uvicorn.Config`."""
        need = ssl.CERT_NONE if self.ca_certs is None else ssl.CERT_REQUIRED
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_ca_certs": None if self.ca_certs is None else str(self.ca_certs),
            "ssl_cert_reqs": need,
        }

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return the same for gRPC."""
        ca_certs = None if self.ca_certs is None else self.ca_certs.read_bytes()
        pair = self.keyfile.read_bytes(), self.certfile.read_bytes()
        return grpc.ssl_server_credentials(
            [pair], root_certificates=ca_certs, require_client_auth=ca_certs is not None
        )


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """Whom a client trusts, and what it shows; without files the system's authorities."""

    ca_certs: str | Path | None = None
    certfile: str | Path | None = None  # for a server that asks for one
    keyfile: str | Path | None = None

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """Return it for gRPC.

        Raises:
            ClusterError: A file cannot be read, is no PEM, or the key is another certificate's.
        """
        if (self.certfile is None) != (self.keyfile is None):
            raise ClusterError("certfile and keyfile of a client go together: give both")
        paths = [None if name is None else Path(name) for name in vars(self).values()]
        ca_certs, certfile, keyfile = paths
        try:
            _check(certfile, keyfile, ca_certs)
        except ConfigError as error:
            raise ClusterError(str(error)) from None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(ca_certs),
            private_key=_read(keyfile),
            certificate_chain=_read(certfile),
        )


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _check(certfile: Path | None, keyfile: Path | None, ca_certs: Path | None) -> None:
    """Refuse files with which no connection could ever be made."""
    for path in (certfile, keyfile, ca_certs):
        try:
            _read(path)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certfile is not None:
            # A password is never asked for: nobody may sit at this terminal.
            context.load_cert_chain(certfile, keyfile, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{certfile} and {keyfile} are no certificate and its key in PEM, without a password:"
            f" {_reason(error)}"
        ) from None
    try:
        if ca_certs is not None:
            context.load_verify_locations(ca_certs)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca_certs} holds no certificates in PEM: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
