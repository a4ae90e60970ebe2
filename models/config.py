"""What a Hugging Face checkpoint's config.json says about a decoder, read with its types.

The facts of its family (`models.families`) say which keys count. What neither
declares is refused in one sentence: a checkpoint that is half understood would
be served with wrong answers, which nobody notices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.config_rope import read_rope, read_rotary_dim
from models.errors import CheckpointError
from models.families import ACTIVATIONS, FAMILIES, Family, NormKind
from models.json_fields import JsonFields, read_json
from models.rope import RopeConfig

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder, as its checkpoint and the facts of its family declare it."""

    architecture: str  # a key of `FAMILIES`
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int  # of queries
    num_kv_heads: int  # divides num_heads
    head_dim: int  # num_heads * head_dim need not be hidden_size
    vocab_size: int
    max_position_embeddings: int  # tokens
    position_limit: int | None  # tokens; a longer context is answered wrongly. None: none is
    position_offset: int  # row of position 0 in the table of learned positions
    norm: NormKind
    norm_eps: float
    qk_norm: bool  # query and key heads are normed before RoPE
    activation: str  # of the MLP, a key of `ACTIVATIONS`
    gated_mlp: bool  # the activation of a gate projection multiplies the up projection
    parallel_residual: bool  # attention and MLP both read the layer's input
    rope: RopeConfig | None  # None: positions are learned
    rotary_dim: int  # dims of a head, the first ones, that RoPE turns; even
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
    values = read_json(path)
    architecture = _architecture(JsonFields(path, values))
    family = FAMILIES[architecture]
    fields = JsonFields(path, {**family.defaults, **values})
    _refuse_unsupported(fields, family)
    keys = family.keys
    hidden_size = fields.integer(keys.hidden_size)
    num_heads, num_kv_heads, head_dim = _heads(fields, family)
    num_layers, max_positions = fields.integer(keys.num_layers), fields.integer(keys.max_positions)
    bos_token_id, eos_token_ids = _special_tokens(directory, fields)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer(
            keys.intermediate_size, default=family.mlp_ratio and family.mlp_ratio * hidden_size
        ),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=max_positions,
        position_limit=_position_limit(fields, family, num_layers, max_positions),
        position_offset=family.position_offset,
        norm=family.norm,
        norm_eps=_number(fields, family.norm_eps),
        qk_norm=family.qk_norm,
        activation=_activation(fields, keys.activation),
        gated_mlp=family.gated_mlp,
        parallel_residual=_flag(fields, family.parallel_residual),
        rope=None if family.learned_positions else read_rope(fields, family, max_positions),
        rotary_dim=0 if family.learned_positions else read_rotary_dim(fields, family, head_dim),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=_flag(fields, family.qkv_bias),
        attention_out_bias=_flag(fields, family.out_bias),
        mlp_bias=_flag(fields, family.mlp_bias),
        dtype=_dtype(fields),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
    )


def check_max_model_len(config: ModelConfig, max_model_len: int | None) -> None:
    """Refuse lengths that this model has no right answer for; None stands for its own.

    Raises:
        CheckpointError: ``max_model_len`` lies beyond ``config.position_limit``.
    """
    if max_model_len and config.position_limit and max_model_len > config.position_limit:
        raise CheckpointError(
            f"max_model_len is {max_model_len}, but the positions of this checkpoint end, or its"
            f" sliding window begins to hide tokens, at {config.position_limit}: ask for no more"
        )


def no_checkpoint(directory: Path) -> CheckpointError:
    """Return the error for a directory that is not there or holds no checkpoint."""
    return CheckpointError(
        f"No checkpoint at {directory}: expected a directory with config.json and *.safetensors"
    )


def _architecture(fields: JsonFields) -> str:
    architectures = fields.values.get("architectures")
    supported = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or not architectures:
        fields.refuse(f"architectures = {architectures!r}", supported)
    architecture = str(architectures[0])
    for key in _EXPERTS:
        if fields.values.get(key, 0) not in (0, 1):
            found = f"architecture {architecture}, a mixture of experts ({key} ="
            fields.refuse(f"{found} {fields.values[key]!r})", f"dense models of {supported}")
    if architecture not in FAMILIES:
        fields.refuse(f"architecture {architecture}", supported)
    return architecture


