"""What is leased stays, the least recently used goes, and no tenant takes more than its share."""

import hashlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.kv.directory import Directory
from actors.kv.extents import aligned
from actors.kv.messages import Lease
from actors.kv.pieces import PieceId

CAPACITY_BYTES, QUOTA_BYTES, LEASE_S = 1024, 640, 10.0
TENANTS = [b"anna", b"bert"]


def piece(number: int, start: int = 0) -> PieceId:
    return PieceId(hashlib.sha256(bytes([number])).digest(), start, start + 8, "raw")


PIECES = [piece(number, start) for number in range(4) for start in (0, 8)]
PIECES += [PieceId(piece(0).key, start, start + 12, "raw") for start in (0, 4)]  # cut otherwise
PIECES += [PieceId(piece(0).key, start, 16, "act") for start in (0, 8)]
PIECES += [PieceId(piece(0).key, 0, 8, "int8")]
SIZES = [1, 64, 100, 192, 256, 300, 448, 640, 641]


@dataclass(eq=False)
class Entry:
    """What the model knows of one piece in the arena."""

    piece: PieceId
    tenant: bytes
    offset: int
    size: int
    seal: bytes | None = None
    visible: bool = True


@dataclass
class Held:
    """What the model knows of one lease."""

    entry: Entry
    owner: str
    since_s: float


@dataclass
class Model:
    """Lists, searched from end to end."""

    entries: list[Entry] = field(default_factory=list)  # the least recently used first
    leases: dict[int, Held] = field(default_factory=dict)

    def visible(self, piece: PieceId) -> Entry | None:
        return next((e for e in self.entries if e.visible and e.piece == piece), None)

    def committed(self, key: bytes) -> list[Entry]:
        return [e for e in self.entries if e.visible and e.seal is not None and e.piece.key == key]

    def covers(self, piece: PieceId, any_lossless: bool) -> bool:
        pieces = [
            entry.piece
            for entry in self.committed(piece.key)
            if entry.piece.encoding == piece.encoding
            or (any_lossless and {entry.piece.encoding, piece.encoding} == {"raw", "act"})
        ]
        return all(
            any(p.start <= token < p.end for p in pieces) for token in range(piece.start, piece.end)
        )

    def pinned(self, entry: Entry) -> bool:
        return any(held.entry is entry for held in self.leases.values())

    def longest_gap(self, entries: list[Entry]) -> int:
        end, longest = 0, 0
        for offset, size in sorted((e.offset, aligned(e.size)) for e in entries):
            longest, end = max(longest, offset - end), offset + size
        return max(longest, CAPACITY_BYTES - end)

    def touch(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)

    def end(self, lease_id: int) -> None:
        entry = self.leases.pop(lease_id).entry
        if entry.seal is None:
            entry.visible = False
        self.forget_hidden()

    def forget_hidden(self) -> None:
        self.entries = [e for e in self.entries if e.visible or self.pinned(e)]


