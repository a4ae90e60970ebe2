"""Keys and values in pages: how they lie in memory, how rows are stored, how queries read them.

A rank's rows of one sequence (its *run*) lie in a list of pages, in order of
position. The layout of a layer's pages belongs to the kernel that reads them:

    CPU   [K, pages, C, D]   head-major: one head's keys of neighbouring pages are one matrix
    CUDA  [pages, C, K, D]   as paged flash kernels want it

Either way neighbouring pages are one strided view of rows, without a copy. How
the rows are cut for the kernel follows from their number and from that of the
queries, never from where the pages lie, so that the bits of a result do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.cpu_kernel import attend_packed, pack_groups, unpack_groups
from attention.cuda_kernels import PageIndex, attend_flash_pages, flash_reads_pages
from attention.kernel import attend, empty_partial
from attention.merge import merge_into, merge_stacked

# Below so many rows of packed queries the CPU kernel takes queries in its smallest blocks, and
# is then fastest with pages as a batch.
_MANY_QUERY_ROWS = 192
_BATCH_QUERY_ROWS = 16384  # of one KV head, over all pages whose partials are merged at once
_BLOCK_ROWS = 4096  # keys of one kernel call of many queries: the bound of a gathered copy


def pages_shape(
    device: torch.device, *, num_pages: int, page_tokens: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Return the shape of all pages of one layer's keys (or of its values) on a device."""
    if device.type == "cpu":
        return num_kv_heads, num_pages, page_tokens, head_dim
    return num_pages, page_tokens, num_kv_heads, head_dim


def store_rows(pages: Tensor, page_ids: Sequence[int], first_row: int, rows_SKD: Tensor) -> None:
    """Write rows ``first_row, first_row + 1, ...`` of a run whose pages are ``page_ids``."""
    memory_SKD = rows_of(pages)
    end_row, done = first_row + rows_SKD.shape[0], 0
    for start, count in row_spans(page_ids, first_row, end_row, _capacity(pages)):
        memory_SKD[start : start + count].copy_(rows_SKD[done : done + count], non_blocking=True)
        done += count


def load_rows(pages: Tensor, page_ids: Sequence[int], first_row: int, out_SKD: Tensor) -> None:
    """Copy rows ``first_row, first_row + 1, ...`` of a run whose pages are ``page_ids``."""
    memory_SKD, done = rows_of(pages), 0
    for start, count in row_spans(page_ids, first_row, first_row + len(out_SKD), _capacity(pages)):
        out_SKD[done : done + count].copy_(memory_SKD[start : start + count], non_blocking=True)
        done += count


def store_each(kv_pages: Tensor, slots_T: Tensor, rows_TJD: Tensor) -> None:
    """Write rows each to its own place: row r of page p lies at ``p * capacity + r``.

    ``kv_pages`` are a layer's pages of keys and of values; a row holds keys' heads, then values'.
    """
    rows_T2KD = rows_TJD.unflatten(1, (2, -1))
    if is_head_major(kv_pages):
        K, D = kv_pages.shape[1], kv_pages.shape[-1]
        kv_pages.view(2, K, -1, D)[:, :, slots_T] = rows_T2KD.permute(1, 2, 0, 3)
    else:
        K, D = kv_pages.shape[-2:]
        kv_pages.view(2, -1, K, D)[:, slots_T] = rows_T2KD.transpose(0, 1)


def copy_page(pages: Tensor, source: int, target: int, num_rows: int) -> None:
    """Copy the first rows of one page to another.

    ``pages`` has a layer's shape, after any number of leading dimensions: all
    layers' keys and values are copied at once.
    """
    page_dim, row_dim = (-3, -2) if is_head_major(pages) else (-4, -3)
    rows = pages.narrow(row_dim, 0, num_rows)
    rows.select(page_dim, target).copy_(rows.select(page_dim, source))


