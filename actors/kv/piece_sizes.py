"""How many bytes a piece takes in its encoding. It imports torch, which no store needs for that."""

from typing import cast

import torch

from actors.kv.pieces import ACTIVATIONS, ALIGNMENT, Layout, PieceId, Record
from models.kv_codec import Encoding, layer_bytes


def encoded_layer_bytes(piece: PieceId, layout: Layout) -> int:
    """Return the bytes of one layer of a piece, a multiple of 64."""
    num_tokens, dtype = piece.end - piece.start, getattr(torch, layout.dtype)
    if piece.encoding == ACTIVATIONS:
        num_bytes = num_tokens * layout.hidden_size * dtype.itemsize
        return -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return layer_bytes(
        cast(Encoding, piece.encoding),
        num_tokens=num_tokens,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=dtype,
    )


def record_of(piece: PieceId, layout: Layout) -> Record:
    """Return where the parts of a piece's record lie."""
    return Record(num_layers=layout.num_layers, layer_bytes=encoded_layer_bytes(piece, layout))
