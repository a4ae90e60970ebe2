"""Pieces of random bytes, as the tests of the KV store's tiers write and read them."""

import functools
import random

from actors.kv.pieces import Layout, PieceId, Record, checksum, write_header

LAYOUT = Layout(
    num_layers=3, hidden_size=32, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16
)


@functools.cache
def noise(size: int, seed: int = 0) -> bytes:
    """Return random bytes, the same each time."""
    return random.Random(seed).randbytes(size)


def piece_id(number: int, start: int = 0, end: int = 16, encoding: str = "raw") -> PieceId:
    """Return a piece of a block of its own."""
    return PieceId(noise(32, number), start, end, encoding)


def make_record(
    piece: PieceId, layer_bytes: int = 10_000, layout: Layout = LAYOUT, seed: int = 0
) -> memoryview:
    """Return a whole record of random layers."""
    where = Record(num_layers=layout.num_layers, layer_bytes=layer_bytes)
    record = memoryview(bytearray(where.size_bytes))
    record[where.payload_offset :] = noise(layout.num_layers * layer_bytes, seed)
    sums = [checksum(where.layer(record, layer)) for layer in range(layout.num_layers)]
    write_header(record, piece, layout, where, sums)
    return record
