"""Pieces between hosts over mutual TLS: whoever is not of the cluster gets nothing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.kv.flight import PieceClient, PieceServer
from actors.kv.flight_tls import FlightTls
from actors.kv.pieces import PieceId
from tests.certificates import Files, write_certificates
from tests.kv_records import noise, piece_id

TOKEN = "a token"
SIZE = 3 * 2**20 + 5


def tls(files: Files, server_name: str | None = None) -> FlightTls:
    return FlightTls(
        certfile=str(files.cert),
        keyfile=str(files.key),
        ca_certs=str(files.ca),
        server_name=server_name,
    )


@contextlib.contextmanager
def serving(with_tls: FlightTls | None) -> Iterator[PieceServer]:
    @contextlib.contextmanager
    def open_piece(piece: PieceId) -> Iterator[memoryview]:
        with memoryview(bytearray(noise(SIZE))) as view:
            yield view

    server = PieceServer("127.0.0.1", TOKEN, open_piece, with_tls)
    server.start()
    try:
        yield server
    finally:
        server.close()


def fetch(address: str, with_tls: FlightTls | None) -> bytes:
    target = bytearray(SIZE)
    client = PieceClient(TOKEN, timeout_s=5.0, tls=with_tls)
    client.fetch(address, piece_id(1), memoryview(target))
    return bytes(target)


def test_hosts_with_certificates_of_one_authority_reach_each_other(tmp_path: Path) -> None:
    """By address, or by the one name that all certificates have where addresses come and go."""
    by_address = tls(write_certificates(tmp_path / "address"))
    by_name = tls(write_certificates(tmp_path / "name", "stores.ringspan"), "stores.ringspan")

    for each in (by_address, by_name):
        with serving(each) as server:
            assert server.address.startswith("grpc+tls://")
            assert fetch(server.address, each) == noise(SIZE)


def test_strangers_get_nothing(tmp_path: Path) -> None:
    """No certificate, another authority's, another name; and no store sends to a stranger."""
    ours = tls(write_certificates(tmp_path / "ours"))
    theirs = tls(write_certificates(tmp_path / "theirs"))
    nameless = tls(write_certificates(tmp_path / "name", "stores.ringspan"))

    with serving(ours) as server:
        with pytest.raises(ConnectionError):
            fetch(server.address, theirs)
        with pytest.raises(ConnectionError):
            fetch(server.address.replace("grpc+tls", "grpc"), None)
        assert fetch(server.address, ours) == noise(SIZE)
    with serving(nameless) as server, pytest.raises(ConnectionError):
        fetch(server.address, nameless)
    with serving(None) as server, pytest.raises(ConnectionError):
        fetch(server.address.replace("grpc", "grpc+tls"), ours)


def test_files_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    """A store says so when it starts."""
    ours = write_certificates(tmp_path / "ours")
    theirs = write_certificates(tmp_path / "theirs")
    wrong = [
        (Files(ours.ca, tmp_path / "none.pem", ours.key), "No such file"),
        (Files(ours.ca, ours.cert, theirs.key), "MISMATCH"),
        (Files(ours.key, ours.cert, ours.key), "cannot use the certificates in"),
    ]
    for files, told in wrong:
        with pytest.raises(OSError, match=told), serving(tls(files)):
            pass
