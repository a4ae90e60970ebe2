"""Encodings of KV: raw ones are bit-exact, lossy ones stay within their step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kv_codec import ALIGNMENT, ENCODINGS, GROUP, Encoding, decode, encode, layer_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
encodings = st.sampled_from(ENCODINGS)


def size_of(encoding: Encoding, kv_2KSD: Tensor) -> int:
    _, K, S, D = kv_2KSD.shape
    return layer_bytes(encoding, num_tokens=S, num_kv_heads=K, head_dim=D, dtype=kv_2KSD.dtype)


def encoded(encoding: Encoding, kv_2KSD: Tensor, fill: int = 0) -> Tensor:
    data = torch.full((size_of(encoding, kv_2KSD),), fill, dtype=torch.uint8)
    encode(encoding, kv_2KSD, data)
    return data


def roundtrip(encoding: Encoding, kv_2KSD: Tensor) -> Tensor:
    out = torch.full_like(kv_2KSD, 7.0)
    decode(encoding, encoded(encoding, kv_2KSD), out)
    return out


@st.composite
def layers(draw: st.DrawFn) -> Tensor:
    """Layers of odd and small shapes, of any magnitude, with outlier channels and constants."""
    dtype = draw(st.sampled_from(DTYPES))
    K, S, D = (draw(st.integers(1, most)) for most in (3, 70, 40))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kv_2KSD = torch.randn(2, K, S, D, generator=rng, dtype=torch.float64)
    kv_2KSD *= 10.0 ** draw(st.integers(-45, 38))
    kv_2KSD[..., draw(st.integers(0, D - 1))] *= draw(st.sampled_from((0.0, 1.0, 1e3)))
    kv_2KSD[:, :, draw(st.integers(0, S - 1))] = draw(st.sampled_from((0.0, 3.0, -1e38)))
    most = torch.finfo(dtype).max
    return kv_2KSD.clamp(-most, most).to(dtype)


def int4_steps(x_KSD: Tensor, dim: int) -> Tensor:
    """Return the step of each value's group, worked out group by group."""
    steps = torch.empty_like(x_KSD)
    for start in range(0, x_KSD.shape[dim], GROUP):
        count = min(GROUP, x_KSD.shape[dim] - start)
        group = x_KSD.narrow(dim, start, count)
        width = group.amax(dim, keepdim=True) - group.amin(dim, keepdim=True)
        steps.narrow(dim, start, count).copy_((width / 15).expand_as(group))
    return steps


def steps_of(encoding: Encoding, kv_2KSD: Tensor) -> Tensor:
    """Return how far neighbouring codes of each value lie apart, at most; in float64."""
    exact = kv_2KSD.double()
    largest = exact.abs().amax(-1, keepdim=True)
    if encoding == "int4":
        return torch.stack([int4_steps(exact[0], 1), int4_steps(exact[1], 2)])
    if encoding == "int8":
        return (largest / 127).expand_as(exact)
    if encoding == "fp8":
        return (exact.abs() / 8).maximum(largest / 448 / 512)
    return torch.zeros_like(exact)


@settings(deadline=None)
@given(layers(), encodings)
def test_values_are_off_by_half_a_step(kv_2KSD: Tensor, encoding: Encoding) -> None:
    """Outliers cost their own group only, and nothing finite becomes anything else."""
    back = roundtrip(encoding, kv_2KSD)

    info = torch.finfo(kv_2KSD.dtype)
    exact = kv_2KSD.double()
    # What the dtype cannot tell apart; limits of int4 are halved, which costs the smallest bit.
    smallest = info.smallest_normal * info.eps
    # In int4 a small value comes of larger limits, whose rounding is float32's.
    # What comes back is rounded to the dtype, which for a small value may be a larger one.
    told = exact.abs().maximum(back.double().abs())
    rounding = told * info.eps + 2 * smallest + exact.abs().max() * 2**-23
    error = (back.double() - exact).abs()
    assert (error <= steps_of(encoding, kv_2KSD) * 0.5001 + rounding).all()


