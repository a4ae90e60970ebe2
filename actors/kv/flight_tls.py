"""TLS between the KV stores of several hosts: each shows a certificate, and checks the other's."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FlightTls:
    """PEM files of one host, read by its store when it starts."""

    certfile: str
    keyfile: str
    ca_certs: str  # who signs the certificates of all hosts
    # That all hosts' certificates have. None: each host's has the address it is reached by.
    server_name: str | None

    def check(self) -> None:
        """Refuse what no other host could be reached with.

        Raises:
            OSError: A file cannot be read, is no PEM, or the key is another certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password="")
            context.load_verify_locations(self.ca_certs)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"{self.certfile}, {self.keyfile} and {self.ca_certs}"
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise OSError(f"cannot use the certificates in {files}: {reason}") from None

    def server_options(self) -> dict[str, Any]:
        """Return the arguments of a Flight server."""
        return {
            "tls_certificates": [(_read(self.certfile), _read(self.keyfile))],
            "verify_client": True,
            "root_certificates": _read(self.ca_certs),
        }

    def client_options(self) -> dict[str, Any]:
        """Return the arguments of a Flight client."""
        return {
            "tls_root_certs": _read(self.ca_certs),
            "cert_chain": _read(self.certfile),
            "private_key": _read(self.keyfile),
            "override_hostname": self.server_name,
        }


def _read(file: str) -> bytes:
    return Path(file).read_bytes()
