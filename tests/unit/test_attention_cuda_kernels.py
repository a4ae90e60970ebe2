"""How the CUDA kernels are called and read, on CPU, against operators that keep their contracts.

The stand-ins below take the operators' arguments, refuse what the kernels
refuse, and lay out their results as the kernels do. The real operators then
check the same calls on the meta device: names, number and types of arguments.
The kernels themselves run in tests/gpu.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attention.paged
import attention.paged_batch
from attention import cuda_kernels
from attention.cuda_kernels import (
    PageIndex,
    attend_cuda,
    attend_cudnn,
    attend_flash_pages,
    flash_reads_pages,
)
from attention.paged import PagedRows, copy_page, store_each, store_rows
from attention.paged_batch import PagedBatch
from tests.reference import TOLERANCES, causal_mask, random_qkv, softmax_attention

LSE_ROWS = 32  # the efficient kernel pads its LSE to a multiple of these
AtenOp = Callable[..., tuple[Tensor, ...]]


def exact(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None) -> Any:
    mask = causal_mask(len(q_THD)) if causal else None
    out_THD, lse_TH = softmax_attention(q_THD, k_SKD, v_SKD, mask, scale)
    return out_THD.to(q_THD.dtype), lse_TH.float()


def require_flash_input(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in (torch.bfloat16, torch.float16)
        assert tensor.stride(-1) == 1
        assert tensor.shape[-1] % 8 == 0


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Dense: ``[B, T, H, D]`` and LSE ``[B, H, T]``. Paged: one packed batch."""
    require_flash_input(query, key, value)
    if block_table is None:
        assert cum_seq_q is None
        assert cum_seq_k is None
        out, lse = exact(query[0], key[0], value[0], is_causal, scale)
        return out[None], lse.t()[None]
    assert cum_seq_q is not None
    assert cum_seq_k is not None
    assert seqused_k is not None
    assert {cum_seq_q.dtype, cum_seq_k.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    counts, starts = seqused_k.tolist(), cum_seq_q.tolist()
    assert starts == list(range(0, len(query) + 1, max_q))
    assert cum_seq_k.tolist() == [0, *itertools.accumulate(counts)]
    assert max_k == max(counts)
    assert min(counts) > 0  # the LSE over no keys is +inf here
    assert key.shape[1] % 256 == 0
    outs, lses = [], []
    for q, pages, count in zip(query.split(max_q), block_table, counts, strict=True):
        k, v = (x[pages.long()].flatten(0, 1)[:count] for x in (key, value))
        out, lse = exact(q, k, v, is_causal, scale)
        outs.append(out)
        lses.append(lse)
    lse_HT = torch.cat(lses).t()
    # Single queries come back as a batch of them.
    return (torch.stack(outs) if max_q == 1 else torch.cat(outs)), lse_HT


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: None,
    max_seqlen_k: None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """``[B, T, H, D]`` with as many heads of keys as of queries, and a padded LSE."""
    assert query.dtype is torch.float32
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert compute_log_sumexp
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1
        assert not any(stride % 4 for stride in tensor.stride()[1:3])
    rows = -(-query.shape[1] // LSE_ROWS) * LSE_ROWS
    outs, lses = [], []
    for q, k, v in zip(query, key, value, strict=True):
        out, lse = exact(q, k, v, custom_mask_type == 1, scale)
        outs.append(out)
        lses.append(torch.full((q.shape[1], rows), torch.inf))
        lses[-1][:, : len(q)] = lse.t()
    return torch.stack(outs), torch.stack(lses)


def cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """``[B, H, T, D]`` and LSE ``[B, H, T, 1]``."""
    require_flash_input(query, key, value)
    assert compute_log_sumexp
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out, lse = exact(q, k, v, is_causal, scale)
    return out.transpose(0, 1)[None], lse.t()[None, ..., None]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in the operators' places; what is asked of a schema is still asked."""
    operators: dict[str, AtenOp] = {
        "_flash_attention_forward": flash,
        "_efficient_attention_forward": efficient,
        "_scaled_dot_product_cudnn_attention": cudnn,
    }
    for name, operator in operators.items():
        operator.default = getattr(torch.ops.aten, name).default  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.ops.aten, name, operator)


def assert_partial(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    (out, lse), (expected_out, expected_lse) = actual, expected
    assert out.dtype is lse.dtype is torch.float32
    torch.testing.assert_close(out.double(), expected_out, **TOLERANCES[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [*TOLERANCES], ids=str)
def test_results_come_in_the_common_layout(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, causal: bool
) -> None:
    """Groups of heads, padded rows and padded head dims are brought in and out the right way."""
    q, k, v = random_qkv(
        37, 37, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=1
    )
    mask = causal_mask(37) if causal else None

    for scale in (None, 0.3):
        expected = softmax_attention(q, k, v, mask, scale)
        assert_partial(attend_cuda(q, k, v, causal, scale), expected, dtype)
        if dtype is not torch.float32 and head_dim == 32:
            assert_partial(attend_cudnn(q, k, v, causal, scale), expected, dtype)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [*TOLERANCES], ids=str)
def test_inputs_may_be_slices_of_a_fused_tensor(dtype: torch.dtype) -> None:
    """A copy would cost a layer's keys and values, so the kernels get the strides as they are."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(19, 8, 64, generator=rng).to(dtype)[3:].split([4, 2, 2], dim=1)

    assert_partial(attend_cuda(q, k, v, False, None), softmax_attention(q, k, v), dtype)


@pytest.mark.usefixtures("stand_ins")
def test_keys_past_a_32_bit_offset_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The efficient kernel multiplies row and stride in 32 bits, and would read elsewhere."""
    monkeypatch.setattr(cuda_kernels, "_MAX_OFFSET", 1000)
    q, k, v = random_qkv(5, 40)

    assert cuda_kernels._head_major_if_far(k).stride() == (40 * 32, 32, 1)
    assert_partial(attend_cuda(q, k, v, False, None), softmax_attention(q, k, v), torch.float32)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "scattered"])