@settings(deadline=None)
@given(layers(), encodings)
def test_nothing_more_is_lost_the_second_time(kv_2KSD: Tensor, encoding: Encoding) -> None:
    """A piece that went through a tier may go through it again."""
    once = roundtrip(encoding, kv_2KSD)
    again = roundtrip(encoding, once)

    if encoding == "int4":  # there a value may lie right between two codes
        steps = steps_of(encoding, once) * 1e-3 + once.double().abs().max() * 2**-22
        assert ((again.double() - once.double()).abs() <= steps).all()
    else:
        assert torch.equal(again, once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 256, 64)])
def test_raw_is_bit_exact(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Infinities, not-a-numbers and negative zeros too."""
    K, S, D = shape
    bits = torch.randint(
        0, 256, (2 * K * S * D * dtype.itemsize,), generator=torch.Generator().manual_seed(0)
    )
    kv_2KSD = bits.to(torch.uint8).view(dtype).view(2, K, S, D)

    back = roundtrip("raw", kv_2KSD)

    assert torch.equal(back.view(torch.uint8), kv_2KSD.view(torch.uint8))


def test_raw_is_the_values_in_their_order() -> None:
    """A reader may use a layer where it lies: heads are contiguous."""
    kv_2KSD = torch.randn(2, 3, 16, 8)

    data = encoded("raw", kv_2KSD)

    assert torch.equal(data.view(torch.float32), kv_2KSD.flatten())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs_may_be_strided(encoding: Encoding, dtype: torch.dtype) -> None:
    """Pages and steps hold tokens in other orders; nothing is copied first."""
    kv_S2KD = torch.randn(40, 2, 3, 24).to(dtype)
    out_S2KD = torch.empty_like(kv_S2KD)

    decode(encoding, encoded(encoding, kv_S2KD.permute(1, 2, 0, 3)), out_S2KD.permute(1, 2, 0, 3))

    expected = roundtrip(encoding, kv_S2KD.permute(1, 2, 0, 3).contiguous())
    assert torch.equal(out_S2KD.permute(1, 2, 0, 3), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_do_not_depend_on_what_lay_there(encoding: Encoding) -> None:
    """What another tenant had in the arena must not travel along."""
    kv_2KSD = torch.randn(2, 1, 5, 3)

    assert torch.equal(encoded(encoding, kv_2KSD, 0), encoded(encoding, kv_2KSD, 255))


@given(encodings, st.integers(1, 300), st.integers(1, 8), st.integers(1, 130))
def test_layers_are_aligned(encoding: Encoding, S: int, K: int, D: int) -> None:
    """The next layer of a record begins at a multiple of 64, where raw values can be read."""
    for dtype in DTYPES:
        size = layer_bytes(encoding, num_tokens=S, num_kv_heads=K, head_dim=D, dtype=dtype)
        assert size % ALIGNMENT == 0


def test_sizes_of_a_usual_block() -> None:
    """A block of 256 tokens of 8 heads of 128 dims: what a tier saves by each encoding."""
    sizes = {
        encoding: layer_bytes(
            encoding, num_tokens=256, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16
        )
        for encoding in ENCODINGS
    }

    values = 2 * 8 * 256 * 128
    assert sizes == {
        "raw": 2 * values,
        "int8": values + 2 * values // 128,
        "fp8": values + 2 * values // 128,
        "int4": values // 2 + values // 32 * 2 * 2,
    }


def test_keys_outlier_channel_costs_other_channels_nothing() -> None:
    """Why int4 groups keys per channel: by rows, one channel would decide every step."""
    keys = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    keys[..., 3] *= 1000
    back = roundtrip("int4", torch.stack([keys, keys]))

    others = [channel for channel in range(32) if channel != 3]
    assert (back[0] - keys)[..., others].abs().max() < 0.3
    assert (back[1] - keys)[..., others].abs().max() > 0.3  # values are grouped by rows
