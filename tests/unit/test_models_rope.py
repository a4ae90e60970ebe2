"""Angles and rotation are those of transformers, to the bit."""

from typing import Any

import pytest
import torch

from models.rope import RopeConfig, apply_rope_, rope_cos_sin, rope_inv_freq

HEAD_DIM, CONTEXT = 64, 8192
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
CASES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", **YARN, "factor": 0.5},
]


def rotary_of_transformers(rope: dict[str, Any], theta: float) -> Any:
    """Return the oracle, a module that holds `inv_freq` and gives cos and sin."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * HEAD_DIM,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_theta": theta, **rope},
        )
    )


@pytest.mark.parametrize("theta", [10_000, 10_000.0, 500_000.0, 10**18, 1e18])
@pytest.mark.parametrize("rope", CASES, ids=str)
def test_frequencies_equal_those_of_transformers(rope: dict[str, Any], theta: float) -> None:
    oracle = rotary_of_transformers(rope, theta)

    inv_freq, factor = rope_inv_freq(RopeConfig(theta=float(theta), **rope), HEAD_DIM)

    assert torch.equal(inv_freq, oracle.inv_freq)
    assert (inv_freq.dtype, inv_freq.shape) == (torch.float32, (HEAD_DIM // 2,))
    assert factor == oracle.attention_scaling


def test_frequencies_equal_the_public_table_of_transformers() -> None:
    """The functions by name, which other architectures use too."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for rope in CASES[1:]:
        config = rotary_of_transformers(rope, 10_000.0).config
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        inv_freq, factor = rope_inv_freq(RopeConfig(**rope), HEAD_DIM)
        assert torch.equal(inv_freq, expected)
        assert factor == expected_factor


@pytest.mark.parametrize("rope", [CASES[0], CASES[3]], ids=str)
def test_cos_and_sin_equal_those_of_transformers_far_out(rope: dict[str, Any]) -> None:
    """Positions of one rank: not contiguous, and beyond a million."""
    positions = torch.tensor([0, 1, 4095, 65_536, 1_048_575, 2_000_003])
    cos, sin = rotary_of_transformers(rope, 10_000.0)(torch.zeros(()), positions[None])

    mine_cos, mine_sin = rope_cos_sin(positions, *rope_inv_freq(RopeConfig(**rope), HEAD_DIM))

    assert torch.equal(mine_cos, cos[0, :, : HEAD_DIM // 2])
    assert torch.equal(mine_sin, sin[0, :, : HEAD_DIM // 2])


def random_angles(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 1), (7, 4), (3001, 12)])
def test_rotation_in_place_equals_transformers(tokens: int, heads: int) -> None:
    """Also of a view into fused qkv, and of more tokens than fit in one block."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 2, HEAD_DIM, generator=rng)
    before = qkv.clone()
    cos, sin = random_angles(tokens, HEAD_DIM)
    whole_cos, whole_sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    expected, _ = apply_rotary_pos_emb(before[:, :heads], before[:, :heads], whole_cos, whole_sin)

    apply_rope_(qkv[:, :heads], cos, sin)

    assert torch.equal(qkv[:, :heads], expected)
    assert torch.equal(qkv[:, heads:], before[:, heads:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(33, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.float()
    cos, sin = random_angles(33, HEAD_DIM)
    apply_rope_(wide, cos, sin)

    apply_rope_(x, cos, sin)

    assert torch.equal(x, wide.to(dtype))