@dataclass(frozen=True, eq=False)
class PagedRows:
    """One layer's rows of one sequence on this rank, in pages."""

    k_pages: Tensor
    v_pages: Tensor
    page_ids: Sequence[int]
    num_rows: int

    def attend(
        self, q_THD: Tensor, *, rows: tuple[int, int] | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out_THD, lse_TH)`` in float32 of queries that all see the rows.

        ``rows`` are the first and the one past the last; all rows by default.
        """
        first_row, end_row = rows or (0, self.num_rows)
        if first_row >= end_row or q_THD.shape[0] == 0:
            return empty_partial(q_THD)
        if not is_head_major(self.k_pages):
            return self._attend_cuda(q_THD, first_row, end_row, scale)
        q_KRD = pack_groups(q_THD, self.k_pages.shape[0])
        few = q_KRD.shape[1] < _MANY_QUERY_ROWS
        attend_rows = self._attend_pages if few else self._attend_blocks
        return unpack_groups(*attend_rows(q_KRD, first_row, end_row, scale), q_THD.shape[0])

    def copy_into(self, first_row: int, out_SJD: Tensor) -> None:
        """Copy rows ``first_row, first_row + 1, ...``: keys' heads, then values' heads."""
        k_SKD, v_SKD = out_SJD.chunk(2, dim=1)
        for pages, copy_SKD in ((self.k_pages, k_SKD), (self.v_pages, v_SKD)):
            load_rows(pages, self.page_ids, first_row, copy_SKD)

    def _attend_pages(
        self, q_KRD: Tensor, first_row: int, end_row: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Read pages in place as so many sets of keys: neighbouring ones in one kernel call."""
        capacity = _capacity(self.k_pages)
        batch_rows = max(1, _BATCH_QUERY_ROWS // q_KRD.shape[1]) * capacity
        merged = []
        for batch in range(first_row // batch_rows * batch_rows, end_row, batch_rows):
            spans = self._spans(max(first_row, batch), min(end_row, batch + batch_rows))
            partials = []
            for page, count, start, end in _whole_pages(spans, capacity):
                k_BKSD, v_BKSD = (
                    memory[:, page : page + count, start:end].transpose(0, 1)
                    for memory in (self.k_pages, self.v_pages)
                )
                partials.append(attend_packed(q_KRD, k_BKSD, v_BKSD, scale))
            outs, lses = zip(*partials, strict=True)
            merged.append(merge_stacked(torch.cat(outs), torch.cat(lses)))
        if len(merged) == 1:
            return merged[0]
        outs, lses = zip(*merged, strict=True)
        return merge_stacked(torch.stack(outs), torch.stack(lses))

    def _attend_blocks(
        self, q_KRD: Tensor, first_row: int, end_row: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Read blocks of rows, one kernel call each; in place where they are one view."""
        merged: tuple[Tensor, Tensor] | None = None
        for k_KSD, v_KSD in self._blocks(first_row, end_row):
            out_1KRD, lse_1KR = attend_packed(q_KRD, k_KSD[None], v_KSD[None], scale)
            if merged is None:
                merged = out_1KRD[0], lse_1KR[0]
            else:
                merge_into(*merged, out_1KRD[0], lse_1KR[0])
        assert merged is not None
        return merged

    def _blocks(self, first_row: int, end_row: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values ``[K, S, D]`` of every block; the next may overwrite the last."""
        memories = [pages.flatten(1, 2) for pages in (self.k_pages, self.v_pages)]
        gathered: Tensor | None = None
        for block_row in range(first_row, end_row, _BLOCK_ROWS):
            block_end = min(block_row + _BLOCK_ROWS, end_row)
            spans = self._spans(block_row, block_end)
            if len(spans) == 1:
                start, count = spans[0]
                k_KSD, v_KSD = (memory_KSD[:, start : start + count] for memory_KSD in memories)
                yield k_KSD, v_KSD
                continue
            if gathered is None:
                K, _, D = memories[0].shape
                gathered = memories[0].new_empty(2, K, min(_BLOCK_ROWS, end_row - first_row), D)
            for memory_KSD, copy_KSD in zip(memories, gathered, strict=True):
                torch.cat(
                    [memory_KSD[:, start : start + count] for start, count in spans],
                    dim=1,
                    out=copy_KSD[:, : block_end - block_row],
                )
            yield gathered[0, :, : block_end - block_row], gathered[1, :, : block_end - block_row]

    def _attend_cuda(
        self, q_THD: Tensor, first_row: int, end_row: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Read neighbouring pages in place, others by the kernel that can, else a gathered copy.

        The pool gives out the lowest free pages, so a lone sequence's are neighbours.
        """
        spans = self._spans(first_row, end_row)
        if len(spans) == 1:
            start, count = spans[0]
            k_SKD, v_SKD = (
                rows_of(pages)[start : start + count] for pages in (self.k_pages, self.v_pages)
            )
            return attend(q_THD, k_SKD, v_SKD, scale=scale)
        capacity = _capacity(self.k_pages)
        used = self.page_ids[first_row // capacity : -(-end_row // capacity)]
        skipped, num_rows = first_row % capacity, end_row - first_row
        if skipped == 0 and flash_reads_pages(self.k_pages):
            where = PageIndex.of([(used, num_rows)], capacity, q_THD.device)
            return attend_flash_pages(q_THD, self.k_pages, self.v_pages, where, scale)
        index = torch.tensor(used, dtype=torch.int32, device=q_THD.device)
        k_SKD, v_SKD = (
            pages[index].flatten(0, 1)[skipped : skipped + num_rows]
            for pages in (self.k_pages, self.v_pages)
        )
        return attend(q_THD, k_SKD, v_SKD, scale=scale)

    def _spans(self, first_row: int, end_row: int) -> list[tuple[int, int]]:
        return row_spans(self.page_ids, first_row, end_row, _capacity(self.k_pages))


def is_head_major(pages: Tensor) -> bool:
    """Return whether these pages have the layout of CPU."""
    return pages.device.type == "cpu"


def _capacity(pages: Tensor) -> int:
    """Return how many rows a page holds."""
    return pages.shape[2] if is_head_major(pages) else pages.shape[1]


def rows_of(pages: Tensor) -> Tensor:
    """Return a view of all rows of a layer's pages, ``[S, K, D]``."""
    K, D = pages.shape[0 if is_head_major(pages) else 2], pages.shape[-1]
    # Never `flatten`, which copies where it cannot view: what is stored would be lost.
    if is_head_major(pages):
        return pages.view(K, -1, D).transpose(0, 1)
    return pages.view(-1, K, D)


def row_spans(
    page_ids: Sequence[int], first_row: int, end_row: int, capacity: int
) -> list[tuple[int, int]]:
    """Return ``(first row in memory, rows)`` of each stretch of some rows that lies together."""
    if first_row >= end_row:
        return []
    used = page_ids[first_row // capacity : -(-end_row // capacity)]
    if list(used) == list(range(used[0], used[0] + len(used))):
        return [(used[0] * capacity + first_row % capacity, end_row - first_row)]
    spans: list[tuple[int, int]] = []
    row = first_row
    while row < end_row:
        index, offset = divmod(row, capacity)
        start, count = page_ids[index] * capacity + offset, min(capacity - offset, end_row - row)
        if spans and sum(spans[-1]) == start:
            spans[-1] = spans[-1][0], spans[-1][1] + count
        else:
            spans.append((start, count))
        row += count
    return spans


def _whole_pages(
    spans: Sequence[tuple[int, int]], capacity: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(first page, pages, first row in each, end)``: whole pages together, others alone."""
    for start, count in spans:
        end = start + count
        first_whole, end_whole = -(-start // capacity) * capacity, end // capacity * capacity
        if start < first_whole:
            page, offset = divmod(start, capacity)
            yield page, 1, offset, min(end - page * capacity, capacity)
        if first_whole < end_whole:
            yield first_whole // capacity, (end_whole - first_whole) // capacity, 0, capacity
        if first_whole <= end_whole < end:
            yield end_whole // capacity, 1, 0, end - end_whole
