"""The device memory for keys and values of one rank: a pool of pages, allocated once at start."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import PagedBatch, PagedRows
from attention.paged import copy_page, pages_shape, store_each, store_rows
from models.page_table import CacheOp, PageTable


class PagePool:
    """Pages of keys and values for every layer; page p of one layer goes with page p of all.

    Which rows lie where is in `table`. Not thread-safe.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``num_layers * 2 * num_pages`` pages of ``page_tokens`` tokens each."""
        shape = pages_shape(
            device,
            num_pages=num_pages,
            page_tokens=page_tokens,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        self.table = PageTable(num_pages=num_pages, page_tokens=page_tokens)
        # On CPU memory of `empty` is committed page by page as it is written.
        self._pages = torch.empty((num_layers, 2, *shape), dtype=dtype, device=device)

    def apply(self, op: CacheOp, rank: int) -> None:
        """Execute an operation of the coordinator as this rank.

        Raises:
            MemoryError: The pool has too few free pages; nothing is changed.
        """
        copy = self.table.apply(op, rank)
        if copy is not None:
            copy_page(self._pages, copy.source, copy.target, copy.num_rows)

    def store(self, layer: int, sequence_id: int, first_row: int, kv_TJD: Tensor) -> None:
        """Write one layer's new rows; ``kv_TJD`` holds keys' heads, then values' heads."""
        page_ids = self.table.run(sequence_id).page_ids
        for pages, rows_TKD in zip(self._pages[layer], kv_TJD.chunk(2, dim=1), strict=True):
            store_rows(pages, page_ids, first_row, rows_TKD)

    def slots(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Return where rows ``(sequence, row)`` lie in each layer's memory, for `store_at`."""
        capacity = self.table.page_tokens
        slots = [
            self.table.run(sequence_id).page_ids[row // capacity] * capacity + row % capacity
            for sequence_id, row in rows
        ]
        return torch.tensor(slots, dtype=torch.int64, device=self._pages.device)

    def store_at(self, layer: int, slots_T: Tensor, kv_TJD: Tensor) -> None:
        """Write one layer's new rows of any sequences, each where `slots` says."""
        store_each(self._pages[layer], slots_T, kv_TJD)

    def batch(self, rows: Sequence[tuple[int, int]]) -> PagedBatch:
        """Return ``(sequence, rows)`` as attention with one query each reads them in any layer."""
        runs = [(self.table.run(sequence_id).page_ids, count) for sequence_id, count in rows]
        return PagedBatch(runs, page_tokens=self.table.page_tokens, device=self._pages.device)

    def attend(self, layer: int, batch: PagedBatch, q_BHD: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(out_BHD, lse_BH)``: query b sees the rows of sequence b of the batch."""
        k_pages, v_pages = self._pages[layer]
        return batch.attend(q_BHD, k_pages, v_pages)

    def rows(self, layer: int, sequence_id: int, num_rows: int) -> PagedRows:
        """Return the first rows of a sequence on this rank, as attention reads them."""
        k_pages, v_pages = self._pages[layer]
        return PagedRows(k_pages, v_pages, self.table.run(sequence_id).page_ids, num_rows)
