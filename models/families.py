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


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """What a family calls its modules in the file, without ``.weight`` and ``.bias``."""

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
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # one, where nothing gates
    down: str = "mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts; where one is ``bool | str``, a text is the key of config.json that says so."""

    keys: ConfigKeys = ConfigKeys()
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes for a key that config.json leaves out (null is not left out)."""
    fixed: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    """Keys of which one value is supported (also where they are left out), and what it means."""

    norm: NormKind = "rms"
    norm_eps: float | str = "rms_norm_eps"
    qk_norm: bool = False  # a norm of each query and key head, before RoPE
    grouped_heads: bool = True  # with num_key_value_heads and head_dim; if not, each has its own
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    learned_positions: bool = False  # a table that is added to the embedding; if not, RoPE
    position_offset: int = 0  # row of the table that belongs to position 0
    sliding_window: bool | str = False  # whether the key sliding_window counts

    tensors: tuple[TensorNames, ...] = (TensorNames(),)
    """The names in use; the last ones are of older checkpoints."""
    harmless: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of tensor names that old checkpoints saved beside the weights: computed, not trained."""

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
}
