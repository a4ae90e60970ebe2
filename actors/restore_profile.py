"""The rates of restores, as a cluster finds them: in its profile, or measured as it starts.

Ranks measure what lies between them and their host's store (`actors.restore_profiler`);
stores measure their disks and each other, while the ranks compute.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from actors.kv.finder import StoreHandle
from actors.profile_file import ProfileFile, RestoreFacts
from models.rates import Affine
from models.restore_rates import RestoreRates, capped

KiB, MiB = 2**10, 2**20
SIZES_BYTES = (256 * KiB, 8 * MiB)  # of a piece, all layers
REPEATS = 5
NEIGHBOURS = 3  # other hosts that each host is measured with
PATIENCE_S = 0.5  # for one size, after which nothing is repeated
TIMEOUT_S = 10.0  # of one run; what takes longer has no rate
COMPUTED_S = 0.2  # at a time, while tiers are measured

Answer = TypeVar("Answer")


class RankCalls(Protocol):
    """What is asked of `actors.ranks.Ranks`."""

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> list[Any]:
        """Call a method on every rank; return the results in order of rank."""


class TierRates(NamedTuple):
    """Of the slowest host, or pair of hosts; None: there is no such tier, or it failed."""

    disk_read: Affine | None = None
    disk_write: Affine | None = None
    remote: Affine | None = None


async def find_restore_rates(
    ranks: RankCalls,
    stores: Sequence[StoreHandle],
    file: ProfileFile,
    facts: RestoreFacts,
    *,
    refresh: bool,
    timeout_s: float,
    link_bytes_per_s: float | None = None,
) -> RestoreRates | None:
    """Return the rates of restores, as measured now or by an earlier start.

    Call it when ranks have their stores and execute nothing. The file holds the rates of
    this machine's own link; a throttled one is no faster than ``link_bytes_per_s``. None
    where nothing could be measured: then there is no plan, and what is stored is loaded.
    """
    rates = None if refresh else await asyncio.to_thread(file.load_restore, facts)
    if rates is None:
        rates = (await ranks.call("profile_restore", timeout_s=timeout_s))[0]
        if rates is None:
            return None
        tiers = TierRates()
        if facts.disk_directory is not None or len(stores) > 1:
            tiers = await _beside_computation(ranks, measure_tiers(stores), timeout_s)
        rates = dataclasses.replace(rates, **tiers._asdict())
        has_all = facts.disk_directory is None or tiers.disk_read is not None
        if has_all and (len(stores) == 1 or tiers.remote is not None):
            await asyncio.to_thread(file.save_restore, facts, rates)
    return capped(rates, link_bytes_per_s)


async def measure_tiers(stores: Sequence[StoreHandle]) -> TierRates:
    """Measure all hosts' disks at once, then ways between hosts, all at once too.

    A store that fails or does not answer in time counts as if it were not there.
    """
    disks = await _answers([_disk_laws(store) for store in stores])
    between: list[Affine] = []
    for distance in range(1, min(NEIGHBOURS + 1, len(stores))):
        sources = (*stores[distance:], *stores[:distance])
        pairs = zip(stores, sources, strict=True)
        between += await _answers([_remote_law(store, source) for store, source in pairs])
    return TierRates(
        disk_read=_slowest([read for read, _ in disks]),
        disk_write=_slowest([write for _, write in disks]),
        remote=_slowest(between),
    )


async def _beside_computation(
    ranks: RankCalls, measuring: Coroutine[Any, Any, TierRates], timeout_s: float
) -> TierRates:
    task = asyncio.create_task(measuring)
    try:
        while not task.done():
            await ranks.call("compute_for", COMPUTED_S, timeout_s=timeout_s)
        return await task
    finally:
        task.cancel()


async def _disk_laws(store: StoreHandle) -> tuple[Affine, Affine] | None:
    """Return the laws of reading and writing; None: the store has no disk."""
    reads, writes = [], []
    for num_bytes in SIZES_BYTES:

        async def run(num_bytes: int = num_bytes) -> tuple[float, float] | None:
            times_s: tuple[float, float] | None = await store.call(
                "measure_disk", num_bytes, timeout_s=TIMEOUT_S
            )
            return times_s

        runs = [times_s for times_s in await _repeated(run) if times_s is not None]
        if not runs:
            return None
        reads.append((num_bytes, _upper_quartile([read_s for read_s, _ in runs])))
        writes.append((num_bytes, _upper_quartile([write_s for _, write_s in runs])))
    return Affine.through(*reads), Affine.through(*writes)


async def _remote_law(store: StoreHandle, source: StoreHandle) -> Affine:
    """Return the law of pieces that one host's store gets from another's."""
    points = []
    for num_bytes in SIZES_BYTES:

        async def run(num_bytes: int = num_bytes) -> float:
            seconds: float = await store.call(
                "probe_remote", source.flight_address, num_bytes, timeout_s=TIMEOUT_S
            )
            return seconds

        points.append((num_bytes, _upper_quartile(await _repeated(run))))
    return Affine.through(*points)


async def _repeated(run: Callable[[], Awaitable[Answer]]) -> list[Answer]:
    """Return what some runs say; the first one warms up."""
    start_s = time.perf_counter()
    runs = [await run()]
    while len(runs) <= REPEATS and time.perf_counter() - start_s < PATIENCE_S:
        runs.append(await run())
    return runs[1:] or runs


async def _answers(calls: Sequence[Coroutine[Any, Any, Answer | None]]) -> list[Answer]:
    """Return what those that answer say."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [
        answer for answer in answers if answer is not None and not isinstance(answer, BaseException)
    ]


def _upper_quartile(times_s: Sequence[float]) -> float:
    return sorted(times_s, reverse=True)[(len(times_s) - 1) // 4]


def _slowest(laws: Sequence[Affine]) -> Affine | None:
    if not laws:
        return None
    return Affine(max(law.latency_s for law in laws), min(law.bytes_per_s for law in laws))
