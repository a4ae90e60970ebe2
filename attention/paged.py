"""Keys and values in pages: how a page lies in memory, how rows are stored, how a query reads them.

A rank's rows of one sequence (its *run*) lie in a list of pages, in order of
position. The layout of a page belongs to the kernel that reads it:

    CPU   [pages, K, C, D]   head-major: one head's keys of a page are one matrix
    CUDA  [pages, C, K, D]   as paged flash kernels want it
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attention.cuda_kernels import attend_flash_pages, flash_reads_pages
from attention.kernel import attend, empty_partial
from attention.merge import merge_stacked


def page_shape(
    device: torch.device, *, page_tokens: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int]:
    """Return the shape of one page of keys (or of values) on a device."""
    if device.type == "cpu":
        return num_kv_heads, page_tokens, head_dim
    return page_tokens, num_kv_heads, head_dim


def store_rows(pages: Tensor, page_ids: Sequence[int], first_row: int, rows_SKD: Tensor) -> None:
    """Write rows ``first_row, first_row + 1, ...`` of a run whose pages are ``page_ids``."""
    if rows_SKD.shape[0] == 0:
        return
    store = _store_rows_cpu if pages.device.type == "cpu" else _store_rows_cuda
    store(pages, page_ids, first_row, rows_SKD)


def _store_rows_cpu(
    pages: Tensor, page_ids: Sequence[int], first_row: int, rows_SKD: Tensor
) -> None:
    for page, offset, rows_nKD in _by_page(pages, page_ids, first_row, rows_SKD, pages.shape[2]):
        page[:, offset : offset + len(rows_nKD)].copy_(rows_nKD.transpose(0, 1))


def _store_rows_cuda(
    pages: Tensor, page_ids: Sequence[int], first_row: int, rows_SKD: Tensor
) -> None:
    """Write with one copy where the pages are neighbours, else with one a page."""
    capacity, end_row = pages.shape[1], first_row + rows_SKD.shape[0]
    first = first_row // capacity
    run_SKD = _neighbours(pages, page_ids[first : -(-end_row // capacity)])
    if run_SKD is not None:
        run_SKD[first_row - first * capacity : end_row - first * capacity].copy_(rows_SKD)
        return
    for page, offset, rows_nKD in _by_page(pages, page_ids, first_row, rows_SKD, capacity):
        page[offset : offset + len(rows_nKD)].copy_(rows_nKD)


def _by_page(
    pages: Tensor, page_ids: Sequence[int], first_row: int, rows_SKD: Tensor, capacity: int
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield ``(page, first row in it, rows)`` for each page that some rows belong to."""
    done = 0
    while done < rows_SKD.shape[0]:
        index, offset = divmod(first_row + done, capacity)
        count = min(capacity - offset, rows_SKD.shape[0] - done)
        yield pages[page_ids[index]], offset, rows_SKD[done : done + count]
        done += count


def _neighbours(pages: Tensor, page_ids: Sequence[int]) -> Tensor | None:
    """Return all rows ``[S, K, D]`` of these CUDA pages as one view, or None if they lie apart."""
    first, count = page_ids[0], len(page_ids)
    if list(page_ids) != list(range(first, first + count)):
        return None
    return pages[first : first + count].flatten(0, 1)


def attend_pages(
    q_THD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_ids: Sequence[int],
    num_rows: int,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out_THD, lse_TH)`` in float32 of queries that all see the first rows of a run."""
    if num_rows == 0 or q_THD.shape[0] == 0:
        return empty_partial(q_THD)
    attend_run = _attend_pages_cpu if q_THD.device.type == "cpu" else _attend_pages_cuda
    return attend_run(q_THD, k_pages, v_pages, page_ids, num_rows, scale)


def _attend_pages_cuda(
    q_THD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_ids: Sequence[int],
    num_rows: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Read neighbouring pages in place, others by the kernel that can, else a gathered copy.

    The pool gives out the lowest free pages, so a lone sequence's are neighbours.
    """
    used = page_ids[: -(-num_rows // k_pages.shape[1])]
    k_SKD, v_SKD = _neighbours(k_pages, used), _neighbours(v_pages, used)
    if k_SKD is not None and v_SKD is not None:
        return attend(q_THD, k_SKD[:num_rows], v_SKD[:num_rows], scale=scale)
    index = torch.tensor(used, dtype=torch.int32, device=q_THD.device)
    if flash_reads_pages(k_pages):
        return attend_flash_pages(q_THD, k_pages, v_pages, index, num_rows, scale)
    k_SKD, v_SKD = (pages[index].flatten(0, 1)[:num_rows] for pages in (k_pages, v_pages))
    return attend(q_THD, k_SKD, v_SKD, scale=scale)


def _attend_pages_cpu(
    q_THD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_ids: Sequence[int],
    num_rows: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Read the pages in place: neighbouring full pages are the batch of one kernel call.

    A KV head's group of query heads becomes rows of one matrix, so that a page's
    keys are read once for the whole group.
    """
    T, H, D = q_THD.shape
    K = k_pages.shape[1]
    q_KRD = q_THD.view(T, K, H // K, D).transpose(0, 1).reshape(K, -1, D)
    outs, lses = [], []
    for first, count, rows in _page_spans(page_ids, num_rows, k_pages.shape[2]):
        k_PKSD, v_PKSD = (pages[first : first + count, :, :rows] for pages in (k_pages, v_pages))
        out_PKRD, lse_PKR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KRD.expand(count, -1, -1, -1), k_PKSD, v_PKSD, scale=scale
        )
        outs.append(out_PKRD.float())
        lses.append(lse_PKR.float())
    out_KRD, lse_KR = merge_stacked(torch.cat(outs), torch.cat(lses))
    out_THD = out_KRD.view(K, T, H // K, D).transpose(0, 1).reshape(T, H, D)
    return out_THD, lse_KR.view(K, T, H // K).transpose(0, 1).reshape(T, H)


def _page_spans(
    page_ids: Sequence[int], num_rows: int, capacity: int
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(first page, pages, rows of each)``: neighbouring full pages, then a partial one."""
    full, rest = divmod(num_rows, capacity)
    # Neighbours in memory keep the difference between page id and index.
    numbered = enumerate(page_ids[:full])
    for _, group in itertools.groupby(numbered, key=lambda item: item[1] - item[0]):
        span = [page_id for _, page_id in group]
        yield span[0], len(span), capacity
    if rest:
        yield page_ids[full], 1, rest
