"""Families of decoders, as declared facts: all that one architecture does otherwise than another.

`models.config` reads config.json by these facts, `models.weights` finds the
tensors by them, and `models.decoder` computes what the two say: it asks for
facts, never for a family. Another architecture that differs in nothing else is
one more entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """What a family calls its modules in the file, without ``.weight`` and ``.bias``."""

    lm_head: str = "lm_head"
    prefix: str = "model."  # of all that follow
    embed: str = "embed_tokens"
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

    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes for a key that config.json leaves out (null is not left out)."""

    qk_norm: bool = False  # a norm of each query and key head, before RoPE
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    sliding_window: bool | str = False  # whether the key sliding_window counts

    tensors: TensorNames = TensorNames()
    harmless: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of tensor names that old checkpoints saved beside the weights: computed, not trained."""


_SILU: dict[str, object] = {"hidden_act": "silu"}

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
}