@pytest.mark.parametrize("capacity", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_are_read_in_each_of_the_three_ways(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capacity: int,
    scattered: bool,
    queries: int,
) -> None:
    """In place where they are neighbours, by the kernel where it can, and else gathered."""
    monkeypatch.setattr(attention.paged, "is_head_major", lambda pages: False)
    monkeypatch.setattr(
        attention.paged, "attend", lambda q, k, v, scale: attend_cuda(q, k, v, False, scale)
    )
    num_rows = 2 * capacity + 3
    q, k, v = random_qkv(queries, num_rows, dtype=dtype)
    page_ids = [5, 1, 2, 4] if scattered else [1, 2, 3, 7]
    pages = torch.full((2, 8, capacity, 2, 32), torch.nan, dtype=dtype)
    for of_what, rows in zip(pages, (k, v), strict=True):
        store_rows(of_what, page_ids, 0, rows[:5])
        store_rows(of_what, page_ids, 5, rows[5:])
    paged = PagedRows(pages[0], pages[1], page_ids, num_rows)

    assert_partial(paged.attend(q), softmax_attention(q, k, v), dtype)
    some = slice(capacity - 1, num_rows - 2)
    actual = paged.attend(q, rows=(some.start, some.stop))
    assert_partial(actual, softmax_attention(q, k[some], v[some]), dtype)
    copied = torch.empty(some.stop - some.start, 4, 32, dtype=dtype)
    paged.copy_into(some.start, copied)
    assert torch.equal(copied, torch.cat([k, v], dim=1)[some])
    copy_page(pages, page_ids[2], 0, 2)
    assert torch.equal(pages[:, 0, :2], pages[:, page_ids[2], :2])
    pages[:, 0] = torch.nan
    assert pages.isfinite().all(-1).all(-1).sum() == 2 * num_rows  # no other row was written


def test_which_pages_the_flash_kernel_reads() -> None:
    """The argument is there or not by torch's version; the rest is what the kernel refuses."""
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    has_block_table = "block_table" in {argument.name for argument in arguments}

    assert flash_reads_pages(torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)) == has_block_table
    assert not flash_reads_pages(torch.empty(1, 256, 2, 64))
    assert not flash_reads_pages(torch.empty(1, 128, 2, 64, dtype=torch.bfloat16))
    assert not flash_reads_pages(torch.empty(1, 256, 2, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [*TOLERANCES], ids=str)
def test_the_operators_of_this_torch_take_these_calls(dtype: torch.dtype) -> None:
    """Their schemas change between versions; the meta device checks a call without a GPU."""
    q, k, v = (x.to("meta") for x in random_qkv(37, 37, dtype=dtype))

    out, lse = attend_cuda(q, k, v, True, None)

    assert out.shape == (37, 4, 32)
    assert lse.shape == (37, 4)
    assert out.dtype is lse.dtype is torch.float32
    if dtype is not torch.float32:
        out, lse = attend_cudnn(q, k, v, True, None)
        assert (out.shape, lse.shape) == ((37, 4, 32), (37, 4))


def test_the_paged_operator_of_this_torch_takes_this_call() -> None:
    """As above, where this torch has it."""
    pages = torch.empty(4, 256, 2, 32, dtype=torch.bfloat16, device="meta")
    if not flash_reads_pages(pages):
        pytest.skip("this torch's flash kernel reads no pages")
    q = torch.empty(3, 4, 32, dtype=torch.bfloat16, device="meta")
    for runs in ([([0, 1, 2], 700)], [([0], 7), ([1, 2], 500), ([3], 256)]):
        index = PageIndex.of(runs, 256, torch.device("meta"))

        out, lse = attend_flash_pages(q, pages, pages, index, None)

        assert out.shape == (3, 4, 32)
        assert lse.shape == (3, 4)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("capacity", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_are_one_call_where_the_kernel_reads_pages(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capacity: int, kv_heads: int
) -> None:
    """Sequences without rows are left out of it; where it cannot be, each is a call."""
    monkeypatch.setattr(attention.paged, "is_head_major", lambda pages: False)
    monkeypatch.setattr(attention.paged_batch, "is_head_major", lambda pages: False)
    monkeypatch.setattr(
        attention.paged, "attend", lambda q, k, v, scale: attend_cuda(q, k, v, False, scale)
    )
    runs = [([3, 1], capacity + 2), ([], 0), ([6], 1), ([2, 5, 0], 3 * capacity)]
    for some in (runs, [run for run in runs if run[1]], runs[1:2] * 2, runs[:1]):
        q, _, _ = random_qkv(len(some), 1, kv_heads=kv_heads, dtype=dtype)
        pages = torch.full((2, 8, capacity, kv_heads, 32), torch.nan, dtype=dtype)
        filled = []
        for number, (page_ids, count) in enumerate(some):
            _, k, v = random_qkv(1, count, kv_heads=kv_heads, dtype=dtype, seed=number)
            slots = [page_ids[row // capacity] * capacity + row % capacity for row in range(count)]
            store_each(pages, torch.tensor(slots).long(), torch.cat([k, v], dim=1))
            filled.append((k, v))

        batch = PagedBatch(some, page_tokens=capacity, device=pages.device)
        actual = batch.attend(q, pages[0], pages[1])

        expected = [
            softmax_attention(q_1HD, k, v) for q_1HD, (k, v) in zip(q.split(1), filled, strict=True)
        ]
        outs, lses = zip(*expected, strict=True)
        assert_partial(actual, (torch.cat(outs), torch.cat(lses)), dtype)


def test_pages_of_another_device_take_the_cuda_way() -> None:
    """What is no CPU tensor goes to the CUDA kernels: here the meta device stands for it."""
    pages = torch.empty(4, 256, 2, 32, dtype=torch.bfloat16, device="meta")
    q = torch.empty(1, 4, 32, dtype=torch.bfloat16, device="meta")

    out, lse = PagedRows(pages, pages, [0, 1, 2], 700).attend(q)

    assert out.shape == (1, 4, 32)
    assert lse.shape == (1, 4)
