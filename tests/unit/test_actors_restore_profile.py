"""Rates of restores are found in the profile, or measured on ranks and stores; all may fail."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors import restore_profile
from actors.profile_file import ProfileFile, RestoreFacts
from actors.restore_profile import SIZES_BYTES, find_restore_rates, measure_tiers
from models.rates import Affine
from models.restore_rates import RestoreRates
from tests.checkpoints import write_llama_checkpoint
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores
from tests.unit.test_actors_profile_file import FACTS
from tests.unit.test_models_restore_rates import RATES

ALONE = RestoreFacts(block_tokens=256, host_dtype="auto", disk_directory=None)
WITH_DISK = dataclasses.replace(ALONE, disk_directory="/disk")
READ, WRITE, REMOTE = Affine(1e-3, 1e9), Affine(2e-3, 5e8), Affine(1e-2, 1e8)


@dataclasses.dataclass
class FakeRanks:
    """Ranks that say what a test says they measured."""

    rates: RestoreRates | None = RATES
    calls: list[str] = dataclasses.field(default_factory=list)

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> list[Any]:
        self.calls.append(method)
        await asyncio.sleep(0)
        return [self.rates] * 2 if method == "profile_restore" else [None] * 2


class FakeStore:
    """A store whose disk and network take times by laws."""

    def __init__(
        self,
        host: str,
        read: Affine | None = READ,
        write: Affine = WRITE,
        remote: dict[str, Affine] | None = None,
    ) -> None:
        self.host = host
        self.flight_address = f"grpc://{host}"
        self._read, self._write, self._remote = read, write, remote or {}
        self.asked: list[tuple[Any, ...]] = []

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        self.asked.append((method, *args))
        await asyncio.sleep(0)
        if method == "measure_disk":
            (num_bytes,) = args
            return None if self._read is None else (self._read(num_bytes), self._write(num_bytes))
        assert method == "probe_remote"
        address, num_bytes = args
        assert address != self.flight_address
        return self._remote.get(address, REMOTE)(num_bytes)


class LostStore(FakeStore):
    """One that does not answer."""

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        raise TimeoutError


@pytest.fixture
def file(tmp_path: Path) -> ProfileFile:
    return ProfileFile(str(tmp_path), FACTS)


def found(
    file: ProfileFile,
    ranks: FakeRanks,
    stores: Sequence[FakeStore],
    facts: RestoreFacts = ALONE,
    *,
    refresh: bool = False,
    link_bytes_per_s: float | None = None,
) -> RestoreRates | None:
    return asyncio.run(
        find_restore_rates(
            ranks,
            stores,
            file,
            facts,
            refresh=refresh,
            timeout_s=10.0,
            link_bytes_per_s=link_bytes_per_s,
        )
    )


def close(law: Affine | None, expected: Affine) -> bool:
    assert law is not None
    return dataclasses.astuple(law) == pytest.approx(dataclasses.astuple(expected))


def test_rates_are_measured_once(file: ProfileFile) -> None:
    """The next start finds them and asks nobody."""
    first = found(file, FakeRanks(), [FakeStore("a")], WITH_DISK)
    ranks, store = FakeRanks(), FakeStore("a")

    assert found(file, ranks, [store], WITH_DISK) == first
    assert ranks.calls == []
    assert store.asked == []
    assert first is not None
    assert close(first.disk_read, READ)
    assert close(first.disk_write, WRITE)
    assert first.remote is None


def test_one_host_without_a_disk_has_no_tiers(file: ProfileFile) -> None:
    """Then no store is asked, and no rank computes in vain."""
    ranks, store = FakeRanks(), FakeStore("a")

    assert found(file, ranks, [store]) == RATES
    assert ranks.calls == ["profile_restore"]
    assert store.asked == []


def test_refresh_measures_anew(file: ProfileFile) -> None:
    """And writes the file over."""
    found(file, FakeRanks(), [FakeStore("a")])
    other = dataclasses.replace(RATES, load=Affine(1.0, 1.0))

    assert found(file, FakeRanks(other), [FakeStore("a")], refresh=True) == other
    assert found(file, FakeRanks(), [FakeStore("a")]) == other


def test_without_rates_nothing_is_kept(file: ProfileFile) -> None:
    """There was no room to measure; the next start may have it."""
    store = FakeStore("a")

    assert found(file, FakeRanks(None), [store], WITH_DISK) is None
    assert store.asked == []
    assert found(file, FakeRanks(), [store]) == RATES


def test_ranks_compute_while_tiers_are_measured(file: ProfileFile) -> None:
    """A disk is read by a process that shares the cores."""
    ranks = FakeRanks()

    found(file, ranks, [FakeStore("a")], WITH_DISK)

    assert ranks.calls[0] == "profile_restore"
    assert set(ranks.calls[1:]) == {"compute_for"}


def test_a_throttled_link_is_not_in_the_file(file: ProfileFile) -> None:
    """Each start caps the machine's own rates by its own configuration."""
    slow = found(file, FakeRanks(), [FakeStore("a")], link_bytes_per_s=1e6)
    slower = found(file, FakeRanks(), [FakeStore("a")], link_bytes_per_s=1e5)

    assert slow is not None
    assert slower is not None
    assert (slow.load.bytes_per_s, slower.load.bytes_per_s) == (1e6, 1e5)
    assert found(file, FakeRanks(), [FakeStore("a")]) == RATES


