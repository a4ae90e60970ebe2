"""Records of pieces from one host to another, over Arrow Flight.

A ticket names a piece, a range of its record's bytes, and the cluster's token. The range
comes as batches of one column of bytes, straight from where the record lies, and is copied
once, into where it shall lie. Everything else that Flight can do is refused.
"""

import ctypes
import hmac
import struct
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from actors.kv.pieces import KEY_BYTES, PieceId

VERSION = 1  # of tickets: others are refused
BATCH_BYTES = 2**20  # Flight joins what came of a batch once more, in the cache if it is small
RANGE_BYTES = 64 * 2**20  # of one call; the time limit is for so much
_MAGIC = b"RINGSPTK"
# magic, version, key, start, end, encoding, bytes of the record, first, last; then the token
_TICKET = struct.Struct(f"<8sI{KEY_BYTES}sII16sQQQ")
_MAX_TOKEN_BYTES = 1024
_SCHEMA = pa.schema([pa.field("bytes", pa.uint8(), nullable=False)])
_MISSING = b"missing"  # with the error that becomes a KeyError
_CLOSE_S = 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 2**20
_CHANNEL_OPTIONS = [("grpc.http2.max_frame_size", 2**24 - 1)]  # the most; else 16 KiB

OpenPiece = Callable[[PieceId], AbstractContextManager[memoryview]]


def keep_freed_memory() -> None:
    """Have this whole process keep freed memory instead of returning it to the system.

    For a process that fetches pieces, once at its start: gRPC allocates and frees as many
    bytes as it receives, and glibc's returning them costs a third of the time in page
    faults. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a client asks for: bytes ``first`` to ``last`` of a record of ``size_bytes``."""

    piece: PieceId
    size_bytes: int
    first: int
    last: int
    token: str

    def pack(self) -> bytes:
        """Return the bytes that cross."""
        piece = self.piece
        fixed = _TICKET.pack(
            _MAGIC,
            VERSION,
            piece.key,
            piece.start,
            piece.end,
            piece.encoding.encode(),
            self.size_bytes,
            self.first,
            self.last,
        )
        return fixed + self.token.encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Ticket":
        """Return a ticket.

        Raises:
            ValueError: It is none of this version.
        """
        if not 0 <= len(data) - _TICKET.size <= _MAX_TOKEN_BYTES:
            raise ValueError("a ticket of a wrong length")
        magic, version, key, start, end, encoding, size, first, last = _TICKET.unpack_from(data)
        if (magic, version) != (_MAGIC, VERSION) or not first < last <= size:
            raise ValueError("no ticket of this version")
        piece = PieceId(key, start, end, encoding.rstrip(b"\0").decode())
        token = data[_TICKET.size :].decode()
        return cls(piece=piece, size_bytes=size, first=first, last=last, token=token)


class PieceServer:
    """Gives pieces to other hosts. ``open_piece`` raises KeyError for what is not there.

    A piece is held open until the last of its bytes has left Arrow's hands, in whichever
    thread that happens.
    """

    def __init__(self, host: str, token: str, open_piece: OpenPiece) -> None:
        self._host = host
        self._token = token
        self._open_piece = open_piece
        self._server: _Server | None = None

    def start(self) -> None:
        """Listen on a port that the system chooses.

        Raises:
            OSError: The host is none of this machine's.
        """
        self._server = _Server(f"grpc://{self._host}:0", self._token, self._open_piece)

    @property
    def address(self) -> str:
        """Where to ask: ``grpc://host:port``. Only while it runs."""
        if self._server is None:
            raise RuntimeError("the piece server was not started")
        return f"grpc://{self._host}:{self._server.port}"

    def close(self) -> None:
        """Stop listening; streams under way have a few seconds to end."""
        if self._server is None:
            return
        # It waits for streams without a limit of its own, and a client may have stopped reading.
        stopper = threading.Thread(target=self._server.shutdown, daemon=True)
        self._server = None
        stopper.start()
        stopper.join(_CLOSE_S)


