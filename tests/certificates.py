"""Certificates of an authority made for one test."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Files:
    """One authority, and one certificate that it has signed, in PEM."""

    ca: Path
    cert: Path
    key: Path


def write_certificates(directory: Path, *names: str) -> Files:
    """Make an authority, and a certificate for the names (this machine's loopback if none)."""
    directory.mkdir()
    authority = trustme.CA()
    issued = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
    files = Files(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    authority.cert_pem.write_to_path(str(files.ca))
    files.key.write_bytes(issued.private_key_pem.bytes())
    files.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return files