def test_the_slowest_host_and_pair_count() -> None:
    """A restore has ended when all of its parts have."""
    slow = Affine(5e-2, 1e7)
    stores = [
        FakeStore("a"),
        FakeStore("b", read=Affine(3e-3, 1e9)),
        FakeStore("c", write=Affine(2e-3, 1e7), remote={"grpc://b": slow}),
    ]

    tiers = asyncio.run(measure_tiers(stores))

    assert close(tiers.disk_read, Affine(3e-3, 1e9))
    assert close(tiers.disk_write, Affine(2e-3, 1e7))
    assert close(tiers.remote, slow)


def test_stores_answer(tmp_path: Path) -> None:
    """The stores' own methods, over two hosts with disks; nothing is left there."""
    checkpoint = write_llama_checkpoint(tmp_path / "model")
    with (
        ThreadStores(checkpoint, num_hosts=2, disk_directory=tmp_path / "disk") as stores,
        ThreadCluster(checkpoint, 2, stores=stores) as cluster,
    ):
        assert cluster.finder is not None
        tiers = asyncio.run(measure_tiers(list(cluster.finder._stores.values())))

        assert None not in tiers
        stores.check_all_returned()
        left = [file for file in (tmp_path / "disk").rglob("*") if file.is_file()]
        assert all(file.stat().st_size < min(SIZES_BYTES) for file in left)


def test_every_pair_of_few_hosts_is_measured() -> None:
    """In both directions, small and large; of many hosts each has so many neighbours."""
    stores = [FakeStore(str(host)) for host in range(6)]

    asyncio.run(measure_tiers(stores[:3]))
    pairs = {(store.host, *asked[1:]) for store in stores for asked in store.asked if asked[2:]}
    assert pairs == {
        (host, f"grpc://{source}", size)
        for host in "012"
        for source in "012"
        for size in SIZES_BYTES
        if host != source
    }

    asyncio.run(measure_tiers(stores))
    sources = {asked[1] for asked in stores[5].asked if asked[0] == "probe_remote"}
    assert sources == {"grpc://0", "grpc://1", "grpc://2"}


def test_a_lost_store_does_not_count(file: ProfileFile) -> None:
    """The others do, for now; the next start measures anew where nobody answered."""
    tiers = asyncio.run(measure_tiers([FakeStore("a"), LostStore("b")]))
    assert close(tiers.disk_read, READ)

    nothing = found(file, FakeRanks(), [LostStore("a"), LostStore("b")], WITH_DISK)
    assert nothing == RATES
    later = found(file, FakeRanks(), [FakeStore("a"), FakeStore("b")], WITH_DISK)
    assert later is not None
    assert close(later.remote, REMOTE)


def test_stores_without_disks_have_no_disk_rates() -> None:
    """They say so at once."""
    stores = [FakeStore("a", read=None), FakeStore("b", read=None)]

    tiers = asyncio.run(measure_tiers(stores))

    assert (tiers.disk_read, tiers.disk_write) == (None, None)
    assert close(tiers.remote, REMOTE)


def test_a_slow_tier_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the sixth run of a disk that takes seconds; the one that warms up counts."""
    monkeypatch.setattr(restore_profile, "PATIENCE_S", 0.0)
    store = FakeStore("a")

    tiers = asyncio.run(measure_tiers([store]))

    assert len(store.asked) == len(SIZES_BYTES)
    assert close(tiers.disk_read, READ)
