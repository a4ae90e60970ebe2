"""Rows stored in pages are read back as one set of keys, wherever the pages lie (CPU layout)."""

import pytest
import torch
from torch import Tensor

import attention.paged
from attention.paged import PagedRows, copy_page, pages_shape, store_rows
from tests.reference import TOLERANCES, random_qkv, softmax_attention

PAGE = 4  # tokens
CPU = torch.device("cpu")


def empty_pages(
    num_pages: int = 8, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return pages of keys and of values full of nan: memory that no row was written to."""
    shape = pages_shape(
        CPU, num_pages=num_pages, page_tokens=PAGE, num_kv_heads=kv_heads, head_dim=32
    )
    nan = torch.full((2, *shape), torch.nan, dtype=dtype)
    return nan[0], nan[1]


def assert_run_equals_reference(
    page_ids: list[int],
    num_rows: int,
    *,
    queries: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
) -> None:
    """Store rows in these pages and compare attention to them with the definition."""
    q, k, v = random_qkv(queries, num_rows, heads=heads, kv_heads=kv_heads, dtype=dtype)
    k_pages, v_pages = empty_pages(kv_heads=kv_heads, dtype=dtype)
    store_rows(k_pages, page_ids, 0, k)
    store_rows(v_pages, page_ids, 0, v)

    out, lse = PagedRows(k_pages, v_pages, page_ids, num_rows).attend(q, scale=scale)

    expected_out, expected_lse = softmax_attention(q, k, v, scale=scale)
    assert out.dtype is lse.dtype is torch.float32
    torch.testing.assert_close(out.double(), expected_out, **TOLERANCES[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("page_ids", "num_rows"),
    [
        ([0], 1),
        ([5], 3),
        ([5], 4),
        ([0, 1, 2, 3], 16),
        ([0, 1, 2, 3], 13),
        ([6, 7, 0, 1], 16),
        ([3, 2, 1, 0], 16),
        ([1, 3, 5, 7], 14),
        ([2, 3, 6, 4, 5, 0], 21),
        ([2, 3, 4], 9),
    ],
    ids=str,
)
def test_pages_are_one_set_of_keys(
    page_ids: list[int], num_rows: int, queries: int, dtype: torch.dtype
) -> None:
    """Pages come in any order, apart or side by side; the last may be partly filled."""
    assert_run_equals_reference(page_ids, num_rows, queries=queries, dtype=dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1), (6, 3)])
def test_query_heads_keep_their_group(heads: int, kv_heads: int) -> None:
    """The group becomes rows of one matrix on the way in, and heads again on the way out."""
    assert_run_equals_reference([4, 1, 2], 10, queries=3, heads=heads, kv_heads=kv_heads)


def test_scale_is_passed_on() -> None:
    """As in `attend`."""
    assert_run_equals_reference([4, 1, 2], 10, queries=2, scale=0.7)


def test_queries_may_be_a_slice_of_a_fused_tensor() -> None:
    """In decode as in prefill they lie between the keys of one projection's output."""
    _, k, v = random_qkv(1, 6)
    fused_TPD = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    k_pages, v_pages = empty_pages()
    store_rows(k_pages, [2, 0], 0, k)
    store_rows(v_pages, [2, 0], 0, v)

    out, _ = PagedRows(k_pages, v_pages, [2, 0], 6).attend(fused_TPD[:, 2:6])

    expected, _ = softmax_attention(fused_TPD[:, 2:6], k, v)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(("queries", "num_rows"), [(2, 0), (0, 3), (0, 0)])
def test_nothing_to_attend_is_neutral(queries: int, num_rows: int) -> None:
    """In decode a rank may hold no row of a sequence, and no page either."""
    q, _, _ = random_qkv(queries, 1)

    out, lse = PagedRows(*empty_pages(), [1], num_rows).attend(q)

    assert torch.equal(out, torch.zeros(queries, 4, 32))
    assert torch.equal(lse, torch.full((queries, 4), -torch.inf))


@pytest.mark.parametrize("steps", [[1] * 14, [3, 1, 1, 4, 5], [6, 8], [4, 4, 4, 2]], ids=str)
def test_rows_may_be_stored_bit_by_bit(steps: list[int]) -> None:
    """A prefill stores many rows, each decode step one: attention is right after every step."""
    page_ids, done = [6, 2, 3, 0], 0
    q, k, v = random_qkv(2, sum(steps))
    k_pages, v_pages = empty_pages()
    for count in steps:
        store_rows(k_pages, page_ids, done, k[done : done + count])
        store_rows(v_pages, page_ids, done, v[done : done + count])
        done += count

        out, _ = PagedRows(k_pages, v_pages, page_ids, done).attend(q)

        expected, _ = softmax_attention(q, k[:done], v[:done])
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


def test_store_writes_no_other_row() -> None:
    """A neighbour's page, and rows of the own page before and after, stay as they were."""
    _, k, _ = random_qkv(1, 3)
    pages, _ = empty_pages()

    store_rows(pages, [5, 1], 2, k)

    written = pages.isfinite().all(-1).all(0).nonzero().tolist()
    assert written == [[1, 0], [5, 2], [5, 3]]
    assert torch.equal(pages[:, 5, 2:].transpose(0, 1), k[:2])
    assert torch.equal(pages[:, 1, :1].transpose(0, 1), k[2:])


def test_storing_no_rows_changes_nothing() -> None:
    """A rank that got no token of a short prompt has no page to write to."""
    pages, _ = empty_pages()

    store_rows(pages, [], 0, torch.empty(0, 2, 32))

    assert pages.isnan().all()


def test_rows_may_be_a_slice_of_keys_and_values() -> None:
    """Keys' heads and values' heads come as one tensor and are stored apart, without a copy."""
    kv_TJD = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(0))
    pages, _ = empty_pages()

    store_rows(pages, [0, 1], 0, kv_TJD.chunk(2, dim=1)[1])

    assert torch.equal(pages[:, :2].flatten(1, 2).transpose(0, 1)[:5], kv_TJD[:, 2:])


