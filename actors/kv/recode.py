"""A record in another encoding: what a store writes to a tier whose dtype is lossy.

It imports torch: a store loads this module only where a tier asks for it.
"""

import dataclasses
from typing import cast

import torch
from torch import Tensor

from actors.kv.messages import Found
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import (
    RAW,
    Layout,
    PieceId,
    checksum,
    read_header,
    verify_layer,
    write_header,
)
from models.kv_codec import Encoding, decode, encode


def recode(
    record: memoryview, piece: PieceId, layout: Layout, encoding: str
) -> tuple[PieceId, bytearray]:
    """Return a piece of KV in another encoding, and its whole record.

    Raises:
        BadPiece: The record is damaged, or of another piece; what it holds is not used.
    """
    source, sums = read_header(record, piece, layout)
    recoded = dataclasses.replace(piece, encoding=encoding)
    where = record_of(recoded, layout)
    written = bytearray(where.size_bytes)
    view = memoryview(written)
    kv_2KSD = torch.empty(
        2,
        layout.num_kv_heads,
        piece.end - piece.start,
        layout.head_dim,
        dtype=getattr(torch, layout.dtype),
    )
    new_sums = []
    for layer, expected in enumerate(sums):
        # A copy of our own: nobody can change it once it is verified.
        data = bytearray(source.layer(record, layer))
        verify_layer(memoryview(data), expected)
        decode(cast(Encoding, piece.encoding), _tensor(data), kv_2KSD)
        target = where.layer(view, layer)
        encode(cast(Encoding, encoding), kv_2KSD, _tensor(target))
        new_sums.append(checksum(target))
    write_header(view, recoded, layout, where, new_sums)
    return recoded, written


def recoded_size(found: Found, layout: Layout, encoding: str) -> Found:
    """Return a piece as `recode` makes it of a raw one; others stay as they are."""
    if encoding == RAW or found.piece.encoding != RAW:
        return found
    piece = dataclasses.replace(found.piece, encoding=encoding)
    size_bytes = record_of(piece, layout).size_bytes
    return dataclasses.replace(found, piece=piece, size_bytes=size_bytes)


def _tensor(data: bytearray | memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
