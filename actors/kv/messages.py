"""What crosses between ranks, coordinator and KV stores: ids, leases, counts. Never KV itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.kv.flight_tls import FlightTls
from actors.kv.pieces import Layout, PieceId

Tier = Literal["host", "disk", "remote"]


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What one host's store must know."""

    host: str  # its name, as ranks of this host have it
    layout: Layout
    capacity_bytes: int  # of the arena
    cluster: str  # name of this cluster, in those of its arenas
    token: str  # that Flight asks for
    tenant_share: float = 1.0  # of the arena that one tenant may fill
    lease_s: float = 300.0  # after which a lease that nobody returned is over
    disk_directory: str | None = None
    disk_bytes: int = 0
    disk_dtype: str = "raw"
    remote_dtype: str = "raw"
    tls: FlightTls | None = None  # of what goes to other hosts


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store says of itself once it is up."""

    host: str
    pid: int
    arena_path: str
    capacity_bytes: int
    flight_address: str  # "grpc://host:port", or "grpc+tls://"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A place in a host's arena that its owner may write (or read) until it is returned."""

    lease_id: int
    piece: PieceId
    offset_bytes: int
    size_bytes: int
    seal: bytes = b""  # of a lease to read: what the writer's header must have as its checksum


@dataclass(frozen=True, kw_only=True)
class Found:
    """A piece that a store has, and where."""

    piece: PieceId
    tier: Tier  # host: in its arena; disk
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A piece to be brought into an arena, and where from."""

    piece: PieceId
    size_bytes: int
    flight_address: str | None = None  # of another host that has it; None: this host


@dataclass(frozen=True, kw_only=True)
class RestorePart:
    """Rows of one sequence that a rank takes from its host's arena."""

    rank: int
    start: int  # position of the first row
    end: int  # behind the last one's
    block_start: int  # position of the first token of the piece's block
    lease: Lease
    tier: Tier  # where it came from


@dataclass(frozen=True, kw_only=True)
class RestoreTimes:
    """What one rank's part of a restore was, and where its time went."""

    kv_tokens: int = 0  # loaded
    activation_tokens: int = 0  # projected from saved layer inputs
    link_bytes: int = 0
    link_s: float = 0.0  # that the link was busy
    project_s: float = 0.0  # that the device was busy with projection
    total_s: float = 0.0  # from its begin until the last layer was there


@dataclass(frozen=True, kw_only=True)
class RestoreChoice:
    """How a stored prefix is to come back, and what that is expected to take."""

    recompute_to: int  # position; what lies before it is recomputed while the rest comes back
    takes_activations: frozenset[int] = frozenset()  # blocks of which both forms are stored
    predicted_s: float | None = None  # until the chunk behind it is computed; None: no rates
    load_s: float = 0.0  # of it, what the links are busy
    # Of other ways: load, activations, ids.
    alternatives_s: dict[str, float] = field(default_factory=dict)
    link_bytes_per_s: float | None = None  # of a link that is slowed down to this


@dataclass(frozen=True, kw_only=True)
class StoredPrefix:
    """What the stores have of a prompt's beginning: brought into arenas, and leased there."""

    start: int  # position; what lies before it is computed, or on the ranks
    end: int
    home: int | None  # the rank that is to have all of it; None: all ranks, block by block
    parts: tuple[RestorePart, ...]  # in order of positions
    leases: dict[str, tuple[int, ...]]  # by host, to be released
    tokens_by_tier: dict[Tier, int]
    choice: RestoreChoice
    begin_s: float  # when it was chosen, by the coordinator's clock
    find_s: float
    stage_s: float

    @property
    def record_bytes(self) -> list[int]:
        """The sizes of all records."""
        return list({part.lease.piece: part.lease.size_bytes for part in self.parts}.values())


@dataclass(frozen=True, kw_only=True)
class RestoreOrder:
    """Rows of a sequence that come back from now on, into places that are grown already."""

    sequence_id: int
    parts: tuple[RestorePart, ...]  # of all ranks
    patience_s: float  # what is not there after so long counts as damaged


@dataclass(frozen=True, kw_only=True)
class StoreBlocks:
    """Blocks of a sequence that are complete: every rank writes what it holds of them."""

    sequence_id: int
    first_block: int
    keys: tuple[bytes, ...]  # of this block and those that follow
    tenant: bytes


def rank_of_block(block: int, home: int | None, num_ranks: int) -> int:
    """Return the rank that takes a restored block: they go round, so that any prefix is even."""
    return block % num_ranks if home is None else home


def parts_behind(stored: StoredPrefix, position: int) -> tuple[RestorePart, ...]:
    """Return the parts of a prefix whose rows lie at or behind a position, cut there."""
    return tuple(
        replace(part, start=max(part.start, position))
        for part in stored.parts
        if part.end > position
    )


def part_spans(parts: Sequence[RestorePart], num_ranks: int) -> list[list[tuple[int, int]]]:
    """Return the positions that each rank keeps of restored rows."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for part in parts:
        spans[part.rank].append((part.start, part.end - part.start))
    return spans
