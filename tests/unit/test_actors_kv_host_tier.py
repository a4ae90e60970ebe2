"""The arena's tier for many threads: who reads pins, and whoever ends a reading never waits."""

import threading
import uuid
from collections.abc import Iterator

import pytest

from actors.kv.arena import Arena
from actors.kv.directory import Directory
from actors.kv.host_tier import HostTier
from actors.kv.pieces import BadPiece
from tests.kv_arena import LAYOUT, SIZE_BYTES, fill, made, piece


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 2 * SIZE_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def host(arena: Arena) -> HostTier:
    """Return a tier of two places that holds pieces 0 and 1."""
    host = HostTier(arena, Directory(arena.capacity_bytes, arena.capacity_bytes, 100.0), LAYOUT)
    for number in range(2):
        [lease] = host.reserve(b"anna", "rank", [(piece(number), SIZE_BYTES)], expires=True)
        assert lease is not None
        with host.writing(lease) as record:
            host.commit([(lease.lease_id, fill(record, piece(number)))])
    return host


def test_what_is_being_read_stays(host: HostTier) -> None:
    """Also while the store itself reads; then it can go."""
    wanted = [(piece(2), SIZE_BYTES), (piece(3), SIZE_BYTES)]
    with host.reading(piece(0), "disk", counts_as_use=False) as record:
        leases = host.reserve(b"anna", "rank", wanted, expires=True)
        assert [lease is not None for lease in leases] == [True, False]
        assert record == made(piece(0))
    [lease] = host.reserve(b"anna", "rank", wanted[1:], expires=True)
    assert lease is not None
    assert host.stats()["leases"] == 2


def test_a_reading_may_end_while_a_decision_is_made(host: HostTier) -> None:
    """What ends a transfer runs when Arrow frees its bytes: to wait there would be for ever."""
    reading = host.reading(piece(0), "flight", counts_as_use=True)
    reading.__enter__()
    with host._lock:
        ended = threading.Thread(target=lambda: reading.__exit__(None, None, None), daemon=True)
        ended.start()
        ended.join(5)
        assert not ended.is_alive()
    assert host.stats()["leases"] == 0


def test_writing_that_is_not_committed_leaves_nothing(host: HostTier) -> None:
    """Whatever went wrong in between."""
    host.clear(None)
    [lease] = host.reserve(b"anna", "rank", [(piece(5), SIZE_BYTES)], expires=False)
    assert lease is not None
    with pytest.raises(ZeroDivisionError), host.writing(lease):
        raise ZeroDivisionError
    assert (host.stats()["used_bytes"], host.stats()["leases"]) == (0, 0)


def test_damage_that_a_reader_finds_drops_the_piece(host: HostTier, arena: Arena) -> None:
    """In the header at once; in a layer when the reader says so."""
    arena.view(0, 1)[0] ^= 1
    with (
        pytest.raises(BadPiece, match="no record"),
        host.reading(piece(0), "disk", counts_as_use=False),
    ):
        pass
    with (
        pytest.raises(BadPiece, match="by me"),
        host.reading(piece(1), "disk", counts_as_use=False),
    ):
        raise BadPiece("found by me")
    with pytest.raises(KeyError), host.reading(piece(1), "disk", counts_as_use=False):
        pass
    stats = host.stats()
    assert (stats["dropped"], stats["leases"], stats["used_bytes"]) == (2, 0, 0)