class DirectoryAgainstLists(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(CAPACITY_BYTES, QUOTA_BYTES, LEASE_S)
        self.model = Model()
        self.now_s = 0.0

    @rule(
        piece=st.sampled_from(PIECES),
        tenant=st.sampled_from(TENANTS),
        size=st.sampled_from(SIZES),
        owner=st.sampled_from("ab"),
        whole=st.booleans(),
        any_lossless=st.booleans(),
    )
    def write(
        self,
        piece: PieceId,
        tenant: bytes,
        size: int,
        owner: str,
        whole: bool,
        any_lossless: bool,
    ) -> None:
        lease = self.reserve(piece, tenant, size, owner, any_lossless)
        if lease is not None and whole:
            self.finish(lease.lease_id, b"seal")

    def reserve(
        self, piece: PieceId, tenant: bytes, size: int, owner: str, any_lossless: bool
    ) -> Lease | None:
        model = self.model
        idle = [e for e in model.entries if not model.pinned(e)]
        pinned = [e for e in model.entries if model.pinned(e)]
        own_bytes = sum(aligned(e.size) for e in model.entries if e.tenant == tenant)
        own_pinned_bytes = sum(aligned(e.size) for e in pinned if e.tenant == tenant)
        over_bytes = own_bytes + aligned(size) - QUOTA_BYTES
        is_there = model.visible(piece) is not None or model.covers(piece, any_lossless)
        possible = (
            not is_there
            and own_pinned_bytes + aligned(size) <= QUOTA_BYTES
            and model.longest_gap(pinned) >= aligned(size)
        )
        fits_already = over_bytes <= 0 and model.longest_gap(model.entries) >= aligned(size)

        lease = self.directory.reserve(
            piece, tenant, size, owner, self.now_s, any_lossless=any_lossless
        )

        if is_there:
            for entry in sorted(model.committed(piece.key), key=lambda e: e.piece):
                model.touch(entry)
        assert (lease is not None) == possible
        gone = [e for e in idle if not self.directory.holds(e.piece)]
        own = [e for e in idle if e.tenant == tenant]
        own_victims: list[Entry] = []
        while gone and own and sum(aligned(e.size) for e in own_victims) < over_bytes:
            own_victims.append(own.pop(0))
        others = [e for e in idle if e not in own_victims]
        rest = [e for e in gone if e not in own_victims]
        assert set(map(id, own_victims)) <= set(map(id, gone))
        assert rest == others[: len(rest)], "not the least recently used"
        assert not (fits_already and gone), "evicted for nothing"
        for entry in gone:
            model.entries.remove(entry)
        if lease is not None:
            assert (lease.piece, lease.size_bytes, lease.seal) == (piece, size, b"")
            entry = Entry(piece, tenant, lease.offset_bytes, size)
            model.entries.append(entry)
            self.add(lease, entry, owner)
        return lease

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), seal=st.binary(min_size=16, max_size=16))
    def commit(self, data: st.DataObject, seal: bytes) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.model.leases))), seal)

    def finish(self, lease_id: int, seal: bytes) -> None:
        entry = self.model.leases[lease_id].entry
        if entry.seal is not None:
            with pytest.raises(ValueError, match="one to read"):
                self.directory.commit(lease_id, seal)
            return
        committed = self.directory.commit(lease_id, seal)
        assert committed == ((entry.piece, entry.tenant) if entry.visible else None)
        if entry.visible:
            entry.seal = seal
            self.model.touch(entry)
        self.model.end(lease_id)

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def abort_or_release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.model.leases)))
        if self.model.leases[lease_id].entry.seal is None:
            self.directory.abort(lease_id)
        else:
            assert self.directory.release(lease_id)
        self.model.end(lease_id)

    @rule(piece=st.sampled_from(PIECES), owner=st.sampled_from("ab"))
    def lease_any(self, piece: PieceId, owner: str) -> None:
        self.lease(piece, owner, True)

    @precondition(lambda self: self.directory.pieces())
    @rule(data=st.data(), owner=st.sampled_from("ab"), use=st.booleans())
    def lease_what_is_there(self, data: st.DataObject, owner: str, use: bool) -> None:
        self.lease(data.draw(st.sampled_from(self.directory.pieces())), owner, use)

    def lease(self, piece: PieceId, owner: str, use: bool) -> None:
        entry = self.model.visible(piece)
        lease = self.directory.lease(piece, owner, self.now_s, counts_as_use=use)
        if entry is None or entry.seal is None:
            assert lease is None
            return
        assert lease is not None
        assert (lease.offset_bytes, lease.size_bytes) == (entry.offset, entry.size)
        assert lease.seal == entry.seal
        if use:
            self.model.touch(entry)
        self.add(lease, entry, owner)

    @rule(piece=st.sampled_from(PIECES))
    def drop(self, piece: PieceId) -> None:
        entry = self.model.visible(piece)
        committed = entry is not None and entry.seal is not None
        assert self.directory.drop(piece) == committed
        if entry is not None and committed:
            entry.visible = False
        self.model.forget_hidden()

    @rule(tenant=st.sampled_from([*TENANTS, None]))
    def clear(self, tenant: bytes | None) -> None:
        for entry in self.model.entries:
            entry.visible &= tenant not in (None, entry.tenant)
        self.model.forget_hidden()
        self.directory.clear(tenant)

    @rule(by_s=st.sampled_from([0.0, 1.0, 4.0, 11.0]))
    def expire(self, by_s: float) -> None:
        self.now_s += by_s
        ended = [i for i, h in self.model.leases.items() if self.now_s - h.since_s >= LEASE_S]
        assert self.directory.expire(self.now_s) == len(ended)
        for lease_id in ended:
            self.model.end(lease_id)

    @rule(owner=st.sampled_from("ab"))
    def end_owner(self, owner: str) -> None:
        ended = [i for i, h in self.model.leases.items() if h.owner == owner]
        assert self.directory.end_owner(owner) == len(ended)
        for lease_id in ended:
            self.model.end(lease_id)

    def add(self, lease: Lease, entry: Entry, owner: str) -> None:
        assert lease.lease_id not in self.model.leases
        self.model.leases[lease.lease_id] = Held(entry, owner, self.now_s)

    @invariant()
    def agrees(self) -> None:
        self.directory.check_invariants()
        committed = [e for e in self.model.entries if e.visible and e.seal is not None]
        assert self.directory.pieces() == [e.piece for e in committed]
        assert self.directory.used_bytes == sum(aligned(e.size) for e in self.model.entries)
        for tenant in TENANTS:
            used = sum(aligned(e.size) for e in self.model.entries if e.tenant == tenant)
            assert self.directory.tenant_used_bytes.get(tenant, 0) == used
        for key in {each.key for each in PIECES}:
            found = sorted((e.piece, e.size) for e in committed if e.piece.key == key)
            assert self.directory.find(key) == found
        for entry in self.model.entries:
            for other in self.model.entries:
                if entry is not other:
                    apart = entry.offset + entry.size <= other.offset
                    assert apart or other.offset + other.size <= entry.offset


