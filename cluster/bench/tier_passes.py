"""One pass over a set of pieces through each tier of the KV store, and through its yardstick.

A pass brings every piece from where the tier has it into private memory, which has been
touched before, as a rank does. Its yardstick moves the same bytes between the same kinds of
memory with what the system gives: memcpy, a TCP socket, read().
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from actors.kv.disk import DiskTier
from actors.kv.flight import PieceClient, PieceServer, keep_freed_memory
from actors.kv.pieces import (
    ALIGNMENT,
    Layout,
    PieceId,
    Record,
    checksum,
    copy_verified,
    read_header,
    write_header,
)
from cluster.bench.runs import Measured

LAYOUT = Layout(
    num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=256
)  # of Llama 3 8B
MAX_PIECES = 256  # a byte tells them apart
_TENANT = b"bench"
_INDEX = struct.Struct("<I")  # of the piece that is asked for over TCP
_READ_BYTES = 2**20  # of one read(): at once, what is not cached takes longer
_START_S = 60.0  # for the other process to be up
Pass = Callable[[int], Measured]  # takes the number of the round, as `interleave` gives it


@dataclass(frozen=True)
class Pieces:
    """Records of one size, one after the other in shared memory, and where they shall go."""

    path: Path  # of the shared memory
    size_bytes: int  # of each record
    ids: Sequence[PieceId]
    source: memoryview
    target: memoryview

    def each(self) -> Iterator[tuple[PieceId, memoryview, memoryview]]:
        """Yield every piece with its record and its target."""
        for index, piece in enumerate(self.ids):
            at = slice(index * self.size_bytes, (index + 1) * self.size_bytes)
            yield piece, self.source[at], self.target[at]


@contextlib.contextmanager
def shared_pieces(size_bytes: int, count: int) -> Iterator[Pieces]:
    """Have ``count`` pieces of random bytes in shared memory; records of at most ``size_bytes``."""
    prefix = Record(num_layers=LAYOUT.num_layers, layer_bytes=0).payload_offset
    # As in models, whose layers have multiples of the alignment.
    layer_bytes = (size_bytes - prefix) // LAYOUT.num_layers // ALIGNMENT * ALIGNMENT
    where = Record(num_layers=LAYOUT.num_layers, layer_bytes=layer_bytes)
    path = Path("/dev/shm") / f"ringspan-bench-{secrets.token_hex(8)}"
    total_bytes = where.size_bytes * count
    try:
        with path.open("xb") as file:
            file.truncate(total_bytes)
        ids = [PieceId(bytes([index]) * 32, 0, 256, "raw") for index in range(count)]
        target = memoryview(mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE))
        np.frombuffer(target, np.uint8)[:] = 1
        pieces = Pieces(path, where.size_bytes, ids, attach(path), target)
        rng = np.random.default_rng(0)
        for piece, record, _ in pieces.each():
            np.frombuffer(record, np.uint8)[:] = rng.integers(0, 256, len(record), np.uint8)
            sums = [checksum(where.layer(record, layer)) for layer in range(LAYOUT.num_layers)]
            write_header(record, piece, LAYOUT, where, sums)
        yield pieces
    finally:
        path.unlink(missing_ok=True)


def attach(path: Path) -> memoryview:
    """Map shared memory that is there."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0))


@contextlib.contextmanager
def memory_passes(pieces: Pieces, _: Path) -> Iterator[dict[str, Pass]]:
    """From this host's shared memory, with and without verification, and by memcpy."""

    def own_host(verifies: bool) -> None:
        for piece, record, target in pieces.each():
            where, sums = read_header(record, piece, LAYOUT)
            for layer, expected in enumerate(sums):
                from_bytes, to_bytes = where.layer(record, layer), where.layer(target, layer)
                if verifies:
                    copy_verified(from_bytes, to_bytes, expected)
                else:
                    to_bytes[:] = from_bytes

    def memcpy() -> None:
        for _, record, target in pieces.each():
            ctypes.memmove(_address(target), _address(record), len(target))

    yield {
        "memcpy": timed(memcpy),
        "own host": timed(lambda: own_host(False)),
        "own host, verified": timed(lambda: own_host(True)),
    }


