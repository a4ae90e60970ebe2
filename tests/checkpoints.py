"""Tiny checkpoints, written by transformers itself."""

import json
from pathlib import Path
from typing import Any

import torch

TINY_LLAMA: dict[str, object] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.3,  # wide enough that the logits of two tokens differ
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# By the name that transformers gives a family (model_type): fields of its config class.
TINY: dict[str, dict[str, object]] = {
    "llama": TINY_LLAMA,
    "mistral": TINY_LLAMA | {"sliding_window": None},
    "qwen2": TINY_LLAMA,
    "qwen3": TINY_LLAMA | {"head_dim": 24},
    "opt": {
        "vocab_size": 500,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "init_std": 0.2,
    },
    "gpt2": {
        "vocab_size": 500,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 2048,
        "initializer_range": 0.2,
    },
    "gpt_neox": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,
    },
}


def write_llama_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random Llama and return its directory; see `write_checkpoint`."""
    return write_checkpoint(directory, "llama", **options)


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
    **overrides: object,
) -> Path:
    """Write a random model of `TINY` and return its directory; `overrides` are config fields.

    Norms and biases are random as well: where they are 1 and 0, a reader may
    swap or drop them unnoticed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(TINY[family] | overrides))
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.3)
            elif parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def as_transformers_4_wrote_it(directory: Path) -> None:
    """Rewrite config.json: RoPE and dtype under the names they had, no list of layer types."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    if rope := values.get("rope_parameters"):
        scaling = rope if rope["rope_type"] != "default" else None
        neox = values["model_type"] == "gpt_neox"
        theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
        edit_json(path, rope_scaling=scaling, rotary_pct=fraction)
        edit_json(path, **{"rotary_emb_base" if neox else "rope_theta": theta})
    edit_json(path, torch_dtype=values["dtype"])
    edit_json(path, rope_parameters=..., dtype=..., layer_types=...)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object on disk; the value ``...`` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
