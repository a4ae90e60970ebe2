"""Partials over disjoint keys merge into attention over all of them."""

import itertools

import pytest
import torch
from torch import Tensor

from attention import attend, merge_into, merge_stacked
from tests.reference import random_qkv, softmax_attention

Partial = tuple[Tensor, Tensor]


def merged(first: Partial, *others: Partial) -> Partial:
    """Return what `merge_into` makes of copies of partials, one after the other."""
    out, lse = first[0].clone(), first[1].clone()
    for other in others:
        merge_into(out, lse, *other)
    return out, lse


def slices(num_slices: int, keys: int = 64) -> tuple[list[Partial], Partial]:
    """Return partials over slices of some keys, and float64 attention over all."""
    q, k, v = random_qkv(5, keys, head_dim=32)
    cuts = [keys * i // num_slices for i in range(num_slices + 1)]
    partials = [attend(q, k[a:b], v[a:b]) for a, b in itertools.pairwise(cuts)]
    return partials, softmax_attention(q, k, v)


def neutral(queries: int = 5) -> Partial:
    return torch.zeros(queries, 4, 32), torch.full((queries, 4), -torch.inf)


def assert_equals_reference(actual: Partial, expected: Partial) -> None:
    for tensor, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("split", [0, 1, 7, 16])
def test_merged_slices_equal_attention_over_all_keys(split: int) -> None:
    """The keys may be cut anywhere, even into an empty slice."""
    q, k, v = random_qkv(5, 16)

    both = merged(attend(q, k[:split], v[:split]), attend(q, k[split:], v[split:]))

    assert_equals_reference(both, softmax_attention(q, k, v))


@pytest.mark.parametrize("num_slices", [1, 2, 3, 64])
def test_merge_error_does_not_grow_with_the_ring(num_slices: int) -> None:
    """A ring of 64 ranks merges 63 times; the answer is as exact as that of one rank."""
    partials, expected = slices(num_slices)

    assert_equals_reference(merged(*partials), expected)


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
def test_order_does_not_matter(order: tuple[int, ...]) -> None:
    """Each rank meets the parts in another order, and all must agree."""
    partials, expected = slices(4)

    assert_equals_reference(merged(*(partials[i] for i in order)), expected)


def test_no_keys_on_the_left_changes_nothing() -> None:
    """A rank without tokens of its own starts from an empty partial."""
    (partial,), _ = slices(1)

    for tensor, same in zip(merged(neutral(), partial), partial, strict=True):
        torch.testing.assert_close(tensor, same, rtol=1e-6, atol=0.0)


def test_no_keys_on_the_right_changes_nothing() -> None:
    """A rank whose first chunk is empty sends a part with nothing to see."""
    (partial,), _ = slices(1)

    for tensor, same in zip(merged(partial, neutral()), partial, strict=True):
        torch.testing.assert_close(tensor, same, rtol=1e-6, atol=0.0)


def test_no_keys_on_either_side_stays_empty() -> None:
    """-inf minus -inf is nan; a query that has met no key yet must stay mergeable."""
    out, lse = merged(neutral(), neutral(), neutral())

    assert torch.equal(out, neutral()[0])
    assert torch.equal(lse, neutral()[1])


def test_single_queries_may_have_no_keys() -> None:
    """Keys are missing by query, not by call: in one merge some rows are empty on each side."""
    (left, right), expected = slices(2)
    for rows, side in (([0, 1], left), ([0, 2], right)):
        side[0][rows], side[1][rows] = 0.0, -torch.inf

    out, lse = merged(left, right)

    assert torch.equal(out[0], torch.zeros(4, 32))
    assert torch.equal(lse[0], torch.full((4,), -torch.inf))
    torch.testing.assert_close((out[1], lse[1]), (right[0][1], right[1][1]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close((out[2], lse[2]), (left[0][2], left[1][2]), rtol=1e-6, atol=0.0)
    assert_equals_reference((out[3:], lse[3:]), (expected[0][3:], expected[1][3:]))


@pytest.mark.parametrize("gap", [200.0, 1e4, 1e30])
def test_far_weaker_keys_vanish(gap: float) -> None:
    """Their weight underflows to 0, on whichever side they are, and nothing overflows."""
    (strong,), _ = slices(1)
    weak = (torch.full_like(strong[0], 7.0), strong[1] - gap)

    for result in (merged(strong, weak), merged(weak, strong)):
        for tensor, same in zip(result, strong, strict=True):
            torch.testing.assert_close(tensor, same, rtol=1e-6, atol=0.0)


def test_merge_leaves_the_part_as_it_is() -> None:
    """The part may be a view of a buffer that is sent on."""
    (left, right), _ = slices(2)
    before = (right[0].clone(), right[1].clone())

    merged(left, right)

    assert torch.equal(right[0], before[0])
    assert torch.equal(right[1], before[1])


def test_merge_into_rows_of_a_larger_partial() -> None:
    """A remote part may be seen by the second chunk of queries only; the first is not touched."""
    (left, right), expected = slices(2)
    out, lse = left[0].clone(), left[1].clone()

    merge_into(out[2:], lse[2:], right[0][2:], right[1][2:])

    assert torch.equal(out[:2], left[0][:2])
    assert torch.equal(lse[:2], left[1][:2])
    assert_equals_reference((out[2:], lse[2:]), (expected[0][2:], expected[1][2:]))


@pytest.mark.parametrize("num_slices", [1, 2, 5, 64])
def test_stacked_merge_equals_successive_merges(num_slices: int) -> None:
    """Decode merges what it gathered at once, prefill as it arrives: one definition."""
    partials, expected = slices(num_slices)

    stacked = merge_stacked(*(torch.stack(side) for side in zip(*partials, strict=True)))

    assert_equals_reference(stacked, expected)
    torch.testing.assert_close(stacked, merged(*partials), rtol=1e-5, atol=1e-6)


def test_stacked_merge_ignores_ranks_without_keys() -> None:
    """In decode some ranks hold nothing of a short sequence."""
    partials, expected = slices(3)
    partials = [neutral(), *partials, neutral()]

    stacked = merge_stacked(*(torch.stack(side) for side in zip(*partials, strict=True)))

    assert_equals_reference(stacked, expected)


def test_stacked_merge_of_no_keys_at_all_is_empty() -> None:
    """No nan where no rank holds a key."""
    out, lse = merge_stacked(*(torch.stack([side, side]) for side in neutral()))

    assert torch.equal(out, neutral()[0])
    assert torch.equal(lse, neutral()[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("side", [0, 1, 2, 3])
def test_merge_into_takes_float32_only(side: int, dtype: torch.dtype) -> None:
    """The rounding of N bf16 merges adds up, and would go unnoticed."""
    sides = [*neutral(), *neutral()]
    sides[side] = sides[side].to(dtype)
    name = ["out", "lse", "part", "part_lse"][side]

    with pytest.raises(TypeError, match=rf"^{name} must be float32, got {dtype}"):
        merge_into(*sides)


@pytest.mark.parametrize("side", [0, 1])
def test_merge_stacked_takes_float32_only(side: int) -> None:
    """As `merge_into`."""
    sides = [tensor.unsqueeze(0) for tensor in neutral()]
    sides[side] = sides[side].bfloat16()

    with pytest.raises(TypeError, match=r"must be float32, got torch\.bfloat16"):
        merge_stacked(*sides)
