"""Pieces come from the nearest tier that has them whole, once, or not at all."""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.kv.arena import Arena
from actors.kv.directory import Directory
from actors.kv.disk import DiskTier
from actors.kv.flight import PieceClient
from actors.kv.host_tier import HostTier
from actors.kv.messages import Lease, Wanted
from actors.kv.pieces import PieceId
from actors.kv.stager import Stager
from tests.kv_arena import LAYOUT, SIZE_BYTES, made, piece, read

TENANT, OTHER = b"anna", "grpc://other:1"


class ScriptedClient(PieceClient):
    """Other hosts as a dictionary, with what goes wrong on the way."""

    def __init__(self) -> None:
        super().__init__("token")
        self.records: dict[PieceId, bytes] = {}
        self.before: Callable[[PieceId], None] = lambda piece: None
        self.fetched: list[PieceId] = []

    def fetch(self, address: str, piece: PieceId, target: memoryview) -> None:
        self.fetched.append(piece)
        self.before(piece)
        target[:] = self.records[piece]


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 8 * SIZE_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def host(arena: Arena) -> HostTier:
    return HostTier(arena, Directory(arena.capacity_bytes, arena.capacity_bytes, 100.0), LAYOUT)


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    disk = DiskTier(tmp_path, 1 << 30, LAYOUT)
    disk.open()
    return disk


@pytest.fixture
def client() -> Iterator[ScriptedClient]:
    client = ScriptedClient()
    yield client
    client.close()


@pytest.fixture
def stager(host: HostTier, disk: DiskTier, client: ScriptedClient) -> Iterator[Stager]:
    stager = Stager(host, disk, client, LAYOUT, timeout_s=10.0)
    yield stager
    stager.close()
    host.check_invariants()


def wanted(piece: PieceId, address: str | None = OTHER) -> Wanted:
    return Wanted(piece=piece, size_bytes=SIZE_BYTES, flight_address=address)


def check(arena: Arena, lease: Lease | None, piece: PieceId) -> None:
    assert lease is not None
    record = arena.view(lease.offset_bytes, lease.size_bytes)
    read(record, piece, lease.seal)
    assert record == made(piece)


def test_the_nearest_tier_is_used(
    arena: Arena, host: HostTier, disk: DiskTier, client: ScriptedClient, stager: Stager
) -> None:
    """Disk before network, arena before both; what came is there for the next."""
    disk.write(piece(0), TENANT, memoryview(made(piece(0))))
    client.records = {piece(0): made(piece(0)), piece(1): made(piece(1))}
    for _ in range(2):
        asked = [piece(0), piece(1), piece(2)]
        leases = stager.stage([wanted(each) for each in asked], TENANT, "rank")
        check(arena, leases[0], piece(0))
        check(arena, leases[1], piece(1))
        assert leases[2] is None

    assert sorted(client.fetched) == sorted([piece(1), piece(2), piece(2)])
    assert stager.stats()["disk"]["staged"] == 1
    assert stager.stats()["remote"]["staged_bytes"] == SIZE_BYTES
    assert stager.stats()["remote"]["missing"] == 2
    assert (host.stats()["hits"], host.stats()["leases"]) == (2, 4)


def test_damaged_file_is_removed_and_the_other_host_asked(
    arena: Arena, disk: DiskTier, client: ScriptedClient, stager: Stager
) -> None:
    """A record that was bad before it was written: the file itself is whole."""
    bad = bytearray(made(piece(0)))
    bad[-1] ^= 1
    disk.write(piece(0), TENANT, memoryview(bad))
    client.records = {piece(0): made(piece(0))}

    [lease] = stager.stage([wanted(piece(0))], TENANT, "rank")

    check(arena, lease, piece(0))
    assert disk.find(piece(0).key) == []
    assert stager.stats()["disk"]["damaged"] == 1


