"""Keys and values in pages of a byte a value: rows are decoded as they are read.

A block of rows at a time becomes rows in the dtype of queries, in memory of their own,
and attention reads these. So memory for decoded rows stays bounded, however long a run is.
How rows are cut follows from their number alone, as in `attention.paged`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.kernel import attend, empty_partial
from attention.merge import merge_into
from attention.paged import PagedRows, rows_of
from attention.quantised import RowEncoding, decode_rows

_BLOCK_ROWS = 4096  # decoded at once


@dataclass(frozen=True, eq=False)
class QuantisedRows(PagedRows):
    """One layer's rows of one sequence on this rank; ``k_pages`` and ``v_pages`` hold codes."""

    k_largest: Tensor  # pages of each row's largest magnitude, in the dtype of decoded rows
    v_largest: Tensor
    encoding: RowEncoding

    def attend(
        self, q_THD: Tensor, *, rows: tuple[int, int] | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `PagedRows.attend`."""
        first_row, end_row = rows or (0, self.num_rows)
        if q_THD.shape[0] == 0:
            return empty_partial(q_THD)
        merged: tuple[Tensor, Tensor] | None = None
        for start, end in _cut(first_row, end_row):
            partial = attend(
                q_THD,
                self._decoded(self.k_pages, self.k_largest, start, end),
                self._decoded(self.v_pages, self.v_largest, start, end),
                scale=scale,
            )
            if merged is None:
                merged = partial
            else:
                merge_into(*merged, *partial)
        return empty_partial(q_THD) if merged is None else merged

    def copy_into(self, first_row: int, out_SJD: Tensor) -> None:
        """See `PagedRows.copy_into`; what is copied are decoded rows."""
        k_SKD, v_SKD = out_SJD.chunk(2, dim=1)
        for start, end in _cut(first_row, first_row + out_SJD.shape[0]):
            done = slice(start - first_row, end - first_row)
            k_SKD[done].copy_(self._decoded(self.k_pages, self.k_largest, start, end))
            v_SKD[done].copy_(self._decoded(self.v_pages, self.v_largest, start, end))

    def _decoded(self, pages: Tensor, largest: Tensor, first_row: int, end_row: int) -> Tensor:
        """Return rows ``[S, K, D]`` of keys or of values."""
        spans = self._spans(first_row, end_row)
        codes_SKD, largest_SK1 = (
            torch.cat([memory[start : start + count] for start, count in spans])
            for memory in (rows_of(pages), rows_of(largest))
        )
        return decode_rows(self.encoding, codes_SKD, largest_SK1)


def _cut(first_row: int, end_row: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one past the last of each block."""
    for start in range(first_row, end_row, _BLOCK_ROWS):
        yield start, min(start + _BLOCK_ROWS, end_row)
