"""The device memory for keys and values of one rank: a pool of pages, allocated once at start.

Pages hold rows as they are computed, or codes of a byte a value beside pages of each row's
largest magnitude (`attention.quantised`). Whatever is attended to, in the step that computes
it or later, is what the pages give back: see `PagePool.as_stored`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from attention import PagedBatch, PagedRows
from attention.paged import (
    copy_page,
    is_head_major,
    pages_shape,
    row_spans,
    store_each,
    store_rows,
)
from attention.paged_quantised import QuantisedRows
from attention.quantised import as_decoded, decode_rows, encode_rows
from models.config import ModelConfig
from models.page_table import CacheOp, Grow, PageTable

Spans = Sequence[tuple[int, int]]  # first row in a layer's memory, and how many lie together
KVCacheDtype = Literal["auto", "int8", "fp8"]  # auto: as computed


def kv_bytes_per_token(
    config: ModelConfig, dtype: torch.dtype, kv_cache_dtype: KVCacheDtype
) -> int:
    """Return the bytes that a token takes in the pages of all layers."""
    row_bytes = config.head_dim * dtype.itemsize
    if kv_cache_dtype != "auto":
        row_bytes = config.head_dim + dtype.itemsize
    return config.num_layers * 2 * config.num_kv_heads * row_bytes


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
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        """Allocate ``num_layers * 2 * num_pages`` pages of ``page_tokens`` tokens each."""

        def allocate(row_dim: int, page_dtype: torch.dtype) -> Tensor:
            shape = pages_shape(
                device,
                num_pages=num_pages,
                page_tokens=page_tokens,
                num_kv_heads=num_kv_heads,
                head_dim=row_dim,
            )
            # On CPU memory of `empty` is committed page by page as it is written.
            return torch.empty((num_layers, 2, *shape), dtype=page_dtype, device=device)

        self.table = PageTable(num_pages=num_pages, page_tokens=page_tokens)
        self.dtype, self.device = dtype, device
        # Told which pages are about to be written anew, by whoever may still be reading them.
        self.before_write: Callable[[set[int]], None] | None = None
        self._encoding = None if kv_cache_dtype == "auto" else kv_cache_dtype
        # Rows; or codes, and beside them each row's largest magnitude.
        self._pages = allocate(head_dim, dtype if self._encoding is None else torch.uint8)
        self._memories = [self._pages]
        if self._encoding is not None:
            self._memories.append(allocate(1, dtype))

    def apply(self, op: CacheOp, rank: int) -> None:
        """Execute an operation of the coordinator as this rank.

        Raises:
            MemoryError: The pool has too few free pages; nothing is changed.
        """
        if isinstance(op, Grow) and self.before_write is not None:
            held = set(self.table.run(op.sequence_id).page_ids)
            copy = self.table.apply(op, rank)
            self.before_write(set(self.table.run(op.sequence_id).page_ids) - held)
        else:
            copy = self.table.apply(op, rank)
        if copy is not None:
            for pages in self._memories:
                copy_page(pages, copy.source, copy.target, copy.num_rows)

    def as_stored(self, kv_TJD: Tensor) -> Tensor:
        """Return new rows as they come back from the pages.

        A step attends to these, so that a token's answer does not depend on which tokens
        were computed beside it and which before.
        """
        return kv_TJD if self._encoding is None else as_decoded(self._encoding, kv_TJD)

    def store(self, layer: int, sequence_id: int, first_row: int, kv_TJD: Tensor) -> None:
        """Write one layer's new rows; ``kv_TJD`` holds keys' heads, then values' heads."""
        page_ids = self.table.run(sequence_id).page_ids
        for memory, part_TJD in zip(self._memories, self._encode(kv_TJD), strict=True):
            for pages, rows_TKD in zip(memory[layer], part_TJD.chunk(2, dim=1), strict=True):
                store_rows(pages, page_ids, first_row, rows_TKD)

    def spans(self, page_ids: Sequence[int], first_row: int, count: int) -> Spans:
        """Return where rows of a run with these pages lie, for `read_rows` and `write_rows`."""
        return row_spans(page_ids, first_row, first_row + count, self.table.page_tokens)

    def read_rows(self, layer: int, spans: Spans, out_2KSD: Tensor) -> None:
        """Copy rows: keys, then values, head by head."""
        parts = [out_2KSD]
        if self._encoding is not None:
            parts = [
                torch.empty(*out_2KSD.shape[:3], memory.shape[-1], dtype=memory.dtype)
                for memory in self._memories
            ]
        for rows_2KSD, part_2KSD in zip(self._rows(layer), parts, strict=True):
            done = 0
            for start, count in spans:
                source = rows_2KSD[:, :, start : start + count]
                part_2KSD[:, :, done : done + count].copy_(source, non_blocking=True)
                done += count
        if self._encoding is not None:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            out_2KSD.copy_(decode_rows(self._encoding, *parts))

    def write_rows(self, layer: int, spans: Spans, kv_2KSD: Tensor) -> None:
        """Write rows, as `read_rows` copies them."""
        parts = (kv_2KSD,) if self._encoding is None else encode_rows(self._encoding, kv_2KSD)
        for rows_2KSD, part_2KSD in zip(self._rows(layer), parts, strict=True):
            done = 0
            for start, count in spans:
                source = part_2KSD[:, :, done : done + count]
                rows_2KSD[:, :, start : start + count].copy_(source, non_blocking=True)
                done += count

    def _rows(self, layer: int) -> list[Tensor]:
        """Return a view of all rows of a layer in each memory, ``[2, K, S, D]``."""
        if is_head_major(self._pages[layer]):
            return [of[layer].view(2, of.shape[2], -1, of.shape[-1]) for of in self._memories]
        return [of[layer].view(2, -1, *of.shape[-2:]).transpose(1, 2) for of in self._memories]

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
        for memory, part_TJD in zip(self._memories, self._encode(kv_TJD), strict=True):
            store_each(memory[layer], slots_T, part_TJD)

    def batch(self, rows: Sequence[tuple[int, int]]) -> PagedBatch:
        """Return ``(sequence, rows)`` as attention with one query each reads them in any layer."""
        runs = [(self.table.run(sequence_id).page_ids, count) for sequence_id, count in rows]
        return PagedBatch(runs, page_tokens=self.table.page_tokens, device=self._pages.device)

    def attend(self, layer: int, batch: PagedBatch, q_BHD: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(out_BHD, lse_BH)``: query b sees the rows of sequence b of the batch."""
        if self._encoding is None:
            k_pages, v_pages = self._pages[layer]
            return batch.attend(q_BHD, k_pages, v_pages)
        partials = [
            self._rows_in(layer, page_ids, num_rows).attend(q_1HD)
            for (page_ids, num_rows), q_1HD in zip(batch.runs, q_BHD.split(1), strict=True)
        ]
        outs_1HD, lses_1H = zip(*partials, strict=True)
        return torch.cat(outs_1HD), torch.cat(lses_1H)

    def rows(self, layer: int, sequence_id: int, num_rows: int) -> PagedRows:
        """Return the first rows of a sequence on this rank, as attention reads them."""
        return self._rows_in(layer, self.table.run(sequence_id).page_ids, num_rows)

    def _rows_in(self, layer: int, page_ids: Sequence[int], num_rows: int) -> PagedRows:
        k_pages, v_pages = self._pages[layer]
        if self._encoding is None:
            return PagedRows(k_pages, v_pages, page_ids, num_rows)
        k_largest, v_largest = self._memories[1][layer]
        return QuantisedRows(
            k_pages, v_pages, page_ids, num_rows, k_largest, v_largest, self._encoding
        )

    def _encode(self, kv_TJD: Tensor) -> tuple[Tensor, ...]:
        """Return what of new rows goes into each memory."""
        return (kv_TJD,) if self._encoding is None else encode_rows(self._encoding, kv_TJD)
