"""What the KV store holds: pieces of blocks, each with a header that proves what it is.

A block is a fixed number of consecutive tokens, known by its key (`actors.kv.keys`). A
piece is what one rank held of it: a range of its tokens, all layers. A block is complete
when its pieces cover it, whoever wrote them. A piece is stored as a record:

    header (256 bytes) | one checksum for each layer | padding to 64 | layer 0 | layer 1 | ...

The header's own checksum covers the layers' checksums. Readers verify the header against
what they asked for, and each layer against its checksum before it is used.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

MAGIC = b"RINGSPKV"
VERSION = 2  # of records: others are not read
KEY_BYTES = 32
CHECKSUM_BYTES = 16
HEADER_BYTES = 256
ALIGNMENT = 64
# Encodings of which nothing is lost: keys and values as they are; and the activations that go
# into their projection, from which they are made again.
RAW, ACTIVATIONS = "raw", "act"
LOSSLESS = frozenset({RAW, ACTIVATIONS})
# magic, version, num_layers, layer_bytes, start, end, first_head, end_head, key, layout, encoding
_HEADER = struct.Struct("<8sIIQIIII32s16s16s")


class BadPiece(Exception):
    """A record is damaged, or is not what was asked for: it must not be used."""


@dataclass(frozen=True, order=True)
class PieceId:
    """Which part of which block, and how its bytes are made."""

    key: bytes  # of the block
    start: int  # first token within the block
    end: int  # one past the last
    encoding: str  # "raw", "act", or a lossy one of `models.kv_codec`


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What KV is made of; pieces of another layout cannot be read."""

    num_layers: int
    hidden_size: int  # of activations
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int

    def digest(self) -> bytes:
        """Return 16 bytes that differ where layouts do."""
        fields = (
            VERSION,
            self.num_layers,
            self.hidden_size,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            self.block_tokens,
        )
        return hashlib.blake2b(repr(fields).encode(), digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where the parts of one piece's record lie."""

    num_layers: int
    layer_bytes: int

    @property
    def payload_offset(self) -> int:
        """Bytes before the first layer."""
        prefix = HEADER_BYTES + self.num_layers * CHECKSUM_BYTES
        return -(-prefix // ALIGNMENT) * ALIGNMENT

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.payload_offset + self.num_layers * self.layer_bytes

    def layer(self, record: memoryview, layer: int) -> memoryview:
        """Return the bytes of one layer of a record."""
        start = self.payload_offset + layer * self.layer_bytes
        return record[start : start + self.layer_bytes]


def checksum(data: bytes | memoryview) -> bytes:
    """Return xxh3-128 of some bytes. It lets other threads run while it computes."""
    return xxhash.xxh3_128_digest(data)


def write_header(
    record: memoryview,
    piece: PieceId,
    layout: Layout,
    where: Record,
    layer_checksums: Sequence[bytes],
) -> bytes:
    """Write what stands before the payload; return the header's checksum, which seals it all."""
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        where.num_layers,
        where.layer_bytes,
        piece.start,
        piece.end,
        0,
        layout.num_kv_heads,
        piece.key,
        layout.digest(),
        piece.encoding.encode(),
    )
    sealed = header.ljust(HEADER_BYTES - CHECKSUM_BYTES, b"\0")
    sums = b"".join(layer_checksums).ljust(where.payload_offset - HEADER_BYTES, b"\0")
    seal = checksum(sealed + sums)
    record[: where.payload_offset] = sealed + seal + sums
    return seal


def read_header(
    record: memoryview, piece: PieceId, layout: Layout, seal: bytes | None = None
) -> tuple[Record, list[bytes]]:
    """Return where a record's layers lie, and their checksums.

    ``seal`` is the header's checksum as the writer told it, where that is known.

    Raises:
        BadPiece: The record is damaged, or of another piece, model, tenant or layout.
    """
    if len(record) < HEADER_BYTES:
        raise BadPiece("the record is too short for a header")
    sealed = bytes(record[: HEADER_BYTES - CHECKSUM_BYTES])
    found = bytes(record[HEADER_BYTES - CHECKSUM_BYTES : HEADER_BYTES])
    fields = _HEADER.unpack_from(sealed)
    where = Record(num_layers=fields[2], layer_bytes=fields[3])
    if fields[:2] != (MAGIC, VERSION) or where.num_layers != layout.num_layers:
        raise BadPiece("this is no record of this version and model")
    if where.size_bytes > len(record):
        raise BadPiece("the record is cut off")
    sums = bytes(record[HEADER_BYTES : where.payload_offset])
    if checksum(sealed + sums) != found or seal not in (None, found):
        raise BadPiece("the header is damaged")
    expected = (
        piece.start,
        piece.end,
        0,
        layout.num_kv_heads,
        piece.key,
        layout.digest(),
        piece.encoding.encode().ljust(16, b"\0"),
    )
    if fields[4:] != expected:
        raise BadPiece("the record is of another piece or layout")
    split = range(0, where.num_layers * CHECKSUM_BYTES, CHECKSUM_BYTES)
    return where, [sums[at : at + CHECKSUM_BYTES] for at in split]


def verify_layer(data: memoryview, expected: bytes) -> None:
    """Compare a layer's bytes with its checksum.

    Raises:
        BadPiece: They differ.
    """
    if checksum(data) != expected:
        raise BadPiece("a layer is damaged")


def verify_record(record: memoryview, piece: PieceId, layout: Layout) -> None:
    """Verify a whole record; raises as `read_header` and `verify_layer`."""
    where, sums = read_header(record, piece, layout)
    for layer, expected in enumerate(sums):
        verify_layer(where.layer(record, layer), expected)
