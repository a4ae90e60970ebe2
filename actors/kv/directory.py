"""What one host's arena holds: allocation, leases, least-recently-used eviction, quotas.

Pure decisions: no clock, no lock, no bytes. An entry is first reserved by a lease to write,
then committed, then found and leased to read. A lease pins its entry: what is pinned is
neither evicted nor freed. An entry that is dropped is out of sight at once, and its bytes
are free when its last lease ends.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from actors.kv.extents import Extents, aligned
from actors.kv.messages import Lease
from actors.kv.pieces import LOSSLESS, PieceId


@dataclass(kw_only=True)
class DirectoryCounters:
    """What happened since the start; numbers of pieces where nothing else is said."""

    hits: int = 0  # leased to read
    misses: int = 0  # asked for to read, and not there
    stored: int = 0
    stored_bytes: int = 0
    refused: int = 0  # no room could be made, or larger than the quota
    aborted: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    dropped: int = 0
    cleared: int = 0
    expired: int = 0  # leases


@dataclass(kw_only=True, eq=False)
class _Entry:
    piece: PieceId
    tenant: bytes
    offset_bytes: int
    size_bytes: int
    seal: bytes | None = None  # None: being written
    visible: bool = True
    lease_ids: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class _Held:
    entry: _Entry
    owner: str
    since_s: float
    expires: bool


class Directory:
    """The pieces of an arena. Times must not decrease from call to call. Not thread-safe."""

    def __init__(
        self, capacity_bytes: int, tenant_bytes: int, lease_s: float, first_lease_id: int = 1
    ) -> None:
        """``tenant_bytes`` is what one tenant may hold of ``capacity_bytes``."""
        self.counters = DirectoryCounters()
        self._extents = Extents(capacity_bytes)
        self._quota_bytes = tenant_bytes
        self._lease_s = lease_s
        self._lease_ids = itertools.count(first_lease_id)
        self._visible: dict[PieceId, _Entry] = {}
        self._by_key: dict[bytes, set[PieceId]] = {}  # committed and visible
        # Committed and visible, the least recently used first: of all, and of each tenant.
        self._by_use: OrderedDict[PieceId, _Entry] = OrderedDict()
        self._tenant_by_use: dict[bytes, OrderedDict[PieceId, _Entry]] = {}
        self._tenant_used_bytes: dict[bytes, int] = {}
        self._leases: dict[int, _Held] = {}  # the oldest first

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that are allocated."""
        return self._extents.capacity_bytes - self._extents.free_bytes

    @property
    def num_leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leases)

    @property
    def tenant_used_bytes(self) -> dict[bytes, int]:
        """Bytes that each tenant holds."""
        return dict(self._tenant_used_bytes)

    @property
    def num_pieces(self) -> int:
        """Pieces that can be found."""
        return len(self._by_use)

    def pieces(self) -> list[PieceId]:
        """Return what is committed, the least recently used first."""
        return list(self._by_use)

    def holds(self, piece: PieceId) -> bool:
        """Return whether a piece is committed and neither dropped nor evicted."""
        return piece in self._by_use

    def find(self, key: bytes) -> list[tuple[PieceId, int]]:
        """Return the committed pieces of a block, each with its bytes."""
        pieces = sorted(self._by_key.get(key, ()))
        return [(piece, self._visible[piece].size_bytes) for piece in pieces]

    def reserve(
        self,
        piece: PieceId,
        tenant: bytes,
        size_bytes: int,
        owner: str,
        now_s: float,
        *,
        expires: bool = True,
        any_lossless: bool = False,
    ) -> Lease | None:
        """Lease a place to write a piece, evicting the least recently used where room is short.

        A tenant at its quota evicts its own. Returns None where the piece's tokens are there
        or being written (what is there of the block counts as used), or where no room can be
        made because the rest is leased or the quota too small; then next to nothing was
        evicted. With ``any_lossless`` tokens are there in whichever lossless encoding they
        are. A lease that does not ``expire`` is for writers that always return it.
        """
        alike = LOSSLESS if any_lossless and piece.encoding in LOSSLESS else {piece.encoding}
        if piece in self._visible or self._covers(piece, alike):
            for each in sorted(self._by_key.get(piece.key, ())):
                self._touch(self._by_use[each])
            return None
        offset = self._make_room(tenant, size_bytes)
        if offset is None:
            self.counters.refused += 1
            return None
        entry = _Entry(piece=piece, tenant=tenant, offset_bytes=offset, size_bytes=size_bytes)
        self._visible[piece] = entry
        used_bytes = self._tenant_used_bytes.get(tenant, 0)
        self._tenant_used_bytes[tenant] = used_bytes + aligned(size_bytes)
        return self._lease(entry, owner, now_s, expires)

    def commit(self, lease_id: int, seal: bytes) -> tuple[PieceId, bytes] | None:
        """End a lease to write: the piece can be read now. Return it and its tenant.

        Returns None where the lease has ended before, or the tenant was cleared meanwhile.

        Raises:
            ValueError: The lease is one to read.
        """
        entry = self._of_writer(lease_id)
        if entry is None:
            return None
        if not entry.visible:
            self._end(lease_id)
            return None
        entry.seal = seal
        self._by_key.setdefault(entry.piece.key, set()).add(entry.piece)
        self._by_use[entry.piece] = entry
        self._tenant_by_use.setdefault(entry.tenant, OrderedDict())[entry.piece] = entry
        self._end(lease_id)
        self.counters.stored += 1
        self.counters.stored_bytes += entry.size_bytes
        return entry.piece, entry.tenant

    def abort(self, lease_id: int) -> None:
        """End a lease to write: the piece is not there. A lease that has ended is no error.

        Raises:
            ValueError: The lease is one to read.
        """
        if self._of_writer(lease_id) is not None:
            self.counters.aborted += 1
            self._end(lease_id)

    def lease(
        self, piece: PieceId, owner: str, now_s: float, *, counts_as_use: bool = True
    ) -> Lease | None:
        """Pin a committed piece until `release`; None where it is not there.

        What does not ``count as use``, the store's own work, leaves order and counters.
        """
        entry = self._by_use.get(piece)
        if counts_as_use:
            self.counters.hits += entry is not None
            self.counters.misses += entry is None
        if entry is None:
            return None
        if counts_as_use:
            self._touch(entry)
        return self._lease(entry, owner, now_s, expires=True)

    def release(self, lease_id: int) -> bool:
        """End a lease; return False where it had ended before.

        What was read under a lease that had ended may have been overwritten meanwhile.
        A lease to write that is released is aborted.
        """
        if lease_id not in self._leases:
            return False
        self._end(lease_id)
        return True

    def drop(self, piece: PieceId) -> bool:
        """Forget a committed piece because it is bad; return whether it was there."""
        entry = self._by_use.get(piece)
        if entry is None:
            return False
        self._hide(entry)
        self.counters.dropped += 1
        return True

    def clear(self, tenant: bytes | None) -> int:
        """Forget all of a tenant (None: of all), also what is being written; return how many."""
        entries = [entry for entry in self._visible.values() if tenant in (None, entry.tenant)]
        for entry in entries:
            self._hide(entry)
        self.counters.cleared += len(entries)
        return len(entries)

    def expire(self, now_s: float) -> int:
        """End the leases that are too old; return how many. What was being written is gone."""
        ended = []
        for lease_id, held in self._leases.items():
            if now_s - held.since_s < self._lease_s:
                break
            if held.expires:
                ended.append(lease_id)
        self._end_all(ended)
        self.counters.expired += len(ended)
        return len(ended)

    def end_owner(self, owner: str) -> int:
        """End all leases of an owner that is gone; return how many."""
        ended = [lease_id for lease_id, held in self._leases.items() if held.owner == owner]
        self._end_all(ended)
        return len(ended)

    def check_invariants(self) -> None:
        """Raise AssertionError unless entries, leases, order, index and extents agree."""
        self._extents.check_invariants()
        leased = {held.entry for held in self._leases.values()}
        entries = {*self._visible.values(), *leased}
        allocated = {entry.offset_bytes: aligned(entry.size_bytes) for entry in entries}
        assert len(allocated) == len(entries), "two entries share an offset"
        assert allocated == self._extents.allocated
        assert self.used_bytes == sum(allocated.values())
        used_bytes: dict[bytes, int] = {}
        for entry in entries:
            of_tenant = used_bytes.get(entry.tenant, 0)
            used_bytes[entry.tenant] = of_tenant + aligned(entry.size_bytes)
            assert entry.visible == (self._visible.get(entry.piece) is entry)
            assert entry.lease_ids == {i for i, h in self._leases.items() if h.entry is entry}
            if entry.seal is None:
                assert len(entry.lease_ids) == 1, "what is being written has one writer"
        assert self._tenant_used_bytes == used_bytes
        assert all(used <= self._quota_bytes for used in used_bytes.values())
        committed = {p: e for p, e in self._visible.items() if e.seal is not None}
        assert dict(self._by_use) == committed
        assert {p for pieces in self._by_key.values() for p in pieces} == set(committed)
        assert all(piece.key == key for key, pieces in self._by_key.items() for piece in pieces)
        for tenant, by_use in self._tenant_by_use.items():
            assert list(by_use) == [p for p, e in self._by_use.items() if e.tenant == tenant]
            assert by_use
        assert {entry.tenant for entry in committed.values()} == set(self._tenant_by_use)

    def _covers(self, piece: PieceId, encodings: Set[str]) -> bool:
        """Whether committed pieces of these encodings have all tokens of one, however cut."""
        position = piece.start
        for each in sorted(self._by_key.get(piece.key, ())):
            if each.encoding in encodings and each.start <= position:
                position = max(position, each.end)
        return position >= piece.end

    def _touch(self, entry: _Entry) -> None:
        self._by_use.move_to_end(entry.piece)
        self._tenant_by_use[entry.tenant].move_to_end(entry.piece)

    def _make_room(self, tenant: bytes, size_bytes: int) -> int | None:
        size = aligned(size_bytes)
        over_quota = self._tenant_used_bytes.get(tenant, 0) + size - self._quota_bytes
        own = self._oldest(self._tenant_by_use.get(tenant, {}).values(), over_quota)
        if own is None:
            return None
        own_bytes = sum(aligned(entry.size_bytes) for entry in own)
        going = set(own)
        others = (entry for entry in self._by_use.values() if entry not in going)
        more = self._oldest(others, size - own_bytes - self._extents.free_bytes)
        if more is None:
            return None
        self._evict([*own, *more])
        offset = self._extents.allocate(size_bytes)
        # What is free now is enough, but may lie in pieces.
        if offset is None and self._longest_unpinned_bytes() >= size:
            while offset is None:
                oldest = self._oldest(self._by_use.values(), 1)
                assert oldest, "room between pinned entries is free or can be evicted"
                self._evict(oldest)
                offset = self._extents.allocate(size_bytes)
        return offset

    def _oldest(self, by_use: Iterable[_Entry], wanted_bytes: int) -> list[_Entry] | None:
        """Return the first unpinned entries that have so many bytes; None: they have not."""
        found: list[_Entry] = []
        if wanted_bytes <= 0:
            return found
        for entry in by_use:
            if not entry.lease_ids:
                found.append(entry)
                wanted_bytes -= aligned(entry.size_bytes)
                if wanted_bytes <= 0:
                    return found
        return None

    def _longest_unpinned_bytes(self) -> int:
        """Return the longest range that evicting all that is unpinned would free."""
        pinned = {held.entry for held in self._leases.values()}
        ranges = sorted((entry.offset_bytes, aligned(entry.size_bytes)) for entry in pinned)
        longest, end = 0, 0
        for offset, size in [*ranges, (self._extents.capacity_bytes, 0)]:
            longest, end = max(longest, offset - end), offset + size
        return longest

    def _evict(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self.counters.evicted += 1
            self.counters.evicted_bytes += entry.size_bytes
            self._hide(entry)

    def _lease(self, entry: _Entry, owner: str, now_s: float, expires: bool) -> Lease:
        lease_id = next(self._lease_ids)
        self._leases[lease_id] = _Held(entry=entry, owner=owner, since_s=now_s, expires=expires)
        entry.lease_ids.add(lease_id)
        return Lease(
            lease_id=lease_id,
            piece=entry.piece,
            offset_bytes=entry.offset_bytes,
            size_bytes=entry.size_bytes,
            seal=entry.seal or b"",
        )

    def _of_writer(self, lease_id: int) -> _Entry | None:
        held = self._leases.get(lease_id)
        if held is None:
            return None
        if held.entry.seal is not None:
            raise ValueError(f"lease {lease_id} is one to read: release it instead")
        return held.entry

    def _end_all(self, lease_ids: list[int]) -> None:
        for lease_id in lease_ids:
            self._end(lease_id)

    def _end(self, lease_id: int) -> None:
        entry = self._leases.pop(lease_id).entry
        entry.lease_ids.remove(lease_id)
        if entry.seal is None and entry.visible:
            self._hide(entry)  # what nobody finished writing
        elif not entry.visible and not entry.lease_ids:
            self._free(entry)

    def _hide(self, entry: _Entry) -> None:
        """Take an entry out of sight; its bytes are free once nobody leases it."""
        entry.visible = False
        del self._visible[entry.piece]
        if entry.seal is not None:
            _discard(self._by_key, entry.piece.key, entry.piece)
            del self._by_use[entry.piece]
            by_use = self._tenant_by_use[entry.tenant]
            del by_use[entry.piece]
            if not by_use:
                del self._tenant_by_use[entry.tenant]
        if not entry.lease_ids:
            self._free(entry)

    def _free(self, entry: _Entry) -> None:
        self._extents.free(entry.offset_bytes, entry.size_bytes)
        self._tenant_used_bytes[entry.tenant] -= aligned(entry.size_bytes)
        if not self._tenant_used_bytes[entry.tenant]:
            del self._tenant_used_bytes[entry.tenant]


def _discard(index: dict[bytes, set[PieceId]], key: bytes, piece: PieceId) -> None:
    index[key].remove(piece)
    if not index[key]:
        del index[key]