def test_page_layout_of_each_device() -> None:
    """On CPU a head's keys of all pages are one matrix; paged flash kernels want tokens first."""
    size = {"num_pages": 9, "page_tokens": 256, "num_kv_heads": 8, "head_dim": 64}

    assert pages_shape(CPU, **size) == (8, 9, 256, 64)
    assert pages_shape(torch.device("cuda"), **size) == (9, 256, 8, 64)


def filled_rows(page_ids: list[int], k_SKD: Tensor, v_SKD: Tensor) -> PagedRows:
    """Return rows stored in these pages."""
    k_pages, v_pages = empty_pages(dtype=k_SKD.dtype)
    store_rows(k_pages, page_ids, 0, k_SKD)
    store_rows(v_pages, page_ids, 0, v_SKD)
    return PagedRows(k_pages, v_pages, page_ids, len(k_SKD))


@pytest.fixture(params=["few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read rows as few queries do and as many do, with bounds of these tests' small numbers."""
    many = request.param == "many"
    monkeypatch.setattr(attention.paged, "_MANY_QUERY_ROWS", 0 if many else 10**9)
    monkeypatch.setattr(attention.paged, "_BLOCK_ROWS", 6)
    monkeypatch.setattr(attention.paged, "_BATCH_QUERY_ROWS", 12)  # 2 pages of 3 queries


PLACES = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 2, 3, 6, 7, 0]]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(0, 21), (0, 6), (3, 4), (5, 19), (4, 8), (7, 7)], ids=str)
@pytest.mark.parametrize("page_ids", PLACES, ids=str)
def test_some_rows_of_a_run(page_ids: list[int], rows: tuple[int, int], dtype: torch.dtype) -> None:
    """A piece of the cached rows may begin and end anywhere, also within one page."""
    q, k, v = random_qkv(3, 21, dtype=dtype)

    out, lse = filled_rows(page_ids, k, v).attend(q, rows=rows)

    expected_out, expected_lse = softmax_attention(q, k[slice(*rows)], v[slice(*rows)])
    torch.testing.assert_close(out.double(), expected_out, **TOLERANCES[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=2e-4)


@pytest.mark.usefixtures("way")
def test_bits_do_not_depend_on_where_pages_lie() -> None:
    """They change with what else is in the pool, and answers must repeat all the same."""
    q, k, v = random_qkv(3, 21)

    results = [filled_rows(page_ids, k, v).attend(q) for page_ids in PLACES]

    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_many_queries_read_pages_of_real_size() -> None:
    """With the bounds as they are: 96 queries of groups of 2 are as many as take blocks."""
    q, k, v = random_qkv(96, 5000)
    expected = softmax_attention(q, k, v)
    for page_ids in (list(range(20)), [*range(10, 20), *range(10)]):
        shape = pages_shape(CPU, num_pages=20, page_tokens=256, num_kv_heads=2, head_dim=32)
        pages = torch.full((2, *shape), torch.nan)
        for of_what, rows in zip(pages, (k, v), strict=True):
            store_rows(of_what, page_ids, 0, rows)

        for count in (95, 96):
            out, lse = PagedRows(pages[0], pages[1], page_ids, 5000).attend(q[:count])

            torch.testing.assert_close(
                out.double(), expected[0][:count], **TOLERANCES[torch.float32]
            )
            torch.testing.assert_close(lse.double(), expected[1][:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_ids", PLACES, ids=str)
def test_rows_are_copied_out_as_they_travel(page_ids: list[int]) -> None:
    """Keys' heads, then values' heads, from any row on; no row of another page."""
    _, k, v = random_qkv(1, 21)
    rows = filled_rows(page_ids, k, v)
    for first, count in ((0, 21), (3, 1), (5, 14), (2, 0)):
        out_SJD = torch.full((count, 4, 32), torch.nan)

        rows.copy_into(first, out_SJD)

        assert torch.equal(out_SJD, torch.cat([k, v], dim=1)[first : first + count])


@pytest.mark.parametrize("leading", [(), (3, 2)], ids=["one layer", "all layers"])
def test_page_is_copied_to_another(leading: tuple[int, ...]) -> None:
    """A fork of a sequence shares full pages and copies the last one, for all layers at once."""
    shape = pages_shape(CPU, num_pages=5, page_tokens=PAGE, num_kv_heads=2, head_dim=32)
    before = torch.randn(*leading, *shape, generator=torch.Generator().manual_seed(0))
    pages = before.clone()

    copy_page(pages, 3, 1, 3)

    assert torch.equal(pages[..., 1, :3, :], before[..., 3, :3, :])
    pages[..., 1, :3, :] = before[..., 1, :3, :]
    assert torch.equal(pages, before)
