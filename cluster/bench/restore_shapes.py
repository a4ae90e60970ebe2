"""Shapes of models whose prefixes are brought back: families at any width, and two full sizes."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from models.config import ModelConfig, read_model_config
from models.decoder import Decoder
from models.weights import random_weights

HEAD_DIM = 64  # of the scaled ones, but at least 8 heads
VOCABULARY = 4096
OPT, LLAMA_2, LLAMA_3 = "opt", "llama-2", "llama-3"
# Layers, hidden size and inner size of those that are not scaled.
FULL_SIZES = {"opt-6.7b": (32, 4096, 16384), "llama-3-8b": (32, 4096, 14336)}
SHAPES = (OPT, LLAMA_2, LLAMA_3, *FULL_SIZES)


def is_scaled(shape: str) -> bool:
    """Whether a shape has the layers and the width that it is given."""
    return shape not in FULL_SIZES


def shape_config(
    shape: str, *, layers: int, hidden_size: int, positions: int, dtype: str
) -> ModelConfig:
    """Return a configuration that a checkpoint of this shape would declare.

    OPT has a MLP of 4 h with ReLU, learned positions and as many KV heads as heads (MHA),
    Llama 2 a gated one of about 8/3 h and MHA, Llama 3 a gated one of 7/2 h and a KV head
    for four heads (GQA).
    """
    head_dim = min(HEAD_DIM, hidden_size // 8)
    inner = {OPT: 4 * hidden_size, LLAMA_2: _inner(hidden_size), LLAMA_3: 7 * hidden_size // 2}
    inner_size = inner.get(shape, 0)
    if shape in FULL_SIZES:
        layers, hidden_size, inner_size = FULL_SIZES[shape]
        head_dim = 128
    heads = hidden_size // head_dim
    fields: dict[str, Any] = {
        "dtype": dtype,
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": positions,
    }
    if shape.startswith("opt"):
        fields |= {
            "architectures": ["OPTForCausalLM"],
            "ffn_dim": inner_size,
            "word_embed_proj_dim": hidden_size,
            "do_layer_norm_before": True,
        }
    else:
        fields |= {
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": inner_size,
            "num_key_value_heads": max(heads // 4, 1) if shape.startswith("llama-3") else heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
        }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_model_config(Path(directory))


def random_decoder(config: ModelConfig, device: torch.device) -> Decoder:
    """Return a model with random weights."""
    return Decoder(config, random_weights(config, device=device, dtype=config.dtype, seed=0))


def _inner(hidden_size: int) -> int:
    """Two thirds of 4 h, in whole 64s, as Llama 2 has it."""
    return -(-(8 * hidden_size // 3) // 64) * 64