DirectoryAgainstLists.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None
)
TestDirectoryAgainstLists = DirectoryAgainstLists.TestCase


def stored(directory: Directory, piece: PieceId, tenant: bytes = b"anna", size: int = 256) -> None:
    lease = directory.reserve(piece, tenant, size, "writer", 0.0)
    assert lease is not None
    assert directory.commit(lease.lease_id, b"seal") == (piece, tenant)


def test_what_is_leased_is_not_evicted() -> None:
    """The least recently used is, unless it is leased: then the next one is."""
    directory = Directory(1024, 1024, LEASE_S)
    for number in range(4):
        stored(directory, piece(number))
    leases = [
        directory.lease(piece(number), "reader", 0.0, counts_as_use=False) for number in (0, 2)
    ]
    stored(directory, piece(4))
    assert directory.pieces() == [piece(0), piece(2), piece(3), piece(4)]
    stored(directory, piece(5))
    assert directory.pieces() == [piece(0), piece(2), piece(4), piece(5)]
    assert directory.reserve(piece(6), b"anna", 513, "writer", 0.0) is None
    for lease in leases:
        assert lease is not None
        assert directory.release(lease.lease_id)
    stored(directory, piece(6), size=1024)
    assert directory.pieces() == [piece(6)]


def test_room_between_leased_pieces_is_used_to_the_last_byte() -> None:
    """Enough bytes may be idle and yet lie apart: then more is evicted, or nothing at all."""
    directory = Directory(1024, 1024, LEASE_S)
    for number in range(4):
        stored(directory, piece(number))
    pinned = directory.lease(piece(1), "reader", 0.0, counts_as_use=False)
    assert pinned is not None

    lease = directory.reserve(piece(5), b"anna", 512, "writer", 0.0)

    assert lease is not None
    assert lease.offset_bytes == 512
    assert directory.reserve(piece(6), b"anna", 257, "writer", 0.0) is None