def _refuse_unsupported(fields: JsonFields, family: Family) -> None:
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        fields.refuse(
            f"a quantization_config ({method or 'of no named method'})",
            "unquantized weights in " + ", ".join(_DTYPES),
        )
    for key, (supported, meaning) in family.fixed.items():
        if fields.flag(key, default=supported) != supported:
            fields.refuse(f"{key} = {not supported}", f"{supported} ({meaning})")
    hidden_size = fields.integer(family.keys.hidden_size)
    embedding_size = fields.integer("word_embed_proj_dim", default=hidden_size)
    if embedding_size != hidden_size:
        fields.refuse(
            f"word_embed_proj_dim = {embedding_size}, a projection of embeddings to hidden_size ="
            f" {hidden_size}",
            "embeddings of the hidden size",
        )


def _activation(fields: JsonFields, key: str) -> str:
    name = fields.values.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fields.refuse(f"{key} = {name!r}", ", ".join(ACTIVATIONS))
    return name


def _position_limit(
    fields: JsonFields, family: Family, num_layers: int, max_positions: int
) -> int | None:
    """Return where a table of positions ends, or a sliding window begins to hide tokens.

    A window that hides tokens from a context of ``max_positions`` is refused.
    """
    if family.learned_positions:
        return max_positions
    layer_types = fields.values.get("layer_types")
    every = "full_attention"
    if layer_types is not None and layer_types != [every] * num_layers:
        fields.refuse(f"layer_types = {_short(layer_types)}", f"{every!r} for every layer")
    counts = family.sliding_window
    if isinstance(counts, str):
        first = fields.values.get("max_window_layers")  # layer; those before see all tokens
        no_layer = layer_types is not None or (isinstance(first, int) and first >= num_layers)
        counts = fields.flag(counts) and not no_layer
    if not counts or "sliding_window" not in fields.values:
        return None
    window = fields.integer("sliding_window")
    if window < max_positions:
        fields.refuse(
            f"sliding_window = {window}, which max_position_embeddings = {max_positions} outgrows",
            "attention to all tokens before (sliding_window = null)",
        )
    return window


def _heads(fields: JsonFields, family: Family) -> tuple[int, int, int]:
    """Return ``(num_heads, num_kv_heads, head_dim)``."""
    keys = family.keys
    hidden_size, num_heads = fields.integer(keys.hidden_size), fields.integer(keys.num_heads)
    num_kv_heads = num_heads
    if family.grouped_heads:
        num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        fields.refuse(
            f"{keys.num_heads} = {num_heads} and num_key_value_heads = {num_kv_heads}",
            "a number of query heads that the number of kv heads divides",
        )
    own_dim = family.grouped_heads and "head_dim" in fields.values
    if not own_dim and hidden_size % num_heads:
        fields.refuse(
            f"{keys.hidden_size} = {hidden_size}, {keys.num_heads} = {num_heads} and no head_dim",
            "a hidden size that the number of heads divides, or an explicit head_dim",
        )
    head_dim = fields.integer("head_dim") if own_dim else hidden_size // num_heads
    return num_heads, num_kv_heads, head_dim


def _flag(fields: JsonFields, fact: bool | str) -> bool:
    return fields.flag(fact) if isinstance(fact, str) else fact


def _number(fields: JsonFields, fact: float | str) -> float:
    return fields.number(fact) if isinstance(fact, str) else fact


def _dtype(fields: JsonFields) -> torch.dtype:
    """Read what transformers 5 calls dtype and transformers 4 calls torch_dtype."""
    name = str(fields.values.get("dtype", fields.values.get("torch_dtype", "float32")))
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        fields.refuse(f"dtype = {name!r}", ", ".join(_DTYPES))
    return dtype


def _special_tokens(directory: Path, config: JsonFields) -> tuple[int | None, tuple[int, ...]]:
    """Return ``(bos_token_id, eos_token_ids)``; generation_config.json comes first, key by key."""
    path = directory / "generation_config.json"
    generation = JsonFields(path, read_json(path) if path.is_file() else {})

    def token_ids(key: str) -> tuple[int, ...]:
        fields = generation if key in generation.values else config
        value = fields.values.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
            fields.refuse(f"{key} = {value!r}", "a token id or a list of them")
        return tuple(ids)

    bos = token_ids("bos_token_id")
    return (bos[0] if bos else None), token_ids("eos_token_id")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
