"""Rows of one byte a value: how far they are off, and that they are not off further each time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.quantised import RowEncoding, as_decoded, encode_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
encodings = st.sampled_from(("int8", "fp8"))


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Rows of any magnitude, with outliers and zeros, in any dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    count, dim = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(count, dim, generator=rng, dtype=torch.float64)
    values *= 10.0 ** draw(st.integers(-45, 38))
    values[:, draw(st.integers(0, dim - 1))] *= draw(st.sampled_from((0.0, 1.0, 1e4)))
    values[draw(st.integers(0, count - 1))] *= draw(st.sampled_from((0.0, 1.0)))
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


@settings(deadline=None)
@given(rows(), encodings)
def test_rows_are_off_by_half_a_step(values: Tensor, encoding: RowEncoding) -> None:
    """A step of int8 is 1/127 of the row's largest; of e4m3 1/8 of the value, at most."""
    back = as_decoded(encoding, values)

    assert back.dtype is values.dtype
    exact, largest = values.double(), values.double().abs().amax(-1, keepdim=True)
    # What the dtype itself cannot tell apart.
    info = torch.finfo(values.dtype)
    rounding = exact.abs() * info.eps + info.smallest_normal * info.eps
    step = largest / 127 if encoding == "int8" else (exact.abs() / 8).maximum(largest / 448 / 512)
    assert ((back.double() - exact).abs() <= step * 0.5001 + rounding).all()


@settings(deadline=None)
@given(rows(), encodings)
def test_nothing_more_is_lost_the_second_time(values: Tensor, encoding: RowEncoding) -> None:
    """Rows go from pages to a store and back any number of times, and stay what they were."""
    once = as_decoded(encoding, values)

    assert torch.equal(as_decoded(encoding, once), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_largest_value_of_a_row_is_exact(encoding: RowEncoding, dtype: torch.dtype) -> None:
    """Outliers of keys carry the most weight."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    where = values.abs().argmax(-1, keepdim=True)

    back = as_decoded(encoding, values)

    assert torch.equal(back.gather(-1, where), values.gather(-1, where))


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_codes_take_a_byte(encoding: RowEncoding) -> None:
    """Beside one number a row; a row may be empty of rows."""
    codes, largest = encode_rows(encoding, torch.zeros(3, 2, 16, dtype=torch.bfloat16))

    assert codes.shape == (3, 2, 16)
    assert codes.dtype is torch.uint8
    assert largest.shape == (3, 2, 1)
    assert largest.dtype is torch.bfloat16
    assert encode_rows(encoding, torch.zeros(0, 2, 16))[0].shape == (0, 2, 16)
