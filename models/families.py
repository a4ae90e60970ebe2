"""Families of decoders, as declared facts: all that one architecture does otherwise than another.

`models.config` reads config.json by these facts, `models.weights` finds the
tensors by them, and `models.decoder` computes what the two say: it asks for
facts, never for a family. Another architecture that differs in nothing else is
one more entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional

NormKind = Literal["rms", "layer"]  # a layer norm also subtracts the mean, and has a bias

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """What a family calls its sizes in config.json."""

    num_layers: str = "num_hidden_layers"
    hidden_size: str = "hidden_size"
    intermediate_size: str = "intermediate_size"
    num_heads: str = "num_attention_heads"
    max_positions: str = "max_position_embeddings"
    activation: str = "hidden_act"
    rope_theta: str = "rope_theta"
    rotary_fraction: str = "partial_rotary_factor"


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """What a family calls its modules in the file, without ``.weight`` and ``.bias``.

    One name for q, k and v: they are stored fused. One for gate and up: nothing gates.
    """

    lm_head: str = "lm_head"
    prefix: str = "model."  # of all that follow
    embed: str = "embed_tokens"
    positions: str = "embed_positions"
    final_norm: str = "norm"
    layer: str = "layers.{}."  # the prefix, after the other one, of all that follow
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts; where one is ``bool | str``, a text is the key of config.json that says so."""

    keys: ConfigKeys = ConfigKeys()
    # What transformers takes for keys that config.json leaves out (null is not left out).
    defaults: Mapping[str, object] = field(default_factory=dict)
    # Keys of which one value is supported, their default too, and what this value means.
    fixed: Mapping[str, tuple[bool, str]] = field(default_factory=dict)

    norm: NormKind = "rms"
    norm_eps: float | str = "rms_norm_eps"
    qk_norm: bool = False  # a norm of each query and key head, before RoPE
    grouped_heads: bool = True  # with num_key_value_heads and head_dim; if not, each has its own
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    mlp_ratio: int | None = None  # of intermediate to hidden size, where config.json names no size
    parallel_residual: bool | str = False  # attention and MLP both read the layer's input
    learned_positions: bool = False  # a table that is added to the embedding; if not, RoPE
    position_offset: int = 0  # row of the table that belongs to position 0
    partial_rotary: bool = False  # RoPE may turn the first dims of a head only
    sliding_window: bool | str = False  # whether the key sliding_window counts

    tensors: tuple[TensorNames, ...] = (TensorNames(),)  # all the names in use, usual ones first
    transposed: bool = False  # the file has a layer's projections as [columns in, rows out]
    qkv_by_head: bool = False  # fused: q, k and v of head 0, then of head 1; if not, all q first
    # How names end that old checkpoints saved beside the weights: computed, not trained.
    harmless: tuple[str, ...] = ("rotary_emb.inv_freq",)

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate projection, whose activation multiplies the up projection."""
        return len(self.tensors[0].gate_up) == 2


_SILU: dict[str, object] = {"hidden_act": "silu"}

_OPT_TENSORS = TensorNames(
    prefix="model.decoder.",
    final_norm="final_layer_norm",
    input_norm="self_attn_layer_norm",
    out="self_attn.out_proj",
    post_norm="final_layer_norm",
    gate_up=("fc1",),
    down="fc2",
)
_GPT2_TENSORS = TensorNames(
    prefix="transformer.",
    embed="wte",
    positions="wpe",
    final_norm="ln_f",
    layer="h.{}.",
    input_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    post_norm="ln_2",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
)
_NEOX_TENSORS = TensorNames(
    prefix="gpt_neox.",
    embed="embed_in",
    final_norm="final_layer_norm",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults=_SILU,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        defaults=_SILU | {"sliding_window": 4096},
        sliding_window=True,
    ),
    "Qwen2ForCausalLM": Family(
        defaults=_SILU | {"sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        sliding_window="use_sliding_window",
    ),
    "Qwen3ForCausalLM": Family(
        defaults=_SILU | {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        qk_norm=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        sliding_window="use_sliding_window",
    ),
    "OPTForCausalLM": Family(
        keys=ConfigKeys(intermediate_size="ffn_dim", activation="activation_function"),
        defaults={
            "activation_function": "relu",
            "enable_bias": True,
            "tie_word_embeddings": True,
        },
        fixed={
            "do_layer_norm_before": (True, "norms before attention and MLP"),
            "_remove_final_layer_norm": (False, "a norm after the last layer"),
            "layer_norm_elementwise_affine": (True, "norms with weight and bias"),
        },
        norm="layer",
        norm_eps=1e-5,
        grouped_heads=False,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        learned_positions=True,
        position_offset=2,
        tensors=(_OPT_TENSORS, replace(_OPT_TENSORS, prefix="decoder.")),
        harmless=("decoder.version",),
    ),
    "GPT2LMHeadModel": Family(
        keys=ConfigKeys(
            num_layers="n_layer",
            hidden_size="n_embd",
            intermediate_size="n_inner",
            num_heads="n_head",
            max_positions="n_positions",
            activation="activation_function",
        ),
        defaults={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fixed={
            "scale_attn_weights": (True, "scores divided by the root of the head dim"),
            "scale_attn_by_inverse_layer_idx": (False, "the same scale in every layer"),
            "add_cross_attention": (False, "a decoder alone"),
        },
        norm="layer",
        norm_eps="layer_norm_epsilon",
        grouped_heads=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        mlp_ratio=4,
        learned_positions=True,
        tensors=(_GPT2_TENSORS, replace(_GPT2_TENSORS, prefix="")),
        transposed=True,
        harmless=(".attn.bias", ".attn.masked_bias"),
    ),
    "GPTNeoXForCausalLM": Family(
        keys=ConfigKeys(rope_theta="rotary_emb_base", rotary_fraction="rotary_pct"),
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
        },
        norm="layer",
        norm_eps="layer_norm_eps",
        grouped_heads=False,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        parallel_residual="use_parallel_residual",
        partial_rotary=True,
        tensors=(_NEOX_TENSORS, replace(_NEOX_TENSORS, lm_head="embed_out")),
        qkv_by_head=True,
        harmless=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
}
