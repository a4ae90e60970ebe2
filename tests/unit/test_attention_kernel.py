"""`attend` equals softmax attention by definition, for every dtype, grouping and layout in use."""

import math

import pytest
import torch
from torch import Tensor

from attention import attend
from tests.reference import TOLERANCES, causal_mask, random_qkv, softmax_attention


def assert_attends(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> None:
    """Assert that `attend` returns what the definition says, in float32."""
    out_THD, lse_TH = attend(q_THD, k_SKD, v_SKD, causal=causal, scale=scale)
    mask = causal_mask(len(q_THD)) if causal else None
    expected_out, expected_lse = softmax_attention(q_THD, k_SKD, v_SKD, mask, scale)
    assert out_THD.dtype is torch.float32
    assert lse_TH.dtype is torch.float32
    torch.testing.assert_close(out_THD.double(), expected_out, **TOLERANCES[q_THD.dtype])
    # Scores are summed up in float32 whatever the input is.
    torch.testing.assert_close(lse_TH.double(), expected_lse, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [*TOLERANCES], ids=str)
def test_attention_equals_its_definition(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """Head dims of real models, one of them (80) no multiple of a vector's width."""
    q, k, v = random_qkv(17, 17, head_dim=head_dim, dtype=dtype)

    assert_attends(q, k, v, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (7, 1)])
def test_query_heads_are_grouped_in_order(heads: int, kv_heads: int, causal: bool) -> None:
    """Head h reads KV head h // (H / K); h % K would be as plausible, and wrong."""
    q, k, v = random_qkv(9, 9, heads=heads, kv_heads=kv_heads)

    assert_attends(q, k, v, causal=causal)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (5, 1), (3, 1030), (70, 33)])
def test_queries_and_keys_may_differ_in_number(queries: int, keys: int) -> None:
    """A decode step has one query; a remote part has any number of keys, past a kernel's block."""
    q, k, v = random_qkv(queries, keys)

    assert_attends(q, k, v)


@pytest.mark.parametrize("length", [1, 2, 31, 33, 530])
def test_causal_mask_is_right_at_every_length(length: int) -> None:
    """Lengths around the kernel's block sizes: a wrong mask there shows in a few rows only."""
    q, k, v = random_qkv(length, length, heads=2, kv_heads=1)

    assert_attends(q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [*TOLERANCES], ids=str)
def test_inputs_may_be_slices_of_a_fused_tensor(dtype: torch.dtype, causal: bool) -> None:
    """The projection makes q, k and v in one tensor; copying them apart would cost a layer's KV."""
    rng = torch.Generator().manual_seed(0)
    fused_TPD = torch.randn(19, 8, 64, generator=rng).to(dtype)
    q_THD, k_TKD, v_TKD = fused_TPD.split([4, 2, 2], dim=1)

    assert_attends(q_THD, k_TKD, v_TKD, causal=causal)
    assert_attends(q_THD[7:], k_TKD[7:], v_TKD[7:], causal=causal)


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0])
def test_scale_replaces_the_default(scale: float) -> None:
    """Some models scale by another number than D ** -0.5."""
    q, k, v = random_qkv(6, 6)

    assert_attends(q, k, v, scale=scale)
    assert_attends(q, k, v, causal=True, scale=scale)


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0), (0, 0)])
def test_empty_side_is_neutral(queries: int, keys: int) -> None:
    """A short prompt leaves chunks empty; the CPU kernel would end the process."""
    q, k, v = random_qkv(queries, keys, dtype=torch.bfloat16)

    out, lse = attend(q, k, v)

    assert torch.equal(out, torch.zeros(queries, 4, 32))
    assert torch.equal(lse, torch.full((queries, 4), -torch.inf))


def test_empty_causal_call_is_neutral() -> None:
    """A rank without tokens takes part in every layer."""
    out, lse = attend(*random_qkv(0, 0), causal=True)

    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize(("queries", "keys"), [(3, 4), (4, 3), (0, 4), (4, 0)])
def test_causal_call_needs_as_many_keys_as_queries(queries: int, keys: int) -> None:
    """Kernels disagree on where such a mask begins, so one of them would answer wrongly."""
    with pytest.raises(ValueError, match=f"causal attention of {queries} queries to {keys} keys"):
        attend(*random_qkv(queries, keys), causal=True)


def test_lse_is_a_natural_logarithm() -> None:
    """Some kernels give base 2; merged with the others' the weights would be wrong."""
    q_THD = torch.ones(1, 1, 32)
    k_SKD = torch.full((2, 1, 32), 0.25)

    _, lse = attend(q_THD, k_SKD, k_SKD, scale=0.5)

    assert lse.item() == pytest.approx(32 * 0.25 * 0.5 + math.log(2), rel=1e-6)


def test_large_scores_do_not_overflow() -> None:
    """exp(300) is not a float32; a kernel must subtract the largest score first."""
    q, k, v = random_qkv(5, 12)

    out, lse = attend(q * 60, k, v)

    expected_out, expected_lse = softmax_attention(q * 60, k, v)
    assert expected_lse.max() > 100
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
