"""Tiny checkpoints, written by transformers itself."""

import json
from pathlib import Path

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


def write_llama_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
    **overrides: object,
) -> Path:
    """Write a random Llama and return its directory; `overrides` are fields of `LlamaConfig`.

    Norms and biases are random as well: where they are 1 and 0, a reader may
    swap or drop them unnoticed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | overrides)))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.3)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object on disk; the value ``...`` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
