"""Pieces cross hosts whole, or with an error that says what to do; nothing else is given."""

import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow.flight as flight
import pytest

from actors.kv.flight import (
    BATCH_BYTES,
    PROBE_BYTES,
    PieceClient,
    PieceServer,
    Probe,
    Ticket,
    probe_bytes,
)
from actors.kv.pieces import BadPiece, PieceId
from tests.kv_records import noise, piece_id

TOKEN = "a token"


class Host:
    """A host with pieces, each open as long as it is being sent."""

    def __init__(self) -> None:
        self.records: dict[PieceId, bytes] = {}
        self.opened: list[PieceId] = []
        self.closed = threading.Semaphore(0)

    @contextlib.contextmanager
    def open_piece(self, piece: PieceId) -> Iterator[memoryview]:
        with memoryview(bytearray(self.records[piece])) as view:
            self.opened.append(piece)
            try:
                yield view
            finally:
                self.closed.release()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def server(host: Host) -> Iterator[PieceServer]:
    server = PieceServer("127.0.0.1", TOKEN, host.open_piece)
    server.start()
    yield server
    server.close()


def fetch(server: PieceServer, piece: PieceId, size: int, token: str = TOKEN) -> bytes:
    target = bytearray(size)
    PieceClient(token, timeout_s=5.0).fetch(server.address, piece, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("size", [1, 4096, BATCH_BYTES, 3 * BATCH_BYTES + 5, 70 * 2**20])
def test_a_record_arrives_whole(host: Host, server: PieceServer, size: int) -> None:
    """Of one batch or of many, and beyond gRPC's own limit of 4 MiB for a message."""
    host.records[piece_id(1)] = noise(size)
    assert fetch(server, piece_id(1), size) == noise(size)


def test_a_piece_is_closed_once_it_was_sent(host: Host, server: PieceServer) -> None:
    """Its lease is returned, and no sooner: then the arena may be written over."""
    host.records[piece_id(1)] = noise(5 * BATCH_BYTES)
    for _ in range(3):
        fetch(server, piece_id(1), 5 * BATCH_BYTES)
    for _ in host.opened:
        assert host.closed.acquire(timeout=5.0)


def test_a_piece_stays_open_while_its_reader_is_slow(host: Host, server: PieceServer) -> None:
    size = 64 * 2**20  # more than the connection's buffers take
    host.records[piece_id(1)] = noise(size)
    with flight.FlightClient(server.address) as client:
        reader = client.do_get(flight.Ticket(ticket(size_bytes=size, last=size).pack()))
        reader.read_chunk()
        assert not host.closed.acquire(timeout=0.2)
        reader.cancel()
        assert host.closed.acquire(timeout=5.0)


def test_what_a_host_does_not_have_is_a_key_error(server: PieceServer) -> None:
    with pytest.raises(KeyError):
        fetch(server, piece_id(1), 100)


def test_a_wrong_token_gets_nothing(host: Host, server: PieceServer) -> None:
    """Not even whether there is such a piece."""
    host.records[piece_id(1)] = noise(100)
    for piece in (piece_id(1), piece_id(2)):
        with pytest.raises(ConnectionError, match="wrong token") as raised:
            fetch(server, piece, 100, token="another")
        assert "Traceback" not in str(raised.value)
    assert host.opened == []


def ticket(**changes: object) -> Ticket:
    fields = {"piece": piece_id(1), "size_bytes": 100, "first": 0, "last": 100, "token": TOKEN}
    return Ticket(**(fields | changes))  # type: ignore[arg-type]


def test_tickets_survive_the_way() -> None:
    assert Ticket.unpack(ticket().pack()) == ticket()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        ticket().pack()[:50],
        b"x" + ticket().pack()[1:],
        ticket().pack()[:8] + b"\x02" + ticket().pack()[9:],
        ticket(first=5, last=5).pack(),
        ticket(last=101).pack(),
        ticket(token="\N{BLACK STAR}").pack()[:-1],
        ticket(token="x" * 2000).pack(),
        Probe(size_bytes=0, token=TOKEN).pack(),
        Probe(size_bytes=PROBE_BYTES + 1, token=TOKEN).pack(),
        Probe(size_bytes=1, token=TOKEN).pack()[:15],
        Probe(size_bytes=1, token="x" * 2000).pack(),
    ],
    ids=[
        *("empty", "x", "short", "magic", "version", "no bytes", "beyond", "utf-8", "long"),
        *("empty probe", "large probe", "short probe", "long probe"),
    ],
)
def test_a_malformed_ticket_is_refused_in_a_few_words(server: PieceServer, data: bytes) -> None:
    with (
        flight.FlightClient(server.address) as client,
        pytest.raises(flight.FlightServerError, match="malformed ticket") as raised,
    ):
        client.do_get(flight.Ticket(data)).read_all()
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: list(client.list_flights()),
        lambda client: list(client.list_actions()),
        lambda client: list(client.do_action("x")),
        lambda client: client.get_flight_info(flight.FlightDescriptor.for_path("x")),
        lambda client: client.get_schema(flight.FlightDescriptor.for_path("x")),
    ],
)
def test_all_else_that_flight_can_do_is_refused(
    server: PieceServer, call: Callable[[flight.FlightClient], object]
) -> None:
    with flight.FlightClient(server.address) as client, pytest.raises(NotImplementedError):
        call(client)


