"""Rotary position embedding (RoPE): which angle each position turns each pair of dims by.

A head of D dims is D/2 pairs, dim i with dim i + D/2. Pair i at position p turns
by ``p * inv_freq[i]`` radians. Long-context checkpoints bend the frequencies
(linear, llama3, yarn), and yarn scales cos and sin as well. The values are those
that transformers computes, to the bit: at position 10^6 one unit in the last
place of a frequency is a visible angle.

Shapes: T = tokens on this rank, H = heads, D = head dim, D2 = D / 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How a checkpoint spaces its frequencies; fields that its type does not use are ignored."""

    rope_type: RopeType = "default"
    theta: float = 10_000.0  # base of the geometric series of wavelengths
    factor: float = 1.0  # linear, llama3, yarn: the context grows by this
    original_max_position_embeddings: int = 0  # llama3, yarn: tokens, before it grew
    low_freq_factor: float = 1.0  # llama3: waves longer than original / this are divided by factor
    high_freq_factor: float = 4.0  # llama3: waves shorter than original / this stay as they are
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this in the original stay
    beta_slow: float = 1.0  # yarn: pairs that turn less often than this are divided by factor
    attention_factor: float | None = None  # yarn: scale of cos and sin, None derives it
    mscale: float | None = None  # yarn: numerator of the derived scale
    mscale_all_dim: float | None = None  # yarn: denominator of the derived scale
    truncate: bool = True  # yarn: round the ends of the ramp to whole pairs


def rope_inv_freq(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return ``(inv_freq_D2, attention_factor)``: radians per token, and the scale of cos and sin.

    `inv_freq_D2` is float32 on the CPU, whatever the default device: ``pow`` may round
    differently elsewhere, and ranks on different devices must agree.
    """
    # Written as transformers writes it: another order of operations rounds differently.
    exponents_D2 = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    wavelengths_D2 = rope.theta**exponents_D2
    return _SCALINGS[rope.rope_type](rope, wavelengths_D2)


def _default(rope: RopeConfig, wavelengths_D2: Tensor) -> tuple[Tensor, float]:
    return 1.0 / wavelengths_D2, 1.0


def _linear(rope: RopeConfig, wavelengths_D2: Tensor) -> tuple[Tensor, float]:
    return 1.0 / wavelengths_D2 / rope.factor, 1.0


def _llama3(rope: RopeConfig, wavelengths_D2: Tensor) -> tuple[Tensor, float]:
    """Divide long waves by the factor, keep short ones, and blend in between."""
    inv_freq_D2 = 1.0 / wavelengths_D2
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turn_D2 = 2 * math.pi / inv_freq_D2  # tokens of one full turn
    scaled_D2 = torch.where(turn_D2 > original / low, inv_freq_D2 / rope.factor, inv_freq_D2)
    smooth_D2 = (original / turn_D2 - low) / (high - low)
    blend_D2 = (1 - smooth_D2) * scaled_D2 / rope.factor + smooth_D2 * scaled_D2
    between_D2 = (turn_D2 >= original / high) & (turn_D2 <= original / low)
    return torch.where(between_D2, blend_D2, scaled_D2), 1.0


def _yarn(rope: RopeConfig, wavelengths_D2: Tensor) -> tuple[Tensor, float]:
    """Blend along a ramp over the pairs, from unchanged to divided (arXiv 2309.00071)."""
    pairs = wavelengths_D2.numel()
    first, last = _yarn_ramp(rope, head_dim=2 * pairs)
    ramp_D2 = (torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / (last - first)
    unchanged_D2 = 1 - ramp_D2.clamp(0, 1)
    inv_freq_D2 = (1.0 / (rope.factor * wavelengths_D2)) * (1 - unchanged_D2)
    inv_freq_D2 = inv_freq_D2 + (1.0 / wavelengths_D2) * unchanged_D2
    return inv_freq_D2, _yarn_attention_factor(rope)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Return the pairs, as fractions, where the ramp begins and where it ends."""

    def pair_turning(times: float) -> float:
        turns = math.log(rope.original_max_position_embeddings / (times * 2 * math.pi))
        return (head_dim * turns) / (2 * math.log(rope.theta))

    first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


_SCALINGS: dict[RopeType, Callable[[RopeConfig, Tensor], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
ROPE_TYPES: tuple[RopeType, ...] = tuple(_SCALINGS)


def rope_cos_sin(
    positions_T: Tensor, inv_freq_D2: Tensor, attention_factor: float
) -> tuple[Tensor, Tensor]:
    """Return ``(cos_TD2, sin_TD2)`` in float32, on the device of the positions.

    Positions are global token indices, int64. The angle is a float32 product, as
    in transformers: a more exact one would be a different model at long range.
    """
    angles_TD2 = positions_T.to(torch.float32)[:, None] * inv_freq_D2.to(positions_T.device)
    return angles_TD2.cos().mul_(attention_factor), angles_TD2.sin().mul_(attention_factor)


# Elements that one CPU thread rotates at a time: its temporaries then stay in L2.
# At T=8192, H=12, D=64 that takes about half the time of one piece.
_CPU_BLOCK_ELEMENTS = 1 << 17


def apply_rope_(x_THD: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> None:
    """Rotate queries or keys in place; `x_THD` may be a strided view, for example into fused qkv.

    Computes in float32 (cos and sin are float32) and rounds once to the dtype of x.
    """
    tokens, heads, head_dim = x_THD.shape
    block = max(tokens, 1)  # a GPU wants few, large kernels
    if x_THD.device.type == "cpu":
        block = max(1, _CPU_BLOCK_ELEMENTS * torch.get_num_threads() // max(heads * head_dim, 1))
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        x_bHD, cos_b1D2, sin_b1D2 = x_THD[rows], cos_TD2[rows, None], sin_TD2[rows, None]
        if x_THD.dtype.itemsize < 4:
            wide_bHD = x_bHD.float()
            _rotate_(wide_bHD, cos_b1D2, sin_b1D2)
            x_bHD.copy_(wide_bHD)
        else:
            _rotate_(x_bHD, cos_b1D2, sin_b1D2)


def _rotate_(x_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> None:
    half = x_THD.shape[-1] // 2
    first_THD2, second_THD2 = x_THD[..., :half], x_THD[..., half:]
    # Two rounded products and a sum, not addcmul: a fused multiply-add is
    # hardly faster, and its result differs from transformers in the last bit.
    from_first_THD2, from_second_THD2 = first_THD2 * sin_T1D2, second_THD2 * sin_T1D2
    first_THD2.mul_(cos_T1D2).sub_(from_second_THD2)
    second_THD2.mul_(cos_T1D2).add_(from_first_THD2)
