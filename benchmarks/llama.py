"""Prefill and decode of a Llama shape with random weights, on one device."""

import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import RowWriter, median_s
from benchmarks.one_rank import OneRank, new_pool
from benchmarks.rows import Row
from benchmarks.shapes import GB, Shape
from benchmarks.sizes import Sizes
from models.config import ModelConfig, read_model_config
from models.decoder import Decoder
from models.weights import random_weights

DTYPE = torch.bfloat16


def measure_prefill(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Time to the first token of random prompts, with where it goes."""
    decoder = random_decoder(sizes.shape, device)
    for num_tokens in sizes.prefill_tokens:
        rows.measure({"tokens": num_tokens}, partial(_prefill, decoder, num_tokens, sizes))


def _prefill(decoder: Decoder, num_tokens: int, sizes: Sizes) -> Row:
    model = OneRank(decoder, new_pool(decoder, num_tokens))
    device = decoder.device
    ids_T = torch.randint(0, decoder.config.vocab_size, (num_tokens,), device=device)
    seconds = median_s(lambda: model.prefill(ids_T), device, sizes.repeats)
    parts_ms = {f"{part}_ms": value * 1e3 for part, value in sorted(model.parts_s.items())}
    flops = sizes.shape.prefill_flops(num_tokens)
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": num_tokens / seconds,
        "tflop_per_s": flops / seconds / 1e12,
        **parts_ms,
    }


def measure_decode(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Time of a token after a context of random keys and values, at batch 1."""
    decoder = random_decoder(sizes.shape, device)
    for context in sizes.decode_contexts:
        rows.measure({"context": context}, partial(_decode, decoder, context, sizes))


def _decode(decoder: Decoder, context: int, sizes: Sizes) -> Row:
    model = OneRank(decoder, new_pool(decoder, context + sizes.decode_steps + 1))
    model.fill(context)
    token_id = 1

    def step() -> None:
        nonlocal token_id
        token_id = model.decode(token_id)

    seconds = median_s(step, decoder.device, sizes.decode_steps)
    read_bytes = sizes.shape.decode_bytes(context, DTYPE.itemsize)
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": 1 / seconds,
        "read_gb": read_bytes / GB,
        "gb_per_s": read_bytes / seconds / GB,
    }


def random_decoder(shape: Shape, device: torch.device) -> Decoder:
    """Return a Llama of this shape with random weights."""
    config = model_config(shape)
    return Decoder(config, random_weights(config, device=device, dtype=DTYPE, seed=0))


def model_config(shape: Shape) -> ModelConfig:
    """Return the configuration that a checkpoint of this shape would declare."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(DTYPE).removeprefix("torch."),
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_model_config(Path(directory))