def test_what_cannot_be_had_whole_leaves_nothing(
    host: HostTier, client: ScriptedClient, stager: Stager
) -> None:
    """Damaged, swapped, missing or unreachable: no lease, no bytes kept, and it is counted."""

    def fail(piece: PieceId) -> None:
        if piece == lost:
            raise ConnectionError("the other host is gone")

    lost, damaged, swapped, missing = (piece(number) for number in range(4))
    client.before = fail
    bad = bytearray(made(damaged))
    bad[300] ^= 4
    client.records = {damaged: bytes(bad), swapped: made(lost)}

    leases = stager.stage([wanted(each) for each in (lost, damaged, swapped, missing)], TENANT, "a")

    assert leases == [None] * 4
    counts = stager.stats()["remote"]
    assert (counts["failed"], counts["damaged"], counts["missing"]) == (1, 2, 1)
    assert (host.stats()["used_bytes"], host.stats()["leases"]) == (0, 0)


def test_a_piece_that_many_want_comes_once(
    arena: Arena, client: ScriptedClient, stager: Stager
) -> None:
    """Several ranks and requests ask for the same prefix at once; its transfer is shared."""
    client.records = {piece(0): made(piece(0))}
    may_go = threading.Event()
    client.before = lambda piece: assert_true(may_go.wait(10))
    results: list[Lease | None] = []
    threads = [
        threading.Thread(
            target=lambda: results.extend(stager.stage([wanted(piece(0))] * 2, TENANT, "rank"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    may_go.set()
    for thread in threads:
        thread.join(10)

    assert len(results) == 8
    for lease in results:
        check(arena, lease, piece(0))
    assert client.fetched == [piece(0)]
    assert len({lease.lease_id for lease in results if lease}) == 8


def assert_true(value: bool) -> None:
    assert value


def test_transfers_run_in_parallel(client: ScriptedClient, stager: Stager) -> None:
    """One stream does not fill a fast link: four must be under way at once."""
    asked = [piece(number) for number in range(4)]
    client.records = {each: made(each) for each in asked}
    together = threading.Barrier(4)
    client.before = lambda piece: assert_true(together.wait(10) >= 0)

    assert None not in stager.stage([wanted(each) for each in asked], TENANT, "rank")


def test_full_arena_gives_none(host: HostTier, client: ScriptedClient, stager: Stager) -> None:
    """The caller computes what does not fit; what is leased stays untouched."""
    asked = [piece(number) for number in range(12)]
    client.records = {each: made(each) for each in asked}

    leases = stager.stage([wanted(each) for each in asked], TENANT, "rank")

    assert sum(lease is not None for lease in leases) == 8
    assert host.stats()["refused"] == 4
    host.release([lease.lease_id for lease in leases if lease])
    assert None not in stager.stage([wanted(each) for each in asked[8:]], TENANT, "rank")


def test_what_is_too_slow_is_not_waited_for(
    host: HostTier, client: ScriptedClient, stager: Stager
) -> None:
    """A request does not hang on a host that does."""
    may_go = threading.Event()
    client.before = lambda piece: assert_true(may_go.wait(10))
    client.records = {piece(0): made(piece(0))}
    slow = Stager(host, None, client, LAYOUT, timeout_s=0.05)

    assert slow.stage([wanted(piece(0))], TENANT, "rank") == [None]

    may_go.set()
    slow.close()


def test_a_tenant_cleared_during_the_transfer_gets_nothing(
    host: HostTier, client: ScriptedClient, stager: Stager
) -> None:
    """What was on its way when all was to be forgotten must not reappear."""
    client.records = {piece(0): made(piece(0))}
    client.before = lambda piece: assert_true(host.clear(TENANT) == 1)

    assert stager.stage([wanted(piece(0))], TENANT, "rank") == [None]
    assert host.stats()["used_bytes"] == 0


def test_a_transfer_longer_than_leases_last_keeps_its_place(
    arena: Arena, disk: DiskTier, client: ScriptedClient
) -> None:
    """Else its range would be given to another piece while it is still being written."""
    now_s = 0.0
    directory = Directory(arena.capacity_bytes, arena.capacity_bytes, 1.0)
    host = HostTier(arena, directory, LAYOUT, clock=lambda: now_s)
    stager = Stager(host, disk, client, LAYOUT, timeout_s=10.0)
    client.records = {piece(0): made(piece(0))}

    def pass_time(_: PieceId) -> None:
        nonlocal now_s
        now_s = 1000.0
        host.expire()

    client.before = pass_time
    [lease] = stager.stage([wanted(piece(0))], TENANT, "rank")
    check(arena, lease, piece(0))
    stager.close()
