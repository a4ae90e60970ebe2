"""Rates of restores are measured under load, are all ranks' own, and leave nothing in the store."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from actors import restore_profiler, stopwatch
from actors.kv.arena import Arena
from actors.kv.link import DirectLink
from actors.restore_profiler import measure_restore
from models.kv_codec import ENCODINGS, Encoding
from models.restore_rates import RestoreRates
from tests.checkpoints import write_checkpoint, write_llama_checkpoint
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_profiler, "PROJECTED_TOKENS", (16, 64))
    monkeypatch.setattr(restore_profiler, "COMPUTED_TOKENS", {"cpu": 16})
    monkeypatch.setattr(restore_profiler, "MOST_PIECES", 4)
    monkeypatch.setattr(stopwatch, "REPEATS", 2)


class WrappedLink(DirectLink):
    """The arena itself, with something done to every range."""

    def __init__(self, arena: Arena, change: Callable[[memoryview], memoryview]) -> None:
        super().__init__(arena)
        self._change = change
        self.threads: set[str] = set()

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = 1.0
    ) -> Iterator[memoryview]:
        self.threads.add(threading.current_thread().name)
        return map(self._change, super().fetch(ranges, patience_s))


def profiled(cluster: ThreadCluster) -> list[RestoreRates | None]:
    """Return what every rank measured."""
    return cluster.ranks.run(lambda ring: cluster.workers[ring.rank].profile_restore())


def measured(
    cluster: ThreadCluster,
    change: Callable[[memoryview], memoryview] = lambda view: view,
    encoding: Encoding = "raw",
) -> tuple[RestoreRates | None, WrappedLink]:
    """Return what one rank measures over a link, and the link."""
    worker = cluster.workers[0]
    store = worker._executor.store
    assert store is not None
    link = WrappedLink(store.arena, change)

    def measure(ring: Any) -> RestoreRates | None:
        return measure_restore(
            worker._decoder, ring, store.arena, store.layout, store.client, link, encoding=encoding
        )

    return cluster.ranks.run(measure)[0], link


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_all_ranks_have_the_same_rates(checkpoint: Path, num_ranks: int) -> None:
    """Any of them may be written down; and every place in the stores is given back."""
    with (
        ThreadStores(checkpoint, num_hosts=min(num_ranks, 2)) as stores,
        ThreadCluster(checkpoint, num_ranks, stores=stores) as cluster,
    ):
        first, *others = profiled(cluster)

        assert first is not None
        assert all(rates == first for rates in others)
        assert RestoreRates.from_json(first.to_json()) == first
        assert first.load(2**20) > first.load(0) >= 0
        assert first.save(2**20) > first.save(0) >= 0
        assert [tokens for tokens, _ in first.project.points] == [16, 64]
        assert first.project(64) > 0
        assert (first.disk_read, first.disk_write, first.remote) == (None, None, None)
        stores.check_all_returned()
        assert all(store.stats()["host"]["used_bytes"] == 0 for store in stores.stores)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pieces_are_measured_as_they_are_encoded(checkpoint: Path, encoding: Encoding) -> None:
    """What is smaller on its way has to be decoded behind it; every range is still as written."""
    with (
        ThreadStores(checkpoint, dtypes={"host": encoding}) as stores,
        ThreadCluster(checkpoint, 1, stores=stores) as cluster,
    ):
        assert profiled(cluster)[0] is not None


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_other_projections_are_measured(tmp_path: Path, family: str) -> None:
    """Biases and no rotations, norms of keys."""
    directory = write_checkpoint(tmp_path, family)
    with (
        ThreadStores(directory) as stores,
        ThreadCluster(directory, 1, stores=stores) as cluster,
    ):
        assert profiled(cluster)[0] is not None


def test_without_room_nothing_is_measured(checkpoint: Path) -> None:
    """On no rank, though only one host is full: who expects rates would wait for the others."""
    with (
        ThreadStores(checkpoint, num_hosts=2) as stores,
        ThreadCluster(checkpoint, 2, stores=stores) as cluster,
    ):
        full = stores.stores[1]
        full.reserve = lambda tenant, owner, wanted: [None] * len(wanted)  # type: ignore[method-assign]

        assert profiled(cluster) == [None, None]
        stores.check_all_returned()


def test_a_lost_store_is_not_measured(checkpoint: Path) -> None:
    """Ranks go on without it, and so does the profile."""
    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(checkpoint, 2, stores=stores) as cluster,
    ):
        for worker in cluster.workers:
            client = worker._executor.store.client  # type: ignore[union-attr]
            client._lost.set()

        assert profiled(cluster) == [None, None]
        stores.check_all_returned()


def test_without_a_store_there_is_nothing_to_measure(checkpoint: Path) -> None:
    """A cluster without stores starts as ever."""
    with ThreadCluster(checkpoint, 2) as cluster:
        assert profiled(cluster) == [None, None]


def test_rates_of_other_bytes_are_not_believed(checkpoint: Path) -> None:
    """Somebody else wrote there: a lease was over, and the times are of who knows what."""

    def damaged(view: memoryview) -> memoryview:
        copy = bytearray(view)
        copy[0] ^= 1
        return memoryview(copy)

    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(checkpoint, 1, stores=stores) as cluster,
    ):
        assert measured(cluster, damaged)[0] is None
        stores.check_all_returned()


def test_a_slow_link_has_slow_rates(checkpoint: Path) -> None:
    """The time of a range is in the rate of loading, and not in that of saving."""
    slow_s = 5e-3

    def slow(view: memoryview) -> memoryview:
        time.sleep(slow_s)
        return view

    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(checkpoint, 1, stores=stores) as cluster,
    ):
        rates = measured(cluster, slow)[0]

        assert rates is not None
        assert rates.load(2**20) >= slow_s


def test_each_part_is_measured_beside_the_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that is measured alone promises too much."""
    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(checkpoint, 1, stores=stores) as cluster,
    ):
        decoder = cluster.workers[0]._decoder
        threads: dict[str, set[str]] = {"forward": set(), "project_inputs": set()}

        def noted(method: str) -> Callable[..., Any]:
            original = getattr(type(decoder), method)

            def run(*args: Any, **kwargs: Any) -> Any:
                threads[method].add(threading.current_thread().name)
                return original(*args, **kwargs)

            return run

        for method in threads:
            monkeypatch.setattr(type(decoder), method, noted(method))
        _, link = measured(cluster)

        assert len(link.threads) == 2
        (computes,), (projects,) = threads["forward"], threads["project_inputs"]
        assert computes != projects
        assert {computes, projects} == {thread.rpartition("_")[0] + "_0" for thread in link.threads}


def test_what_fails_beside_a_measurement_is_told() -> None:
    """Else the part would have been measured alone."""

    def fail() -> None:
        raise RuntimeError("no link")

    with (
        pytest.raises(RuntimeError, match="no link"),
        restore_profiler._beside(fail, nullcontext()),
    ):
        pass


def test_computing_ends(checkpoint: Path) -> None:
    """Beside a measurement of disks the ranks are busy for a while, and then free again."""
    with ThreadCluster(checkpoint, 1) as cluster:
        cluster.workers[0].compute_for(0.0)
        cluster.workers[0].compute_for(0.01)
