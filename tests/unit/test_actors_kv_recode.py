"""A record in another encoding proves what it is as the first one did, or is not made."""

import dataclasses
import random

import pytest
import torch

from actors.kv.messages import Found
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import (
    BadPiece,
    Layout,
    PieceId,
    checksum,
    read_header,
    verify_record,
    write_header,
)
from actors.kv.recode import recode, recoded_size
from models.kv_codec import Encoding, decode, encode

LAYOUT = Layout(
    num_layers=3, hidden_size=40, num_kv_heads=2, head_dim=6, dtype="bfloat16", block_tokens=16
)
PIECE = PieceId(key=b"k" * 32, start=3, end=14, encoding="raw")


def raw_record(kv_L2KSD: torch.Tensor) -> bytearray:
    where = record_of(PIECE, LAYOUT)
    record = bytearray(where.size_bytes)
    for layer, kv_2KSD in enumerate(kv_L2KSD):
        target = torch.frombuffer(where.layer(memoryview(record), layer), dtype=torch.uint8)
        encode("raw", kv_2KSD, target)
    sums = [checksum(where.layer(memoryview(record), layer)) for layer in range(3)]
    write_header(memoryview(record), PIECE, LAYOUT, where, sums)
    return record


@pytest.fixture(name="kv_L2KSD")
def random_layers() -> torch.Tensor:
    return torch.randn(3, 2, 2, 11, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("encoding", ["raw", "int8", "int4", "fp8"])
@pytest.mark.parametrize("readonly", [False, True])
def test_layers_are_those_of_the_encoding(
    kv_L2KSD: torch.Tensor, encoding: Encoding, readonly: bool
) -> None:
    """Each layer its own; a record on disk is mapped for reading only."""
    record = raw_record(kv_L2KSD)
    view = memoryview(bytes(record) if readonly else record)

    piece, recoded = recode(view, PIECE, LAYOUT, encoding)

    assert piece == PieceId(key=PIECE.key, start=3, end=14, encoding=encoding)
    verify_record(memoryview(recoded), piece, LAYOUT)
    where, _ = read_header(memoryview(recoded), piece, LAYOUT)
    for layer, kv_2KSD in enumerate(kv_L2KSD):
        data = where.layer(memoryview(recoded), layer)
        expected = torch.zeros(len(data), dtype=torch.uint8)
        encode(encoding, kv_2KSD, expected)
        assert bytes(data) == bytes(expected.numpy())


def test_way_back_gives_what_the_encoding_left(kv_L2KSD: torch.Tensor) -> None:
    """A store whose host is lossless takes a piece from one whose disk is not."""
    small_piece, small = recode(memoryview(raw_record(kv_L2KSD)), PIECE, LAYOUT, "int8")

    piece, record = recode(memoryview(small), small_piece, LAYOUT, "raw")

    where, _ = read_header(memoryview(record), piece, LAYOUT)
    layer = torch.frombuffer(where.layer(memoryview(record), 1), dtype=torch.uint8)
    back = torch.empty_like(kv_L2KSD[1])
    decode("raw", layer, back)
    torch.testing.assert_close(back, kv_L2KSD[1], rtol=0, atol=0.02)
    assert not torch.equal(back, kv_L2KSD[1])


def test_damage_anywhere_is_caught_first(kv_L2KSD: torch.Tensor) -> None:
    """A new checksum over damaged KV would make it right for ever."""
    record = raw_record(kv_L2KSD)
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(record)
        damaged[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
        with pytest.raises(BadPiece):
            recode(memoryview(damaged), PIECE, LAYOUT, "int8")


def test_only_raw_pieces_change_on_their_way(kv_L2KSD: torch.Tensor) -> None:
    """Activations have no lossy form, and what is lossy loses nothing more."""
    for encoding in ("act", "int4"):
        piece = dataclasses.replace(PIECE, encoding=encoding)
        found = Found(piece=piece, tier="host", size_bytes=record_of(piece, LAYOUT).size_bytes)
        assert recoded_size(found, LAYOUT, "int8") == found
    raw = Found(piece=PIECE, tier="host", size_bytes=len(raw_record(kv_L2KSD)))
    assert recoded_size(raw, LAYOUT, "int8").size_bytes < raw.size_bytes


def test_activations_take_their_width() -> None:
    """Of 11 tokens, 40 values of 2 bytes in each layer, padded to 64."""
    piece = dataclasses.replace(PIECE, encoding="act")

    assert record_of(piece, LAYOUT).layer_bytes == 896
    assert record_of(PIECE, LAYOUT).layer_bytes == 576  # of 2 * 2 * 6 values


def test_record_of_another_piece_is_refused(kv_L2KSD: torch.Tensor) -> None:
    """As any reader would."""
    other = PieceId(key=b"o" * 32, start=3, end=14, encoding="raw")

    with pytest.raises(BadPiece, match="another piece"):
        recode(memoryview(raw_record(kv_L2KSD)), other, LAYOUT, "int8")
