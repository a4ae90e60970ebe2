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
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from actors.kv.arena import Arena
from actors.kv.disk import DiskTier
from actors.kv.flight import PieceClient, PieceServer, keep_freed_memory
from actors.kv.loader import BlockLoader
from actors.kv.messages import Lease, RestorePart
from actors.kv.pieces import (
    Layout,
    PieceId,
    Record,
    checksum,
    write_header,
)
from cluster.bench.runs import Measured
from models.page_pool import PagePool

LAYOUT = Layout(
    num_layers=32,
    hidden_size=4096,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    block_tokens=256,
)  # of Llama 3 8B
TOKEN_BYTES = 2 * LAYOUT.num_kv_heads * LAYOUT.head_dim * 2  # of one layer
PAGE_TOKENS = 256
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
    seals: list[bytes]

    def each(self) -> Iterator[tuple[PieceId, memoryview, memoryview]]:
        """Yield every piece with its record and its target."""
        for index, piece in enumerate(self.ids):
            at = slice(index * self.size_bytes, (index + 1) * self.size_bytes)
            yield piece, self.source[at], self.target[at]


@contextlib.contextmanager
def shared_pieces(size_bytes: int, count: int) -> Iterator[Pieces]:
    """Have ``count`` pieces of random KV in an arena, about ``size_bytes`` each."""
    num_tokens = max(1, size_bytes // (LAYOUT.num_layers * TOKEN_BYTES))
    where = Record(num_layers=LAYOUT.num_layers, layer_bytes=num_tokens * TOKEN_BYTES)
    arena = Arena.create("bench", secrets.token_hex(8), where.size_bytes * count)
    try:
        ids = [PieceId(bytes([index]) * 32, 0, num_tokens, "raw") for index in range(count)]
        target = memoryview(mmap.mmap(-1, where.size_bytes * count, flags=mmap.MAP_PRIVATE))
        np.frombuffer(target, np.uint8)[:] = 1
        source = arena.view(0, where.size_bytes * count)
        pieces = Pieces(arena.path, where.size_bytes, ids, source, target, [])
        rng = np.random.default_rng(0)
        for piece, record, _ in pieces.each():
            np.frombuffer(record, np.uint8)[:] = rng.integers(0, 256, len(record), np.uint8)
            sums = [checksum(where.layer(record, layer)) for layer in range(LAYOUT.num_layers)]
            pieces.seals.append(write_header(record, piece, LAYOUT, where, sums))
        yield pieces
    finally:
        arena.close()


@contextlib.contextmanager
def memory_passes(pieces: Pieces, _: Path) -> Iterator[dict[str, Pass]]:
    """From this host's arena into a rank's pages, with and without verification; by memcpy."""
    arena, num_tokens = Arena.attach(pieces.path), pieces.ids[0].end
    num_rows = num_tokens * len(pieces.ids)
    pool = PagePool(
        num_layers=LAYOUT.num_layers,
        num_pages=-(-num_rows // PAGE_TOKENS),
        page_tokens=PAGE_TOKENS,
        num_kv_heads=LAYOUT.num_kv_heads,
        head_dim=LAYOUT.head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    pool.table.grow(0, [(0, num_rows)])
    parts = [
        RestorePart(
            rank=0,
            start=index * num_tokens,
            end=(index + 1) * num_tokens,
            block_start=index * num_tokens,
            tier="host",
            lease=Lease(
                lease_id=index,
                piece=piece,
                offset_bytes=index * pieces.size_bytes,
                size_bytes=pieces.size_bytes,
                seal=seal,
            ),
        )
        for index, (piece, seal) in enumerate(zip(pieces.ids, pieces.seals, strict=True))
    ]

    def restore(verifies: bool) -> None:
        loader = BlockLoader(pool, arena, LAYOUT, None, 0, verifies=verifies)
        damaged, _ = loader.begin(0, parts).finish()
        assert damaged is None

    def memcpy() -> None:
        for _, record, target in pieces.each():
            ctypes.memmove(_address(target), _address(record), len(target))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as memcpy has
    try:
        yield {
            "memcpy": timed(memcpy),
            "own host": timed(lambda: restore(False)),
            "own host, verified": timed(lambda: restore(True)),
        }
    finally:
        torch.set_num_threads(threads)
        arena.close()


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
        shutil.rmtree(directory / "tier")
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
    arena = Arena.attach(path)
    source = arena.view(0, arena.capacity_bytes)

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
