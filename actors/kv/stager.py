"""Brings pieces into the arena for ranks to read: from disk, or from another host."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass

from actors.kv.disk import DiskTier
from actors.kv.flight import PieceClient
from actors.kv.host_tier import HostTier
from actors.kv.messages import Lease, Tier, Wanted
from actors.kv.pieces import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    BadPiece,
    Layout,
    PieceId,
    verify_record,
)

THREADS = 4


@dataclass(kw_only=True)
class SourceCounters:
    """What came of asking one tier for pieces."""

    staged: int = 0
    staged_bytes: int = 0
    missing: int = 0
    damaged: int = 0
    failed: int = 0  # the disk or the other host could not be read


class Stager:
    """Stages pieces with a few threads; the same piece is never brought twice at once."""

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier | None,
        client: PieceClient,
        layout: Layout,
        timeout_s: float,
    ) -> None:
        """A piece that takes longer than ``timeout_s`` is not waited for."""
        self._host = host
        self._disk = disk
        self._client = client
        self._layout = layout
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kv-stage")
        self._lock = threading.Lock()  # of what follows
        self._coming: dict[PieceId, threading.Event] = {}
        self._counters: dict[Tier, SourceCounters] = {
            "disk": SourceCounters(),
            "remote": SourceCounters(),
        }

    def stage(self, wanted: Sequence[Wanted], tenant: bytes, owner: str) -> list[Lease | None]:
        """Lease pieces to read, bringing those that are not in the arena; None: not to be had."""
        leases = self._host.lease([each.piece for each in wanted], owner)
        futures: dict[int, Future[Lease | None]] = {
            at: self._pool.submit(self._bring, wanted[at], tenant, owner)
            for at, lease in enumerate(leases)
            if lease is None
        }
        # A lease that comes later than this is for nobody, and expires.
        done, _ = wait(futures.values(), self._timeout_s)
        for at, future in futures.items():
            if future in done:
                leases[at] = future.result()
        return leases

    def stats(self) -> dict[Tier, dict[str, int]]:
        """Return the counters of each tier."""
        with self._lock:
            return {tier: asdict(counters) for tier, counters in self._counters.items()}

    def close(self) -> None:
        """Take no more; the threads end when they have done what was asked of them."""
        self._pool.shutdown(wait=False)

    def _bring(self, wanted: Wanted, tenant: bytes, owner: str) -> Lease | None:
        piece = wanted.piece
        mine = threading.Event()
        with self._lock:
            under_way = self._coming.setdefault(piece, mine)
        if under_way is not mine:
            # Only a thread that runs puts its event there, so this wait cannot be for itself.
            under_way.wait(self._timeout_s)
            return self._host.lease([piece], owner)[0]
        try:
            if self._host.holds(piece):
                return self._host.lease([piece], owner)[0]  # came since it was looked for
            return self._fill(wanted, tenant, owner)
        finally:
            with self._lock:
                del self._coming[piece]
            mine.set()

    def _fill(self, wanted: Wanted, tenant: bytes, owner: str) -> Lease | None:
        # This lease does not expire: its range must be nobody else's while it is written here.
        [lease] = self._host.reserve(
            tenant, owner, [(wanted.piece, wanted.size_bytes)], expires=False
        )
        if lease is None:
            return None
        with self._host.writing(lease) as record:
            for tier, read in self._sources(wanted):
                if self._read(tier, read, wanted.piece, record):
                    seal = bytes(record[HEADER_BYTES - CHECKSUM_BYTES : HEADER_BYTES])
                    return self._host.commit_and_lease(lease.lease_id, seal, owner)
        return None

    def _sources(self, wanted: Wanted) -> Iterator[tuple[Tier, Callable[[memoryview], None]]]:
        """Yield the tiers to ask, the nearest first."""
        disk, address = self._disk, wanted.flight_address
        if disk is not None:
            yield "disk", lambda record: _read_disk(disk, wanted.piece, record)
        if address is not None:
            yield "remote", lambda record: self._client.fetch(address, wanted.piece, record)

    def _read(
        self, tier: Tier, read: Callable[[memoryview], None], piece: PieceId, record: memoryview
    ) -> bool:
        """Read and verify a record from one tier; return whether it is good."""
        outcome = SourceCounters()
        try:
            read(record)
            verify_record(record, piece, self._layout)
            outcome.staged, outcome.staged_bytes = 1, len(record)
        except KeyError:
            outcome.missing = 1
        except BadPiece:
            outcome.damaged = 1
            if tier == "disk" and self._disk is not None:
                self._disk.drop(piece)
        except OSError:  # also ConnectionError
            outcome.failed = 1
        with self._lock:
            counters = self._counters[tier]
            for name, count in asdict(outcome).items():
                setattr(counters, name, getattr(counters, name) + count)
        return outcome.staged == 1


def _read_disk(disk: DiskTier, piece: PieceId, record: memoryview) -> None:
    if disk.size(piece) != len(record):
        raise KeyError(piece)  # another record than the one that was found
    disk.read_into(piece, record)
