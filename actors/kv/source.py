"""A part of a sequence within its piece's record: where its bytes lie, and which rows they are.

Letters: K = KV heads, S = rows, D = head dim, E = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from actors.kv.arena import Arena
from actors.kv.messages import RestorePart
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import ACTIVATIONS, RAW, BadPiece, Layout, Record, read_header
from models.kv_codec import Encoding, decode
from models.page_pool import Spans


@dataclass(eq=False, kw_only=True)
class Source:
    """What a rank restores out of one record, and how far it has come."""

    part: RestorePart
    layout: Layout
    dtype: torch.dtype
    spans: Spans  # of the pages, where its rows go
    sums: Sequence[bytes] = ()  # of its layers, once its header is read
    layers: int = 0  # that are in the pages, or zeros
    is_damaged: bool = False
    _where: Record | None = None

    @property
    def is_activations(self) -> bool:
        """Whether it is projected; else it is KV."""
        return self.part.lease.piece.encoding == ACTIVATIONS

    @property
    def num_rows(self) -> int:
        """Rows that are restored, of those that the piece has."""
        return self.part.end - self.part.start

    @property
    def is_read(self) -> bool:
        """Whether its header is good: then all its layers are fetched."""
        return self._where is not None

    def read_header(self, arena: Arena) -> None:
        """Read and verify its header.

        Raises:
            BadPiece: It is damaged, or another piece's.
        """
        lease = self.part.lease
        record = arena.view(lease.offset_bytes, lease.size_bytes)
        where, self.sums = read_header(record, lease.piece, self.layout, lease.seal)
        if where != record_of(lease.piece, self.layout):
            raise BadPiece("its layers have another size")
        self._where = where

    def layer_range(self, layer: int) -> tuple[int, int]:
        """Return offset and size of a layer in the arena, in bytes."""
        assert self._where is not None
        start = self._where.payload_offset + layer * self._where.layer_bytes
        return self.part.lease.offset_bytes + start, self._where.layer_bytes

    def inputs(self, data: memoryview) -> Tensor:
        """Return a view of its rows ``inputs_SE`` in a layer's bytes."""
        S, E = self._num_piece_rows, self.layout.hidden_size
        return torch.frombuffer(data, dtype=self.dtype, count=S * E).view(S, E)[self._rows]

    def kv(self, data: memoryview) -> Tensor:
        """Return its rows ``kv_2KSD`` out of a layer's bytes; of raw ones a view."""
        K, S, D = self.layout.num_kv_heads, self._num_piece_rows, self.layout.head_dim
        encoding = self.part.lease.piece.encoding
        if encoding == RAW:
            values = torch.frombuffer(data, dtype=self.dtype, count=2 * K * S * D)
            return values.view(2, K, S, D)[:, :, self._rows]
        kv_2KSD = torch.empty(2, K, S, D, dtype=self.dtype)
        decode(cast(Encoding, encoding), torch.frombuffer(data, dtype=torch.uint8), kv_2KSD)
        return kv_2KSD[:, :, self._rows]

    def zeros(self) -> Tensor:
        """Return ``kv_2KSD`` for rows that are not to be had."""
        K, D = self.layout.num_kv_heads, self.layout.head_dim
        return torch.zeros(2, K, self.num_rows, D, dtype=self.dtype)

    @property
    def _num_piece_rows(self) -> int:
        piece = self.part.lease.piece
        return piece.end - piece.start

    @property
    def _rows(self) -> slice:
        first = self.part.start - self.part.block_start - self.part.lease.piece.start
        return slice(first, first + self.num_rows)