@pytest.mark.parametrize("size", [1, BATCH_BYTES - 1, 3 * BATCH_BYTES + 5, PROBE_BYTES])
def test_a_probe_brings_what_was_asked_for(host: Host, server: PieceServer, size: int) -> None:
    """The way that pieces take, without a piece: nothing is opened for it."""
    target = bytearray(size)
    PieceClient(TOKEN).probe(server.address, memoryview(target))
    assert target == probe_bytes(size)
    assert len({probe_bytes(100)[:50], probe_bytes(100)[50:]}) == 2
    assert host.opened == []


def test_a_probe_needs_the_token(server: PieceServer) -> None:
    """Else anybody on the network could have a host send as much as its links carry."""
    target = bytearray(100)
    with pytest.raises(ConnectionError, match="wrong token"):
        PieceClient("another").probe(server.address, memoryview(target))
    assert target == bytes(100)


def test_a_record_of_another_size_is_a_connection_error(host: Host, server: PieceServer) -> None:
    host.records[piece_id(1)] = noise(100)
    for size in (99, 101):
        with pytest.raises(ConnectionError, match="the record has 100 bytes"):
            fetch(server, piece_id(1), size)


def test_a_host_that_cannot_read_a_piece_says_so(host: Host) -> None:
    @contextlib.contextmanager
    def bad(piece: PieceId) -> Iterator[memoryview]:
        if piece.start >= 0:
            raise BadPiece("a layer is damaged")
        yield memoryview(b"")

    server = PieceServer("127.0.0.1", TOKEN, bad)
    server.start()
    with pytest.raises(ConnectionError, match="BadPiece: a layer is damaged") as raised:
        fetch(server, piece_id(1), 100)
    assert "Traceback" not in str(raised.value)
    server.close()


def test_a_dead_host_is_a_connection_error(host: Host) -> None:
    server = PieceServer("127.0.0.1", TOKEN, host.open_piece)
    server.start()
    address = server.address
    server.close()
    with pytest.raises(ConnectionError, match=address):
        PieceClient(TOKEN).fetch(address, piece_id(1), memoryview(bytearray(100)))


def test_a_host_that_came_back_is_found_again(host: Host, server: PieceServer) -> None:
    """By a client that has met it dead: at another address, as its port is another one."""
    host.records[piece_id(1)] = noise(100)
    client = PieceClient(TOKEN)
    target = memoryview(bytearray(100))
    client.fetch(server.address, piece_id(1), target)
    server.close()
    server.start()
    client.fetch(server.address, piece_id(1), target)
    assert target == noise(100)


def test_a_silent_host_is_not_waited_for(host: Host) -> None:
    """Somebody listens, but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        start_s = time.monotonic()
        with pytest.raises(ConnectionError):
            PieceClient(TOKEN, timeout_s=0.5).fetch(
                address, piece_id(1), memoryview(bytearray(100))
            )
        assert time.monotonic() - start_s < 5


def test_a_host_that_stops_in_the_middle_is_not_waited_for(host: Host) -> None:
    release = threading.Event()

    @contextlib.contextmanager
    def stuck(piece: PieceId) -> Iterator[memoryview]:
        release.wait(10.0)
        yield memoryview(bytearray(100))

    server = PieceServer("127.0.0.1", TOKEN, stuck)
    server.start()
    with pytest.raises(ConnectionError):
        PieceClient(TOKEN, timeout_s=0.5).fetch(
            server.address, piece_id(1), memoryview(bytearray(100))
        )
    release.set()
    server.close()


def test_many_threads_share_one_client(host: Host, server: PieceServer) -> None:
    for number in range(8):
        host.records[piece_id(number)] = noise(2 * BATCH_BYTES, number)
    client = PieceClient(TOKEN)

    def get(number: int) -> bool:
        target = memoryview(bytearray(2 * BATCH_BYTES))
        client.fetch(server.address, piece_id(number), target)
        return target == noise(2 * BATCH_BYTES, number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(get, [*range(8)] * 4))
    client.close()


def test_closing_does_not_wait_for_a_reader_that_stopped(host: Host) -> None:
    server = PieceServer("127.0.0.1", TOKEN, host.open_piece)
    server.start()
    host.records[piece_id(1)] = noise(64 * 2**20)
    with flight.FlightClient(server.address) as client:
        asked = ticket(size_bytes=64 * 2**20, last=64 * 2**20)
        reader = client.do_get(flight.Ticket(asked.pack()))
        reader.read_chunk()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("actors.kv.flight._CLOSE_S", 0.2)
            start_s = time.monotonic()
            server.close()
            assert time.monotonic() - start_s < 5
        reader.cancel()
