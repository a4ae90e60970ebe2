"""The tier in host memory: an arena and its directory, for many threads at once.

The lock is held for decisions only, never while bytes are read, written or hashed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from actors.kv.arena import Arena
from actors.kv.directory import Directory
from actors.kv.messages import Found, Lease
from actors.kv.pieces import BadPiece, Layout, PieceId, read_header, verify_record


class HostTier:
    """What the arena of one host holds. Thread-safe."""

    def __init__(
        self,
        arena: Arena,
        directory: Directory,
        layout: Layout,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Own the directory from now on; ``clock`` returns seconds and never goes back."""
        self._arena = arena
        self._directory = directory
        self._layout = layout
        self._clock = clock
        self._lock = threading.Lock()
        self._read: deque[int] = deque()  # leases that ended, to be released

    def find(self, keys: Sequence[bytes]) -> list[Found]:
        """Return the pieces of these blocks."""
        with self._deciding() as directory:
            return [
                Found(piece=piece, tier="host", size_bytes=size_bytes)
                for key in keys
                for piece, size_bytes in directory.find(key)
            ]

    def holds(self, piece: PieceId) -> bool:
        """Return whether a piece can be read."""
        with self._deciding() as directory:
            return directory.holds(piece)

    def reserve(
        self,
        tenant: bytes,
        owner: str,
        wanted: Sequence[tuple[PieceId, int]],
        *,
        expires: bool,
        any_lossless: bool = False,
    ) -> list[Lease | None]:
        """Lease places to write pieces of these bytes; see `Directory.reserve`."""
        with self._deciding() as directory:
            now_s = self._expire(directory)
            return [
                directory.reserve(
                    piece,
                    tenant,
                    size_bytes,
                    owner,
                    now_s,
                    expires=expires,
                    any_lossless=any_lossless,
                )
                for piece, size_bytes in wanted
            ]

    def commit(self, done: Sequence[tuple[int, bytes]]) -> list[tuple[PieceId, bytes]]:
        """End leases to write, each with its record's seal; return what is there, with tenants."""
        with self._deciding() as directory:
            # The last first: of blocks in a row the first is evicted last, for without it
            # the others are of no use.
            committed = [directory.commit(lease_id, seal) for lease_id, seal in done[::-1]]
        return [each for each in reversed(committed) if each is not None]

    def commit_and_lease(self, lease_id: int, seal: bytes, owner: str) -> Lease | None:
        """End a lease to write and begin one to read, with nothing between."""
        with self._deciding() as directory:
            committed = directory.commit(lease_id, seal)
            if committed is None:
                return None
            return directory.lease(committed[0], owner, self._clock(), counts_as_use=False)

    def abort(self, lease_ids: Sequence[int]) -> None:
        """End leases to write: the pieces are not there."""
        with self._deciding() as directory:
            for lease_id in lease_ids:
                directory.abort(lease_id)

    def lease(self, pieces: Sequence[PieceId], owner: str) -> list[Lease | None]:
        """Lease pieces to read; None for each that is not there."""
        with self._deciding() as directory:
            now_s = self._expire(directory)
            # The last first, as in `commit`.
            leases = [directory.lease(piece, owner, now_s) for piece in pieces[::-1]]
        return leases[::-1]

    def release(self, lease_ids: Sequence[int]) -> list[int]:
        """End leases; return those that had ended before."""
        with self._deciding() as directory:
            return [each for each in lease_ids if not directory.release(each)]

    def end_owner(self, owner: str) -> int:
        """End all leases of an owner that is gone; return how many."""
        with self._deciding() as directory:
            return directory.end_owner(owner)

    def expire(self) -> None:
        """End the leases that are too old."""
        with self._deciding() as directory:
            self._expire(directory)

    def drop(self, pieces: Sequence[PieceId]) -> None:
        """Forget pieces that are bad."""
        with self._deciding() as directory:
            for piece in pieces:
                directory.drop(piece)

    def clear(self, tenant: bytes | None) -> int:
        """Forget what a tenant holds (None: all); return the number of pieces."""
        with self._deciding() as directory:
            return directory.clear(tenant)

    @contextmanager
    def writing(self, lease: Lease) -> Iterator[memoryview]:
        """Give the bytes of a lease to write. What is not committed at the end is aborted."""
        try:
            yield self._arena.view(lease.offset_bytes, lease.size_bytes)
        finally:
            self.abort([lease.lease_id])

    @contextmanager
    def reading(self, piece: PieceId, owner: str, *, counts_as_use: bool) -> Iterator[memoryview]:
        """Give a record whose header is verified; its layers are not.

        Raises:
            KeyError: The piece is not there.
            BadPiece: It is damaged, and is dropped; also where the caller finds so.
        """
        with self._deciding() as directory:
            lease = directory.lease(piece, owner, self._clock(), counts_as_use=counts_as_use)
        if lease is None:
            raise KeyError(piece)
        try:
            record = self._arena.view(lease.offset_bytes, lease.size_bytes)
            read_header(record, piece, self._layout, lease.seal)
            yield record
        except BadPiece:
            self.drop([piece])
            raise
        finally:
            # Arrow ends a transfer when it lets go of the bytes, in any thread and within any
            # line, even one that has the lock: the lease ends before the next decision.
            self._read.append(lease.lease_id)

    def verify(self) -> dict[str, int]:
        """Verify every record and drop the bad ones; return how many were ``good`` and ``bad``."""
        with self._deciding() as directory:
            pieces = directory.pieces()
        counts = {"good": 0, "bad": 0}
        for piece in pieces:
            try:
                with self.reading(piece, "verify", counts_as_use=False) as record:
                    verify_record(record, piece, self._layout)
                counts["good"] += 1
            except BadPiece:
                counts["bad"] += 1
            except KeyError:
                pass  # evicted meanwhile
        return counts

    def stats(self) -> dict[str, int]:
        """Return what is held and what happened so far."""
        with self._deciding() as directory:
            return {
                "capacity_bytes": self._arena.capacity_bytes,
                "used_bytes": directory.used_bytes,
                "pieces": directory.num_pieces,
                "tenants": len(directory.tenant_used_bytes),
                "leases": directory.num_leases,
                **asdict(directory.counters),
            }

    def check_invariants(self) -> None:
        """Raise AssertionError unless directory and extents agree."""
        with self._deciding() as directory:
            directory.check_invariants()

    @contextmanager
    def _deciding(self) -> Iterator[Directory]:
        """Give the directory to this thread alone."""
        with self._lock:
            while self._read:
                self._directory.release(self._read.popleft())
            yield self._directory

    def _expire(self, directory: Directory) -> float:
        """End the leases that are too old; return the time."""
        now_s = self._clock()
        directory.expire(now_s)
        return now_s
