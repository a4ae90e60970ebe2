"""Whatever happens to a record in the arena, no reader takes it for good."""

import random
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest

from actors.kv.arena import Arena
from actors.kv.pieces import BadPiece, Layout, PieceId, verify_record
from tests.kv_arena import LAYOUT, SIZE_BYTES, WHERE, fill, piece, read

PIECES = [
    piece(0, 0, 8),
    piece(0, 8, 16),  # the same block
    piece(1, 0, 8),  # another conversation, or another tenant: its key differs
    replace(piece(0, 0, 8), encoding="int8"),
]
OTHER_LAYOUTS = [
    replace(LAYOUT, dtype="float16"),
    replace(LAYOUT, block_tokens=32),
    replace(LAYOUT, num_kv_heads=1, head_dim=16),
]


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 1 << 20)
    yield arena
    arena.close()


class Faults:
    """An arena of good records, one of which is made bad in one way at a time."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self.rng = random.Random(seed)
        self.records = {
            each: arena.view(at * SIZE_BYTES, SIZE_BYTES) for at, each in enumerate(PIECES)
        }
        self.seals = {each: fill(record, each) for each, record in self.records.items()}

    def inject(self) -> tuple[PieceId, bool]:
        """Damage a record; return its piece, and whether it shows without the writer's seal."""
        kinds = [self.flip, self.flip, self.flip_before_payload, self.swap, self.swap_layers]
        kinds += [self.other_layout, self.cut_off]
        shows = True
        bad = self.rng.choice(PIECES)
        kind = self.rng.choice([*kinds, self.older])
        kind(bad)
        if kind == self.older:
            shows = False
        return bad, shows

    def flip(self, bad: PieceId) -> None:
        self.records[bad][self.rng.randrange(SIZE_BYTES)] ^= 1 << self.rng.randrange(8)

    def flip_before_payload(self, bad: PieceId) -> None:
        self.records[bad][self.rng.randrange(WHERE.payload_offset)] ^= 1 << self.rng.randrange(8)

    def swap(self, bad: PieceId) -> None:
        other = self.rng.choice([each for each in PIECES if each != bad])
        self.records[bad][:] = self.records[other]

    def swap_layers(self, bad: PieceId) -> None:
        first, second = self.rng.sample(range(WHERE.num_layers), 2)
        one = WHERE.layer(self.records[bad], first)
        two = WHERE.layer(self.records[bad], second)
        one[:], two[:] = bytes(two), bytes(one)

    def other_layout(self, bad: PieceId) -> None:
        layout: Layout = self.rng.choice(OTHER_LAYOUTS)
        fill(self.records[bad], bad, layout=layout)

    def cut_off(self, bad: PieceId) -> None:
        """Zeros from somewhere on, as of a writer that died."""
        start = self.rng.randrange(SIZE_BYTES)
        self.records[bad][start:] = bytes(SIZE_BYTES - start)

    def older(self, bad: PieceId) -> None:
        """A record of the same piece that is whole, but is not what was committed."""
        fill(self.records[bad], bad, seed=1)

    def repair(self, bad: PieceId) -> None:
        fill(self.records[bad], bad)


def check_faults(arena: Arena, seed: int, count: int) -> None:
    faults = Faults(arena, seed)
    for _ in range(count):
        bad, shows = faults.inject()
        for each, record in faults.records.items():
            if each != bad:
                read(record, each, faults.seals[each])
                continue
            with pytest.raises(BadPiece):
                read(record, each, faults.seals[each])
            if shows:
                with pytest.raises(BadPiece):
                    verify_record(record, each, LAYOUT)
        faults.repair(bad)
        read(faults.records[bad], bad, faults.seals[bad])


def test_a_few_hundred_faults_are_caught(arena: Arena) -> None:
    """Bits flipped anywhere, records and layers swapped, other layouts, cut or stale records."""
    check_faults(arena, 0, 400)


@pytest.mark.campaign
def test_ten_thousand_faults_are_caught(arena: Arena) -> None:
    """What the store promises: of 10,000 faults none reaches an answer."""
    check_faults(arena, 1, 10_000)


def test_every_bit_before_the_payload_is_sealed(arena: Arena) -> None:
    """Also those that no field uses: padding must not be a place to hide."""
    faults = Faults(arena, 0)
    record, seal = faults.records[PIECES[0]], faults.seals[PIECES[0]]
    for at in range(WHERE.payload_offset):
        record[at] ^= 1 << at % 8
        with pytest.raises(BadPiece):
            read(record, PIECES[0], None)
        record[at] ^= 1 << at % 8
    read(record, PIECES[0], seal)