@contextlib.contextmanager
def network_passes(pieces: Pieces, _: Path) -> Iterator[dict[str, Pass]]:
    """From another process over loopback, with Flight and by a TCP socket."""
    keep_freed_memory()
    token = secrets.token_hex(16)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(pieces.path, pieces.size_bytes, token, theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(_START_S):
            raise RuntimeError("the benchmark's other process did not start")
        flight_address, tcp_address = ours.recv()
        client = PieceClient(token)
        with socket.create_connection(tcp_address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def tcp() -> None:
                for piece, _, target in pieces.each():
                    connection.sendall(_INDEX.pack(piece.key[0]))
                    while target:
                        target = target[connection.recv_into(target) :]

            def flight() -> None:
                for piece, _, target in pieces.each():
                    client.fetch(flight_address, piece, target)

            yield {"TCP": timed(tcp), "another host": timed(flight)}
        client.close()
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def cached_disk_passes(pieces: Pieces, directory: Path) -> Iterator[dict[str, Pass]]:
    """From files in the page cache, by the disk tier and by read()."""
    with _on_disk(pieces, directory) as disk:
        yield {"read, cached": timed(disk.read), "disk, cached": timed(disk.tier)}


@contextlib.contextmanager
def disk_passes(pieces: Pieces, directory: Path) -> Iterator[dict[str, Pass]]:
    """From files that the page cache has forgotten, by the disk tier and by read()."""
    with _on_disk(pieces, directory) as disk:
        yield {
            "read": timed(disk.read, before=disk.forget),
            "disk": timed(disk.tier, before=disk.forget),
        }


@dataclass(frozen=True)
class _OnDisk:
    read: Callable[[], None]
    tier: Callable[[], None]
    forget: Callable[[], None]


@contextlib.contextmanager
def _on_disk(pieces: Pieces, directory: Path) -> Iterator[_OnDisk]:
    """Have the pieces in a disk tier, and their records in files of their own."""
    disk = DiskTier(directory / "tier", 4 * len(pieces.source), LAYOUT)
    disk.open()
    plain = []
    for index, (piece, record, _) in enumerate(pieces.each()):
        disk.write(piece, _TENANT, record)
        plain.append(directory / f"plain-{index}")
        with plain[-1].open("xb") as file:
            file.write(record)
            os.fsync(file.fileno())
    files = plain + list(disk.directory.rglob("*.arrow"))

    def tier() -> None:
        for piece, _, target in pieces.each():
            disk.read_into(piece, target)

    def read() -> None:
        for path, (_, _, target) in zip(plain, pieces.each(), strict=True):
            with path.open("rb", buffering=0) as file:
                while target:
                    target = target[file.readinto(target[:_READ_BYTES]) :]

    try:
        yield _OnDisk(read, tier, lambda: _forget(files))
    finally:
        disk.clear()
        for path in plain:
            path.unlink()


def timed(action: Callable[[], None], before: Callable[[], None] = lambda: None) -> Pass:
    """Return a pass that measures an action, and not what comes before it."""

    def run(_: int) -> Measured:
        before()
        start_s = time.perf_counter()
        action()
        return Measured(time.perf_counter() - start_s)

    return run


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _forget(paths: Sequence[Path]) -> None:
    """Have the page cache forget files that have been synced."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _serve(path: Path, size_bytes: int, token: str, told: Connection) -> None:
    """Be the other host: tell where pieces are to be had, and give them until killed."""
    source = attach(path)

    def record(index: int) -> memoryview:
        return source[index * size_bytes : (index + 1) * size_bytes]

    @contextlib.contextmanager
    def open_piece(piece: PieceId) -> Iterator[memoryview]:
        yield record(piece.key[0])

    server = PieceServer("127.0.0.1", token, open_piece)
    server.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.send((server.address, listener.getsockname()))
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while asked := connection.recv(_INDEX.size, socket.MSG_WAITALL):
                connection.sendall(record(*_INDEX.unpack(asked)))
