"""A host's store as its ranks meet it: real shared memory, disk and transfers, many threads."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from actors.kv.arena import SHARED_MEMORY, Arena
from actors.kv.disk import DiskTier
from actors.kv.flight import PROBE_BYTES
from actors.kv.messages import Found, Lease, StoreInfo, StoreSpec, Wanted
from actors.kv.pieces import BadPiece, PieceId
from actors.kv.store import KVStore
from tests.kv_arena import LAYOUT, SIZE_BYTES, fill, made, piece, read

ANNA, BERT = b"anna", b"bert"


class Rank:
    """What a rank does with a store: it maps the arena, and never sees the store's memory."""

    def __init__(self, store: KVStore, info: StoreInfo, name: str = "rank") -> None:
        self.store, self.name, self.address = store, name, info.flight_address
        self.arena = Arena.attach(info.arena_path)

    def view(self, lease: Lease) -> memoryview:
        return self.arena.view(lease.offset_bytes, lease.size_bytes)

    def write(self, *pieces: PieceId, tenant: bytes = ANNA) -> None:
        wanted = [(each, SIZE_BYTES) for each in pieces]
        done = []
        for lease in self.store.reserve(tenant, self.name, wanted):
            if lease is not None:
                done.append((lease.lease_id, fill(self.view(lease), lease.piece)))
        self.store.commit(done)

    def stage(self, *pieces: PieceId, address: str | None = None) -> list[Lease | None]:
        wanted = [Wanted(piece=p, size_bytes=SIZE_BYTES, flight_address=address) for p in pieces]
        return self.store.stage(wanted, ANNA, self.name)

    def has(self, piece: PieceId, address: str | None = None) -> bool:
        """Return whether a piece is to be had, and check that it is what was written."""
        [lease] = self.stage(piece, address=address)
        if lease is None:
            return False
        record = self.view(lease)
        read(record, piece, lease.seal)
        assert record == made(piece)
        assert self.store.release([lease.lease_id]) == []
        return True


@pytest.fixture
def spec(tmp_path: Path) -> StoreSpec:
    return StoreSpec(
        host="host",
        layout=LAYOUT,
        capacity_bytes=16 * SIZE_BYTES,
        cluster=f"test{uuid.uuid4().hex[:12]}",
        token="a token",
        disk_directory=str(tmp_path / "disk"),
        disk_bytes=1 << 30,
    )


Start = Callable[..., Rank]


@pytest.fixture
def start(spec: StoreSpec) -> Iterator[Start]:
    stores: list[KVStore] = []

    def start(**changes: object) -> Rank:
        store = KVStore(replace(spec, **changes))  # type: ignore[arg-type]
        rank = Rank(store, store.start())
        stores.append(store)
        return rank

    yield start
    for store in stores:
        store.close()