class PieceClient:
    """Fetches pieces from other hosts. Thread-safe; connections are kept and shared."""

    def __init__(self, token: str, timeout_s: float = 10.0) -> None:
        self._token = token
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connections: dict[str, Any] = {}

    def fetch(self, address: str, piece: PieceId, target: memoryview) -> None:
        """Copy a record from another host into ``target``, which has its size.

        Raises:
            KeyError: That host does not have it (any more).
            ConnectionError: It cannot be reached, sends nothing for too long, refuses, or has a
                record of another size; what ``target`` holds must not be used.
        """
        for first in range(0, len(target), RANGE_BYTES):
            last = min(first + RANGE_BYTES, len(target))
            ticket = Ticket(
                piece=piece, size_bytes=len(target), first=first, last=last, token=self._token
            )
            try:
                self._fetch(address, ticket, target[first:last])
            except (pa.ArrowException, OSError) as error:
                if getattr(error, "extra_info", b"") == _MISSING:
                    raise KeyError(piece) from None
                self._forget(address)
                [reason, *_] = str(error).splitlines() or [type(error).__name__]
                raise ConnectionError(f"no piece from {address}: {reason}") from None

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._connections.clear()

    def _fetch(self, address: str, ticket: Ticket, target: memoryview) -> None:
        options = flight.FlightCallOptions(timeout=self._timeout_s)
        reader = self._connection(address).do_get(flight.Ticket(ticket.pack()), options)
        to_bytes = np.frombuffer(target, np.uint8)
        at = 0
        for chunk in reader:
            if not chunk.data.schema.equals(_SCHEMA):
                raise ConnectionError("it sent something else than bytes")
            # Refuses what it would have to copy.
            part = chunk.data.column(0).to_numpy(zero_copy_only=True)
            if at + len(part) > len(target):
                raise ConnectionError("it sent too many bytes")
            np.copyto(to_bytes[at : at + len(part)], part)
            at += len(part)
        if at != len(target):
            raise ConnectionError(f"it sent {at} of {len(target)} bytes")

    def _connection(self, address: str) -> Any:
        with self._lock:
            if address not in self._connections:
                self._connections[address] = flight.FlightClient(
                    address, generic_options=_CHANNEL_OPTIONS
                )
            return self._connections[address]

    def _forget(self, address: str) -> None:
        """Have the next call connect anew. Other threads' calls on the old one go on."""
        with self._lock:
            self._connections.pop(address, None)


class _Server(flight.FlightServerBase):
    def __init__(self, location: str, token: str, open_piece: OpenPiece) -> None:
        self._token = token.encode()
        self._open_piece = open_piece
        super().__init__(location)

    def do_get(self, context: Any, ticket: Any) -> Any:
        try:
            asked = Ticket.unpack(ticket.ticket)
        except ValueError:
            raise flight.FlightServerError("malformed ticket") from None
        if not hmac.compare_digest(asked.token.encode(), self._token):
            raise flight.FlightUnauthenticatedError("wrong token")
        with ExitStack() as opened:
            try:
                record = opened.enter_context(self._open_piece(asked.piece))
            except KeyError:
                raise flight.FlightServerError("no such piece", _MISSING) from None
            except Exception as error:
                raise flight.FlightServerError(f"{type(error).__name__}: {error}") from None
            if len(record) != asked.size_bytes:
                raise flight.FlightServerError(f"the record has {len(record)} bytes")
            return _stream(record[asked.first : asked.last], opened.pop_all())


class _Held:
    """What Arrow holds on to while it has bytes of a piece."""


def _stream(part: memoryview, opened: ExitStack) -> Any:
    """Return batches that lie where the piece lies; it is closed once they have all gone."""
    held = _Held()
    # Arrow may still be sending when the last batch has been taken: what says that it has
    # finished is that nothing holds the bytes any more.
    weakref.finalize(held, opened.close).atexit = False
    # The address alone: a buffer of the view's own would keep the view from being released.
    whole = pa.foreign_buffer(pa.py_buffer(part).address, len(part), held)
    part.release()
    batches = []
    for start in range(0, whole.size, BATCH_BYTES):
        size = min(BATCH_BYTES, whole.size - start)
        column = pa.Array.from_buffers(pa.uint8(), size, [None, whole.slice(start, size)])
        batches.append(pa.RecordBatch.from_arrays([column], schema=_SCHEMA))
    return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(_SCHEMA, batches))
