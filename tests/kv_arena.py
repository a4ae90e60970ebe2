"""Records of pieces for tests of the KV store, and a process that reads and writes them."""

import hashlib
import json
import random
import sys

from actors.kv.arena import Arena
from actors.kv.pieces import (
    BadPiece,
    Layout,
    PieceId,
    Record,
    checksum,
    read_header,
    verify_layer,
    write_header,
)

LAYOUT = Layout(
    num_layers=4, hidden_size=32, num_kv_heads=2, head_dim=8, dtype="bfloat16", block_tokens=16
)
WHERE = Record(num_layers=LAYOUT.num_layers, layer_bytes=1024)
SIZE_BYTES = WHERE.size_bytes


def piece(number: int, start: int = 0, end: int = 16) -> PieceId:
    """Return the id of a piece of block ``number``."""
    return PieceId(hashlib.sha256(str(number).encode()).digest(), start, end, "raw")


def fill(
    record: memoryview,
    piece: PieceId,
    *,
    seed: int = 0,
    layout: Layout = LAYOUT,
    where: Record = WHERE,
) -> bytes:
    """Write a whole record whose bytes follow from piece and seed; return its seal."""
    random_bytes = random.Random(piece.key + bytes([piece.start, seed])).randbytes
    sums = []
    for layer in range(where.num_layers):
        data = where.layer(record, layer)
        data[:] = random_bytes(len(data))
        sums.append(checksum(data))
    return write_header(record, piece, layout, where, sums)


def made(piece: PieceId, *, seed: int = 0, where: Record = WHERE) -> bytes:
    """Return the record that `fill` writes."""
    record = bytearray(where.size_bytes)
    fill(memoryview(record), piece, seed=seed, where=where)
    return bytes(record)


def read(record: memoryview, piece: PieceId, seal: bytes | None) -> None:
    """Verify a record as the ranks do, layer by layer; raises BadPiece."""
    where, sums = read_header(record, piece, LAYOUT, seal)
    for layer, expected in enumerate(sums):
        verify_layer(where.layer(record, layer), expected)


def main() -> None:
    """Map an arena, then fill or read the pieces that the lines of stdin name."""
    arena = Arena.attach(sys.argv[1])
    for line in sys.stdin:
        what, key, start, end, offset_bytes, size_bytes, seal = json.loads(line)
        of = PieceId(bytes.fromhex(key), start, end, "raw")
        record = arena.view(offset_bytes, size_bytes)
        answer = "good"
        if what == "fill":
            answer = fill(record, of).hex()
        else:
            try:
                read(record, of, bytes.fromhex(seal))
            except BadPiece as error:
                answer = str(error)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