def idle(store: KVStore) -> dict[str, dict[str, int]]:
    """Wait until all is on disk that will be; return the counters."""
    deadline_s = time.monotonic() + 10
    while store.stats()["disk"]["queued"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return store.stats()


def test_what_one_rank_wrote_another_reads(start: Start) -> None:
    """Through shared memory; nothing is leased in the end."""
    rank = start()
    pieces = [piece(0, 0, 8), piece(0, 8, 16), piece(1)]
    rank.write(*pieces)

    found = rank.store.find([piece(0).key, piece(7).key, piece(1).key])

    assert found == [Found(piece=each, tier="host", size_bytes=SIZE_BYTES) for each in pieces]
    assert all(rank.has(each) for each in pieces)
    assert not rank.has(piece(7))
    assert idle(rank.store)["host"]["leases"] == 0
    assert rank.store.reserve(ANNA, "rank", [(piece(1), SIZE_BYTES)]) == [None]


def test_pieces_survive_a_restart_on_disk(start: Start) -> None:
    """A store that closes writes what is under way; the next one finds and reads it."""
    rank = start()
    rank.write(*(piece(number) for number in range(10)))
    arena_path = rank.arena.path
    rank.store.close()
    assert not arena_path.exists()

    rank = start()
    keys = [piece(number).key for number in range(10)]
    assert {each.tier for each in rank.store.find(keys)} == {"disk"}
    assert all(rank.has(piece(number)) for number in range(10))
    assert [each.tier for each in rank.store.find(keys)] == ["host"] * 10
    assert rank.store.stats()["disk"]["staged"] == 10


def test_an_evicted_piece_comes_back_from_disk(start: Start) -> None:
    """The arena holds 16 pieces of 40; all can be had."""
    rank = start()
    for number in range(40):
        rank.write(piece(number))
        idle(rank.store)
    assert rank.store.stats()["host"]["evicted"] == 24
    assert all(rank.has(piece(number)) for number in range(40))


def test_damaged_files_are_not_used(start: Start, tmp_path: Path) -> None:
    """The piece is recomputed, the file removed, and nothing raised."""
    rank = start()
    rank.write(piece(0), piece(1))
    rank.store.close()
    for path in (tmp_path / "disk").rglob("*.arrow"):
        if piece(0).key.hex() in path.name:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 16
            path.write_bytes(data)

    rank = start()
    assert not rank.has(piece(0))
    assert rank.has(piece(1))
    assert rank.store.find([piece(0).key]) == []
    assert rank.store.stats()["disk"]["damaged"] == 1


def test_pieces_come_from_another_host(start: Start) -> None:
    """From its arena and from its disk; what it has not, is bad or is unreachable is None."""
    there, here = start(host="there"), start(host="here", disk_directory=None)
    address = there.address
    there.write(piece(0), piece(1), piece(2))
    idle(there.store)
    there.store._host.drop([piece(1)])  # now on its disk alone
    [lease] = there.stage(piece(2))
    assert lease is not None
    there.view(lease)[SIZE_BYTES - 1] ^= 1

    assert here.has(piece(0), address)
    assert here.has(piece(1), address)
    assert not here.has(piece(2), address)
    assert not here.has(piece(3), address)
    there.store.close()
    assert not here.has(piece(4), address)
    assert here.has(piece(0), address)
    remote = here.store.stats()["remote"]
    assert [remote[each] for each in ("staged", "damaged", "missing", "failed")] == [2, 1, 1, 1]


def test_other_hosts_get_what_is_whole_on_disk(start: Start) -> None:
    """Where the arena's record is overwritten, the sender notices by its header."""
    there, here = start(host="there"), start(host="here", disk_directory=None)
    there.write(piece(0))
    idle(there.store)
    [lease] = there.stage(piece(0))
    assert lease is not None
    fill(there.view(lease), piece(1))

    assert here.has(piece(0), there.address)
    assert there.store.stats()["host"]["dropped"] == 1


def test_the_end_of_a_batch_is_evicted_first(start: Start) -> None:
    """Of blocks in a row the first is worth most: without it the others are of no use."""
    rank = start(disk_directory=None)
    row = [piece(number) for number in range(16)]
    rank.write(*row)
    rank.write(piece(100), piece(101))
    found = {each.piece for each in rank.store.find([each.key for each in row])}
    assert found == set(row[:14])
    for lease in rank.stage(*row[:14]):
        assert lease is not None
        rank.store.release([lease.lease_id])
    rank.write(*(piece(number) for number in range(200, 208)))
    found = {each.piece for each in rank.store.find([each.key for each in row])}
    assert found == set(row[:8])


def test_another_token_gets_nothing(start: Start) -> None:
    """Another cluster on the same network must not read this one's KV."""
    there, here = start(host="there"), start(host="here", disk_directory=None, token="another")
    there.write(piece(0))
    assert not here.has(piece(0), there.address)


def test_a_killed_writers_place_is_free_again(start: Start) -> None:
    """It dies while it writes: no call to the store comes, only time passes."""
    rank = start(lease_s=0.4)
    [lease] = rank.store.reserve(ANNA, "dying", [(piece(0), SIZE_BYTES)])
    assert lease is not None
    with Process(rank.arena.path) as process:
        process.ask("fill", lease)
        process.kill()
    assert rank.store.stats()["host"]["leases"] == 1
    deadline_s = time.monotonic() + 10
    while rank.store.stats()["host"]["leases"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)

    assert rank.store.stats()["host"]["used_bytes"] == 0
    rank.store.commit([(lease.lease_id, bytes(16))])  # too late
    assert rank.store.find([piece(0).key]) == []
    assert rank.store.release([lease.lease_id]) == [lease.lease_id]
    rank.write(piece(0))
    assert rank.has(piece(0))


def test_leases_of_a_lost_rank_end_at_once(start: Start) -> None:
    """Who knows that a rank is gone need not wait for its leases to expire."""
    rank = start()
    rank.write(piece(0))
    idle(rank.store)
    rank.stage(piece(0))
    rank.store.reserve(ANNA, rank.name, [(piece(1), SIZE_BYTES)])

    assert rank.store.end_owner(rank.name) == 2
    assert rank.store.stats()["host"]["leases"] == 0
    assert rank.store.stats()["host"]["used_bytes"] == rank.store.stats()["host"]["pieces"] * (
        SIZE_BYTES
    )


def test_leases_of_an_earlier_store_mean_nothing(start: Start) -> None:
    """A rank that outlived its store must not end another's leases, or commit for it."""
    old = start()
    leases = old.store.reserve(ANNA, "rank", [(piece(n), SIZE_BYTES) for n in range(4)])
    ids = [lease.lease_id for lease in leases if lease]
    old.store.close()
    new = start()
    new.store.reserve(ANNA, "rank", [(piece(n), SIZE_BYTES) for n in range(4)])

    assert new.store.release(ids) == ids
    new.store.commit([(each, bytes(16)) for each in ids])
    assert new.store.find([piece(0).key]) == []
    assert new.store.stats()["host"]["leases"] == 4


def test_a_bad_piece_is_dropped_everywhere(start: Start) -> None:
    """Else it would come back from disk."""
    rank = start()
    rank.write(piece(0), piece(1))
    idle(rank.store)
    rank.store.drop([piece(0)])
    assert rank.store.find([piece(0).key, piece(1).key]) == rank.store.find([piece(1).key])
    assert not rank.has(piece(0))
    assert rank.has(piece(1))
    rank.write(piece(0))
    assert rank.has(piece(0))


def test_clearing_a_tenant_leaves_the_others(start: Start) -> None:
    """In the arena, on disk and after a restart."""
    rank = start()
    rank.write(piece(0), tenant=ANNA)
    rank.write(piece(1), tenant=BERT)
    idle(rank.store)
    rank.store.clear(ANNA)
    assert [each.piece for each in rank.store.find([piece(0).key, piece(1).key])] == [piece(1)]
    rank.store.close()
    rank = start()
    assert [each.piece for each in rank.store.find([piece(0).key, piece(1).key])] == [piece(1)]
    rank.store.clear()
    assert rank.store.find([piece(0).key, piece(1).key]) == []


def test_one_tenant_may_fill_its_share_only(start: Start) -> None:
    """Half the arena: the other half is for the others."""
    rank = start(tenant_share=0.5)
    rank.write(piece(100), tenant=BERT)
    rank.write(*(piece(number) for number in range(12)), tenant=ANNA)
    assert rank.store.stats()["host"]["pieces"] == 9
    assert {each.tier for each in rank.store.find([piece(100).key])} == {"host"}


def test_verify_finds_what_is_damaged(start: Start, tmp_path: Path) -> None:
    """Without waiting for somebody to read it."""
    rank = start()
    rank.write(*(piece(number) for number in range(4)))
    idle(rank.store)
    [lease] = rank.stage(piece(2))
    assert lease is not None
    rank.view(lease)[SIZE_BYTES // 2] ^= 1
    path = next(p for p in (tmp_path / "disk").rglob("*.arrow") if piece(3).key.hex() in p.name)
    path.write_bytes(path.read_bytes()[:-1])

    counts = rank.store.verify()

    assert counts["host"] == {"good": 3, "bad": 1}
    assert counts["disk"] == {"verified": 3, "bad": 1, "vanished": 0}
    tiers = {each.piece: each.tier for each in rank.store.find([piece(n).key for n in range(4)])}
    assert tiers == {piece(0): "host", piece(1): "host", piece(2): "disk", piece(3): "host"}


def test_the_disk_is_measured_and_left_as_it_was(start: Start, tmp_path: Path) -> None:
    """Neither a piece nor a counter changes, nor is anything evicted to make room."""
    rank = start(disk_bytes=3 * SIZE_BYTES + 3 * 4096)
    rank.write(*(piece(number) for number in range(3)))
    before = idle(rank.store)
    files = {*(tmp_path / "disk").rglob("*.arrow")}

    for num_bytes in (1, 1001, 3 << 20):
        measured = rank.store.measure_disk(num_bytes)
        assert measured is not None
        assert all(seconds > 0 for seconds in measured)

    assert {path for path in (tmp_path / "disk").rglob("*") if path.is_file()} - files == {
        next((tmp_path / "disk").glob("*.json"))
    }
    assert files <= {*(tmp_path / "disk").rglob("*.arrow")}
    assert rank.store.stats() == before
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        rank.store.measure_disk(0)


def test_a_store_without_a_disk_measures_none(start: Start) -> None:
    """The profiler asks every store."""
    assert start(disk_directory=None).store.measure_disk(1000) is None


def test_measuring_a_disk_reads_what_it_wrote(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checksums of a piece: a time without them would promise too much."""

    def damage(path: str) -> None:
        with Path(path).open("r+b") as file:
            file.seek(-3000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-3000, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr("actors.kv.disk._forget_cached", damage)
    rank = start()
    with pytest.raises(BadPiece, match="damaged"):
        rank.store.measure_disk(1 << 20)
    assert not list((tmp_path / "disk").rglob("*.arrow"))


def test_a_disk_that_is_full_cannot_be_measured(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and leaves nothing of the half that it wrote."""
    rank = start()

    def fsync(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("actors.kv.disk_file.os.fsync", fsync)
    with pytest.raises(OSError, match="no space left"):
        rank.store.measure_disk(1 << 20)
    assert [p for p in (tmp_path / "disk").rglob("*") if p.is_file() and p.suffix != ".json"] == []


def test_the_way_from_another_host_is_measured(start: Start) -> None:
    """Nothing is staged for it, and it needs no piece."""
    there, here = start(host="there"), start(host="here", disk_directory=None)
    for num_bytes in (1, 1001, 3 << 20):
        assert here.store.probe_remote(there.address, num_bytes) > 0
    assert here.store.stats()["remote"]["staged"] == 0
    assert here.store.stats()["host"]["used_bytes"] == 0


def test_a_probe_that_cannot_be_is_an_error(start: Start) -> None:
    """Of another cluster's token, of a size that fills memory, or of a host that is gone."""
    there, here = start(host="there"), start(host="here", disk_directory=None, token="another")
    with pytest.raises(ConnectionError, match="wrong token"):
        here.store.probe_remote(there.address, 1000)
    for num_bytes in (-1, 0, PROBE_BYTES + 1):
        with pytest.raises(ValueError, match="a probe has 1 to"):
            here.store.probe_remote(there.address, num_bytes)
    there.store.close()
    with pytest.raises(ConnectionError):
        here.store.probe_remote(there.address, 1000)


def test_a_damaged_probe_is_no_measurement(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are verified, as those of a piece are."""
    there, here = start(host="there"), start(host="here", disk_directory=None)
    monkeypatch.setattr("actors.kv.flight.probe_bytes", lambda size: bytes(size))
    with pytest.raises(ConnectionError, match="damaged"):
        here.store.probe_remote(there.address, 1000)


def test_a_full_disk_stops_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena serves as before; the counters tell."""

    def write(*_: object) -> bool:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(DiskTier, "write", write)
    rank = start()
    rank.write(*(piece(number) for number in range(4)))
    assert all(rank.has(piece(number)) for number in range(4))
    stats = idle(rank.store)
    assert (stats["disk"]["writes_failed"], stats["disk"]["writes_skipped"]) == (1, 3)


def test_a_store_that_cannot_start_leaves_no_arena(spec: StoreSpec, tmp_path: Path) -> None:
    """Each failed start would else take memory until the machine restarts."""
    (tmp_path / "file").touch()
    store = KVStore(replace(spec, disk_directory=str(tmp_path / "file" / "disk")))
    with pytest.raises(OSError, match="file"):
        store.start()
    assert not list(SHARED_MEMORY.glob(f"ringspan-*{spec.cluster}*"))


def test_the_store_imports_neither_torch_nor_ray() -> None:
    """Its process must be up in a moment, and small."""
    code = "import sys, actors.kv.store; print({'torch', 'ray'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


class Process:
    """Another process that maps the arena; see `tests.kv_arena.main`."""

    def __init__(self, arena_path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_arena", str(arena_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ask(self, what: str, lease: Lease) -> str:
        of, stdin, stdout = lease.piece, self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        place = [lease.offset_bytes, lease.size_bytes, lease.seal.hex()]
        print(json.dumps([what, of.key.hex(), of.start, of.end, *place]), file=stdin, flush=True)
        return stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def churn(rank: Rank, seed: int, rounds: int, process: Process | None) -> int:
    """Write and read random pieces; return how many were read. Any wrong byte raises."""
    rng, num_read = random.Random(seed), 0
    for _ in range(rounds):
        pieces = [piece(number) for number in rng.sample(range(40), 3)]
        if rng.random() < 0.5:
            leases = rank.store.reserve(ANNA, rank.name, [(each, SIZE_BYTES) for each in pieces])
            for lease in filter(None, leases):
                if rng.random() < 0.2:
                    rank.store.abort([lease.lease_id])
                    continue
                if process is None:
                    seal = fill(rank.view(lease), lease.piece)
                else:
                    seal = bytes.fromhex(process.ask("fill", lease))
                rank.store.commit([(lease.lease_id, seal)])
            continue
        leases = rank.stage(*pieces)
        for lease in filter(None, leases):
            if process is None:
                read(rank.view(lease), lease.piece, lease.seal)
                time.sleep(0.0005)
                # Nobody evicts or overwrites it as long as it is leased.
                assert rank.view(lease) == made(lease.piece)
            else:
                assert process.ask("read", lease) == "good"
            num_read += 1
        assert rank.store.release([lease.lease_id for lease in leases if lease]) == []
    return num_read


@pytest.mark.parametrize("with_disk", [True, False])
def test_many_at_once_read_what_was_written(start: Start, spec: StoreSpec, with_disk: bool) -> None:
    """Forty pieces in an arena of sixteen: what is leased is never touched by what comes."""
    rank = start(disk_directory=spec.disk_directory if with_disk else None)
    with Process(rank.arena.path) as process, ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(churn, rank, seed, 60, None) for seed in range(5)]
        futures.append(pool.submit(churn, rank, 5, 60, process))
        num_read = [future.result(60) for future in futures]
    stats = idle(rank.store) if with_disk else rank.store.stats()

    assert min(num_read) > 0
    assert stats["host"]["evicted"] > 0
    assert stats["host"]["dropped"] == 0
    assert stats["host"]["leases"] == 0
    assert stats["host"]["used_bytes"] == stats["host"]["pieces"] * SIZE_BYTES
    rank.store._host.check_invariants()
    assert rank.store.verify()["host"]["bad"] == 0


def test_counters_of_the_tiers_do_not_hide_each_other(start: Start) -> None:
    """Those of the disk come from three places."""
    rank = start()
    store = rank.store
    assert store._writer
    assert store._disk
    names = [*store._writer.stats(), *store._disk.stats(), *store._stager.stats()["disk"]]
    assert sorted(store.stats()["disk"]) == sorted(names)
    assert all(type(n) is int for tier in store.stats().values() for n in tier.values())


def test_calls_go_on_while_the_disk_works(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk must not hold up a step: no lock is held while it reads or writes."""
    may_go, waiting = threading.Event(), threading.Event()
    write = DiskTier.write

    def slow(self: DiskTier, piece: PieceId, tenant: bytes, record: memoryview) -> bool:
        waiting.set()
        assert may_go.wait(10)
        return write(self, piece, tenant, record)

    monkeypatch.setattr(DiskTier, "write", slow)
    rank = start()
    rank.write(piece(0))
    assert waiting.wait(10)
    rank.write(piece(1))
    assert rank.has(piece(0))
    assert rank.has(piece(1))
    may_go.set()


def test_stale_record_under_a_good_header_is_noticed(start: Start) -> None:
    """A writer whose lease had expired writes over what is there now: the seal tells."""
    rank = start()
    rank.write(piece(0))
    [lease] = rank.stage(piece(0))
    assert lease is not None
    fill(rank.view(lease), piece(0), seed=1)
    with pytest.raises(BadPiece, match="header"):
        read(rank.view(lease), piece(0), lease.seal)
