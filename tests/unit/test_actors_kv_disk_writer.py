"""Writing through to disk never stops the store, whatever the disk does."""

import errno
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.kv.arena import Arena
from actors.kv.directory import Directory
from actors.kv.disk import DiskTier
from actors.kv.disk_writer import DiskWriter
from actors.kv.host_tier import HostTier
from actors.kv.pieces import PieceId
from tests.kv_arena import LAYOUT, SIZE_BYTES, fill, made, piece

DISK_BYTES = 1 << 30
TENANT = b"anna"


class BadDisk(DiskTier):
    """A disk that is full, or that waits to be told, before it writes."""

    is_full = False
    go: threading.Event | None = None
    asked = 0

    def write(self, piece: PieceId, tenant: bytes, record: memoryview) -> bool:
        self.asked += 1
        if self.go is not None:
            assert self.go.wait(10)
        if self.is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return super().write(piece, tenant, record)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 16 * SIZE_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def host(arena: Arena) -> HostTier:
    return HostTier(arena, Directory(arena.capacity_bytes, arena.capacity_bytes, 100.0), LAYOUT)


@pytest.fixture
def disk(tmp_path: Path) -> BadDisk:
    disk = BadDisk(tmp_path, DISK_BYTES, LAYOUT)
    disk.open()
    return disk


def store(host: HostTier, arena: Arena, piece: PieceId) -> list[tuple[PieceId, bytes]]:
    [lease] = host.reserve(TENANT, "writer", [(piece, SIZE_BYTES)], expires=True)
    assert lease is not None
    seal = fill(arena.view(lease.offset_bytes, lease.size_bytes), piece)
    return host.commit([(lease.lease_id, seal)])


def wait_until_idle(writer: DiskWriter) -> dict[str, int]:
    deadline_s = time.monotonic() + 10
    while writer.stats()["queued"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return writer.stats()


def test_what_is_committed_comes_to_disk(arena: Arena, host: HostTier, disk: BadDisk) -> None:
    """It is then there after a restart; a second writing of it is passed over."""
    writer = DiskWriter(host, disk)
    writer.start()
    committed = store(host, arena, piece(0))
    writer.put(committed + committed)
    writer.close()

    record = bytearray(SIZE_BYTES)
    disk.read_into(piece(0), memoryview(record))
    assert record == made(piece(0))
    assert writer.stats()["not_needed"] == 1
    assert host.stats()["leases"] == 0


def test_a_full_disk_is_left_alone_for_a_while(
    arena: Arena, host: HostTier, disk: BadDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Asking it for each piece would cost time and log lines, and then it has room again."""
    writer = DiskWriter(host, disk, pause_s=0.2)
    writer.start()
    disk.is_full = True
    writer.put([*store(host, arena, piece(0)), *store(host, arena, piece(1))])
    stats = wait_until_idle(writer)
    assert (stats["writes_failed"], stats["writes_skipped"], disk.asked) == (1, 1, 1)
    assert "no space left" in caplog.text

    disk.is_full = False
    time.sleep(0.25)
    writer.put(store(host, arena, piece(2)))
    writer.close()

    assert disk.find(piece(2).key) == [(piece(2), SIZE_BYTES)]
    assert host.stats()["leases"] == 0


def test_a_slow_disk_costs_pieces_not_time(arena: Arena, host: HostTier, disk: BadDisk) -> None:
    """What the queue cannot take is skipped and counted, at once."""
    disk.go = threading.Event()
    writer = DiskWriter(host, disk, queue_pieces=2)
    writer.start()
    for number in range(8):
        begin_s = time.monotonic()
        writer.put(store(host, arena, piece(number)))
        assert time.monotonic() - begin_s < 1
    assert writer.stats()["queue_full"] >= 5  # one is being written, two wait
    disk.go.set()
    writer.close()
    assert disk.stats()["files"] == 8 - writer.stats()["queue_full"]


@pytest.mark.parametrize("how", ["drop", "clear"])
def test_what_is_forgotten_while_it_is_written_does_not_stay_on_disk(
    arena: Arena, host: HostTier, disk: BadDisk, how: str
) -> None:
    """A tenant that was cleared is cleared; a bad piece does not come back after a restart."""
    disk.go = threading.Event()
    writer = DiskWriter(host, disk)
    writer.start()
    writer.put(store(host, arena, piece(0)))
    while not disk.asked:
        time.sleep(0.001)
    if how == "drop":
        host.drop([piece(0)])
    else:
        host.clear(TENANT)
    disk.go.set()
    writer.close()

    assert disk.find(piece(0).key) == []
    assert host.stats()["used_bytes"] == 0


def test_what_is_damaged_in_the_arena_is_not_written(
    arena: Arena, host: HostTier, disk: BadDisk
) -> None:
    """A record whose header is not what was committed is dropped from the arena instead."""
    writer = DiskWriter(host, disk)
    committed = store(host, arena, piece(0))
    arena.view(0, 1)[0] ^= 1
    writer.start()
    writer.put(committed)
    writer.close()

    assert disk.find(piece(0).key) == []
    assert not host.holds(piece(0))
    assert (writer.stats()["gone_before_write"], host.stats()["dropped"]) == (1, 1)
