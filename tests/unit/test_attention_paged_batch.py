"""Each query of a batch sees the rows of its own sequence, wherever they lie (CPU layout)."""

import pytest
import torch
from torch import Tensor

from attention.paged import PagedRows, pages_shape, store_each, store_rows
from attention.paged_batch import PagedBatch, PagedRun
from tests.reference import TOLERANCES, random_qkv, softmax_attention

PAGE = 4  # tokens
CPU = torch.device("cpu")
RUNS: dict[str, list[PagedRun]] = {
    "one": [([2, 3, 4], 11)],
    "one without rows": [([], 0)],
    "one a page": [([5], 3), ([1], 1), ([2], 4), ([0], 2)],
    "ragged": [([0, 1, 2], 9), ([], 0), ([7], 1), ([3, 4, 5, 6], 16), ([], 0)],
    "apart": [([9, 0, 5], 12), ([1, 8], 7), ([7, 2], 8)],
    "side by side": [([0, 1], 8), ([2, 3], 8), ([4, 5, 6], 12)],
    "shared pages": [([0, 1, 2], 12), ([0, 1, 5], 10), ([0, 3], 8)],
    "one long": [([4], 2), ([*range(8, 40)], 127), ([6, 5], 8)],
}


def empty_pages(kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return pages of keys and of values full of nan: memory that no row was written to."""
    shape = pages_shape(CPU, num_pages=40, page_tokens=PAGE, num_kv_heads=kv_heads, head_dim=32)
    return torch.full((2, *shape), torch.nan, dtype=dtype)


def stored(
    runs: list[PagedRun], kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return pages with rows that follow from their page alone, and each run's keys and values."""
    pages, rows = empty_pages(kv_heads, dtype), []
    for page_ids, count in runs:
        parts = [random_qkv(1, PAGE, kv_heads=kv_heads, dtype=dtype, seed=p)[1:] for p in page_ids]
        k, v = (
            torch.cat([torch.empty(0, kv_heads, 32, dtype=dtype), *part])[:count]
            for part in (zip(*parts, strict=True) if parts else ((), ()))
        )
        store_rows(pages[0], page_ids, 0, k)
        store_rows(pages[1], page_ids, 0, v)
        rows.append((k, v))
    return pages, rows


def attend(
    runs: list[PagedRun], q_BHD: Tensor, pages: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    batch = PagedBatch(runs, page_tokens=PAGE, device=CPU)
    return batch.attend(q_BHD, pages[0], pages[1], scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_each_query_sees_its_own_rows(
    runs: list[PagedRun], heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    """As by the definition, and as each sequence read alone."""
    pages, rows = stored(runs, kv_heads, dtype)
    q, _, _ = random_qkv(len(runs), 1, heads=heads, dtype=dtype, seed=99)

    for scale in (None, 0.4):
        out, lse = attend(runs, q, pages, scale)

        assert out.dtype is lse.dtype is torch.float32
        for b, ((page_ids, count), (k, v)) in enumerate(zip(runs, rows, strict=True)):
            expected_out, expected_lse = softmax_attention(q[b : b + 1], k, v, scale=scale)
            torch.testing.assert_close(out[b : b + 1].double(), expected_out, **TOLERANCES[dtype])
            torch.testing.assert_close(lse[b : b + 1].double(), expected_lse, rtol=1e-4, atol=2e-4)
            alone = PagedRows(pages[0], pages[1], page_ids, count).attend(q[b : b + 1], scale=scale)
            torch.testing.assert_close(out[b : b + 1], alone[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse[b : b + 1], alone[1], rtol=1e-5, atol=1e-6)


def test_bits_do_not_depend_on_neighbours_or_places() -> None:
    """What runs beside a sequence, and where its pages lie, changes from run to run."""
    q, k, v = random_qkv(1, 22)
    beside, _ = stored(RUNS["one long"])
    results = []
    for page_ids in ([0, 1, 2, 3, 7, 39], [39, 7, 3, 2, 1, 0], [0, 1, 2, 3, 39, 7]):
        pages = beside.clone()
        store_rows(pages[0], page_ids, 0, k)
        store_rows(pages[1], page_ids, 0, v)
        run = (page_ids, 22)
        results.append(attend([run], q, pages))
        out, lse = attend([([4], 2), run, ([*range(8, 39)], 123)], q.expand(3, -1, -1), pages)
        results.append((out[1:2], lse[1:2]))

    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_queries_may_be_a_slice_of_a_fused_tensor() -> None:
    """In decode they lie before the keys of one projection's output."""
    pages, rows = stored(RUNS["apart"])
    fused_TPD = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))

    out, _ = attend(RUNS["apart"], fused_TPD[:, :4], pages)

    for b, (k, v) in enumerate(rows):
        expected, _ = softmax_attention(fused_TPD[b : b + 1, :4], k, v)
        torch.testing.assert_close(out[b : b + 1].double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_stored_each_in_its_place(dtype: torch.dtype) -> None:
    """One write for all sequences of a step, of keys and values; no other row changes."""
    kv_TJD = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    pages, expected = empty_pages(2, dtype), empty_pages(2, dtype)
    for row_1JD, (page, row) in zip(kv_TJD.split(1), ((7, 3), (0, 0), (6, 1)), strict=True):
        store_rows(expected[0], [page], row, row_1JD[:, :2])
        store_rows(expected[1], [page], row, row_1JD[:, 2:])

    store_each(pages, torch.tensor([7 * PAGE + 3, 0, 6 * PAGE + 1]), kv_TJD)

    assert torch.equal(pages.isnan(), expected.isnan())
    assert torch.equal(pages.nan_to_num(), expected.nan_to_num())
