"""What a Hugging Face checkpoint's config.json says about a decoder, read with its types.

A family is one entry of declared facts in `FAMILIES`. What no entry declares is
refused in one sentence: a checkpoint that is half understood would be served
with wrong answers, which nobody notices.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from models.errors import CheckpointError
from models.rope import ROPE_TYPES, RopeConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where architectures differ; a bias is a constant, or the key of config.json that says so."""

    name: str
    qkv_bias: bool | str
    out_bias: bool | str
    mlp_bias: bool | str


FAMILIES = {
    "LlamaForCausalLM": Family(
        name="llama", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"
    ),
}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder, as its checkpoint declares it."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int  # of queries
    num_kv_heads: int  # divides num_heads
    head_dim: int  # even; num_heads * head_dim need not be hidden_size
    vocab_size: int
    max_position_embeddings: int  # tokens
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool  # the output projection is the embedding
    attention_bias: bool  # of the q, k and v projections
    attention_out_bias: bool
    mlp_bias: bool
    dtype: torch.dtype  # of the weights, as the checkpoint declares it
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of these ends an answer; empty: none does


def read_model_config(directory: Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or its kind is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise no_checkpoint(directory)
    fields = _Fields(path, read_json(path))
    family = _family(fields)
    _refuse_unsupported(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    max_position_embeddings = fields.integer("max_position_embeddings")
    bos_token_id, eos_token_ids = _special_tokens(directory, fields)
    return ModelConfig(
        family=family.name,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads, num_kv_heads),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=max_position_embeddings,
        norm_eps=fields.number("rms_norm_eps"),
        rope=_rope(fields, max_position_embeddings),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=_bias(fields, family.qkv_bias),
        attention_out_bias=_bias(fields, family.out_bias),
        mlp_bias=_bias(fields, family.mlp_bias),
        dtype=_dtype(fields),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
    )


def no_checkpoint(directory: Path) -> CheckpointError:
    """Return the error for a directory that is not there or holds no checkpoint."""
    return CheckpointError(
        f"No checkpoint at {directory}: expected a directory with config.json and *.safetensors"
    )


def read_json(path: Path) -> dict[str, object]:
    """Read a file that must hold one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


class _Fields:
    """The keys of one JSON object; null counts as missing, as it does for transformers."""

    def __init__(self, path: Path, values: dict[str, object]) -> None:
        self.path = path
        self.values = {key: value for key, value in values.items() if value is not None}

    def refuse(self, found: str, supported: str) -> NoReturn:
        """Raise the one sentence about what this file says and what could be served."""
        raise CheckpointError(f"{self.path} has {found}, supported: {supported}")

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"{key} = {value!r}", "a whole number of at least 1")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e308:
            self.refuse(f"{key} = {value!r}", "a finite number above 0")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if key in self.values else None

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{key} = {value!r}", "true or false")
        return value

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks {key}, which this kind of model needs")
        return value


def _family(fields: _Fields) -> Family:
    architectures = fields.values.get("architectures")
    supported = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or not architectures:
        fields.refuse(f"architectures = {architectures!r}", supported)
    family = FAMILIES.get(str(architectures[0]))
    if family is None:
        fields.refuse(f"architecture {architectures[0]!s}", supported)
    return family


def _refuse_unsupported(fields: _Fields) -> None:
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        fields.refuse(
            f"a quantization_config ({method or 'of no named method'})",
            "unquantized weights in " + ", ".join(_DTYPES),
        )
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        fields.refuse(f"hidden_act = {activation!r}", "'silu'")


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int, num_kv_heads: int) -> int:
    if num_heads % num_kv_heads:
        fields.refuse(
            f"num_attention_heads = {num_heads} and num_key_value_heads = {num_kv_heads}",
            "a number of query heads that the number of kv heads divides",
        )
    if "head_dim" not in fields.values and hidden_size % num_heads:
        fields.refuse(
            f"hidden_size = {hidden_size}, num_attention_heads = {num_heads} and no head_dim",
            "a hidden size that the number of heads divides, or an explicit head_dim",
        )
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        fields.refuse(f"head_dim = {head_dim}", "an even one, since RoPE rotates pairs of dims")
    return head_dim


def _bias(fields: _Fields, fact: bool | str) -> bool:
    return fact if isinstance(fact, bool) else fields.flag(fact)


def _dtype(fields: _Fields) -> torch.dtype:
    """Read what transformers 5 calls dtype and transformers 4 calls torch_dtype."""
    name = str(fields.values.get("dtype", fields.values.get("torch_dtype", "float32")))
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        fields.refuse(f"dtype = {name!r}", ", ".join(_DTYPES))
    return dtype


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    """Read what transformers 5 calls rope_parameters; 4 has rope_scaling, and rope_theta beside it.

    Keys that the type does not use are ignored, as transformers ignores them.
    """
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key, {})
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        fields.refuse(f"{key} = {values!r}", "one object of plain values for all layers")
    rope = _Fields(fields.path, values)
    found = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope_type = next((known for known in ROPE_TYPES if known == found), None)
    if rope_type is None:
        fields.refuse(f"rope type {found!r}", ", ".join(ROPE_TYPES))
    rotated = rope.number("partial_rotary_factor", default=fields.number_or_none(_PARTIAL) or 1.0)
    if rotated != 1.0:
        fields.refuse(f"{_PARTIAL} = {rotated}", "1.0 (all dims of a head)")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10_000.0))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type="linear", theta=theta, factor=rope.number("factor"))
    # The key beside the object comes first, as in transformers.
    original = rope.integer(_ORIGINAL, default=max_position_embeddings)
    original = fields.integer(_ORIGINAL, default=original)
    if rope_type == "llama3":
        return _llama3(rope, theta, original)
    return _yarn(rope, theta, original, default_factor=max_position_embeddings / original)


_PARTIAL, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def _llama3(rope: _Fields, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse(f"high_freq_factor = {high} and low_freq_factor = {low}", "high above low")
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=rope.number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: _Fields, theta: float, original: int, *, default_factor: float) -> RopeConfig:
    if theta == 1.0:
        rope.refuse("rope_theta = 1", "another base for rope type 'yarn'")
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=rope.number("factor", default=default_factor),
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
    )


def _special_tokens(directory: Path, config: _Fields) -> tuple[int | None, tuple[int, ...]]:
    """Return ``(bos_token_id, eos_token_ids)``; generation_config.json comes first, key by key."""
    path = directory / "generation_config.json"
    generation = _Fields(path, read_json(path) if path.is_file() else {})

    def token_ids(key: str) -> tuple[int, ...]:
        fields = generation if key in generation.values else config
        value = fields.values.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
            fields.refuse(f"{key} = {value!r}", "a token id or a list of them")
        return tuple(ids)

    bos = token_ids("bos_token_id")
    return (bos[0] if bos else None), token_ids("eos_token_id")