def test_piece_that_two_read_is_freed_by_the_last() -> None:
    """A dropped piece's bytes may be given anew only when nobody reads them any more."""
    directory = Directory(1024, 1024, LEASE_S)
    stored(directory, piece(0))
    first = directory.lease(piece(0), "a", 0.0)
    second = directory.lease(piece(0), "b", 0.0)
    assert first is not None
    assert second is not None
    directory.drop(piece(0))
    directory.release(first.lease_id)
    assert directory.used_bytes == 256
    directory.release(second.lease_id)
    assert directory.used_bytes == 0


def test_dropped_piece_can_be_stored_anew_while_its_readers_finish() -> None:
    """A bad piece is recomputed at once; who still reads the bad bytes must not see the new."""
    directory = Directory(1024, 1024, LEASE_S)
    stored(directory, piece(0))
    old = directory.lease(piece(0), "reader", 0.0)
    assert old is not None
    directory.drop(piece(0))
    assert directory.find(piece(0).key) == []
    assert directory.lease(piece(0), "reader", 0.0) is None

    new = directory.reserve(piece(0), b"anna", 256, "writer", 0.0)

    assert new is not None
    assert new.offset_bytes != old.offset_bytes
    assert directory.used_bytes == 512
    directory.release(old.lease_id)
    assert directory.used_bytes == 256
    directory.check_invariants()


def test_lease_that_ended_is_no_error() -> None:
    """A rank that was slow learns that its lease had ended, and nobody else's ends instead."""
    directory = Directory(1024, 1024, LEASE_S)
    late = directory.reserve(piece(0), b"anna", 256, "slow", 0.0)
    assert late is not None
    assert directory.expire(LEASE_S) == 1
    other = directory.reserve(piece(0), b"anna", 256, "quick", LEASE_S)
    assert other is not None

    assert directory.commit(late.lease_id, b"late") is None
    directory.abort(late.lease_id)
    assert not directory.release(late.lease_id)

    assert directory.commit(other.lease_id, b"seal") == (piece(0), b"anna")
    assert directory.lease(piece(0), "reader", LEASE_S) is not None


def test_lease_that_does_not_expire_outlives_those_that_do() -> None:
    """While the store itself writes into a range, it must be nobody else's."""
    directory = Directory(1024, 1024, LEASE_S)
    kept = directory.reserve(piece(0), b"anna", 64, "store", 0.0, expires=False)
    ended = directory.reserve(piece(1), b"anna", 64, "rank", 0.0)
    assert kept is not None
    assert ended is not None

    assert directory.expire(1000.0) == 1

    assert directory.commit(ended.lease_id, b"seal") is None
    assert directory.commit(kept.lease_id, b"seal") is not None


def test_a_greedy_tenant_evicts_its_own() -> None:
    """One tenant's long context must not push out everybody else's."""
    directory = Directory(1024, 512, LEASE_S)
    stored(directory, piece(0), b"bert")
    for number in range(1, 6):
        stored(directory, piece(number), b"anna")

    assert directory.holds(piece(0))
    assert [directory.holds(piece(number)) for number in range(1, 6)] == [False] * 3 + [True] * 2
    assert directory.reserve(piece(9), b"anna", 513, "writer", 0.0) is None
    assert directory.counters.refused == 1
    assert directory.tenant_used_bytes == {b"anna": 512, b"bert": 256}


def test_counters_tell_what_happened() -> None:
    """They are what an operator sees."""
    directory = Directory(512, 512, LEASE_S)
    for number in range(3):
        stored(directory, piece(number))
    lease = directory.lease(piece(2), "reader", 0.0)
    assert lease is not None
    directory.lease(piece(0), "reader", 0.0)
    directory.lease(piece(1), "store", 0.0, counts_as_use=False)
    directory.drop(piece(1))
    directory.expire(LEASE_S)
    directory.clear(None)

    counters = directory.counters
    assert (counters.stored, counters.stored_bytes) == (3, 768)
    assert (counters.evicted, counters.evicted_bytes) == (1, 256)
    assert (counters.hits, counters.misses, counters.dropped) == (1, 1, 1)
    assert (counters.expired, counters.cleared, directory.used_bytes) == (2, 1, 0)
