"""A decoder-only transformer over this rank's tokens.

The network knows nothing of the ring: attention is a callable that gets one
layer's queries, keys and values of the tokens at hand, and returns what they
attend to. Everything else of a layer works token by token.

Letters: T = tokens on this rank, E = hidden size, F = intermediate size, V =
vocabulary; H, K, J, D as in `attention`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from attention.spans import NO_LAYER
from attention.timing import PartTimer
from models.config import ModelConfig
from models.families import ACTIVATIONS
from models.linear import linear
from models.rope import apply_rope_, rope_cos_sin, rope_inv_freq
from models.weights import DecoderWeights, LayerWeights

# The widest activations (T x 2F), and those of norms of heads, exist for so many tokens at a time.
MLP_TOKENS = {"cpu": 1024, "cuda": 16384}


class LayerAttention(Protocol):
    """What the decoder asks of attention: one call a layer, in order of layers."""

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """Return ``out_THD`` for these queries; ``kv_TJD`` is contiguous and RoPE is applied.

        In the last layer there may be fewer queries than keys: those of the kept rows.
        """


class Decoder:
    """Weights of one model on one device, and the way of tokens through its layers."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        """Take a configuration and weights that fit it, all on one device."""
        self.config = config
        self._weights = weights
        self.device = weights.embed_VE.device
        self.dtype = weights.embed_VE.dtype
        self._activate = ACTIVATIONS[config.activation]
        self._inv_freq, self._rope_factor = None, 1.0
        if config.rope is not None:
            inv_freq, self._rope_factor = rope_inv_freq(config.rope, config.rotary_dim)
            self._inv_freq = inv_freq.to(self.device)

    def first_layers(self, count: int) -> "Decoder":
        """Return a decoder of the first layers alone, over the same weights: to measure with."""
        layers = self._weights.layers[:count]
        return Decoder(self.config, dataclasses.replace(self._weights, layers=layers))

    @torch.inference_mode()
    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attention: LayerAttention,
        timer: PartTimer,
        *,
        keep_rows: Sequence[int] | None = None,
        on_inputs: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the last layer's hidden states ``[rows, E]`` of the kept rows (None: of all).

        ``ids_T`` and ``positions_T`` are int64 on the model's device. What no
        kept row needs is left out of the last layer: all but the keys and values of the others.
        ``on_inputs`` is given every layer's ``normed_TE``, all rows of it, from which
        `project_inputs` makes keys and values again. It reads them on the current stream.
        """
        x_TE = functional.embedding(ids_T, self._weights.embed_VE)
        if self._weights.positions_LE is not None:
            rows_T = positions_T + self.config.position_offset
            x_TE += functional.embedding(rows_T, self._weights.positions_LE)
        cos_sin = self.rotations(positions_T)
        for index, layer in enumerate(self._weights.layers):
            is_last = index == len(self._weights.layers) - 1
            rows = keep_rows if is_last else None
            timer.at_layer(index)
            with timer("gemm"):
                normed_TE = self._norm(x_TE, layer.input_norm_E, layer.input_norm_bias_E)
                q_THD, kv_TJD = self._project(layer, normed_TE, cos_sin, rows)
            if on_inputs is not None:
                with timer("store"):
                    on_inputs(index, normed_TE)
            del normed_TE  # the ring's rounds want the memory
            out_THD = attention(index, q_THD, kv_TJD)
            if rows is not None:
                x_TE = x_TE[rows]
            with timer("gemm"):
                out_TX = out_THD.flatten(1).to(self.dtype)
                out_TE = linear(out_TX, layer.out_EX, layer.out_bias_E)
                if self.config.parallel_residual:
                    self._add_mlp(layer, x_TE, out_TE)
                    x_TE += out_TE
                else:
                    x_TE += out_TE
                    self._add_mlp(layer, x_TE, x_TE)
        timer.at_layer(NO_LAYER)
        return x_TE

    @torch.inference_mode()
    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Return ``logits_TV`` in float32."""
        weights = self._weights
        normed_TE = self._norm(hidden_TE, weights.final_norm_E, weights.final_norm_bias_E)
        return linear(normed_TE, weights.lm_head_VE).float()

    def rotations(self, positions_T: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin of these positions for all layers; None where nothing is turned."""
        if self._inv_freq is None:
            return None
        return rope_cos_sin(positions_T, self._inv_freq, self._rope_factor)

    @torch.inference_mode()
    def project_inputs(
        self, layer: int, inputs_TE: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return ``kv_TJD``, contiguous, as `forward` makes it of a layer's normed inputs.

        ``cos_sin`` are the `rotations` of these rows' positions. The last bits may differ from
        those of `forward`: a product's depend on how many rows it has.
        """
        return self._keys_values(self._weights.layers[layer], inputs_TE, cos_sin)

    def _project(
        self,
        layer: LayerWeights,
        normed_TE: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        query_rows: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(q, kv_TJD)``; the queries of some rows alone where these are given."""
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        if query_rows is None:
            qkv_TPD = self._heads(layer, normed_TE, slice(None))
            self._norm_heads_(qkv_TPD[:, :H], layer.query_norm_D)
            self._norm_heads_(qkv_TPD[:, H : H + K], layer.key_norm_D)
            self._turn_(qkv_TPD[:, : H + K], cos_sin)
            return qkv_TPD[:, :H], qkv_TPD[:, H:].contiguous()
        q_RHD = self._heads(layer, normed_TE[query_rows], slice(H * D))
        self._norm_heads_(q_RHD, layer.query_norm_D)
        self._turn_(q_RHD, cos_sin and (cos_sin[0][query_rows], cos_sin[1][query_rows]))
        return q_RHD, self._keys_values(layer, normed_TE, cos_sin)

    def _keys_values(
        self, layer: LayerWeights, normed_TE: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        H, K, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        kv_TJD = self._heads(layer, normed_TE, slice(H * D, None))
        self._norm_heads_(kv_TJD[:, :K], layer.key_norm_D)
        self._turn_(kv_TJD[:, :K], cos_sin)
        return kv_TJD

    def _heads(self, layer: LayerWeights, normed_TE: Tensor, part: slice) -> Tensor:
        """Project to some of the query, key and value heads."""
        bias_P = None if layer.qkv_bias_P is None else layer.qkv_bias_P[part]
        projected_TP = linear(normed_TE, layer.qkv_PE[part], bias_P)
        return projected_TP.unflatten(1, (-1, self.config.head_dim))

    def _turn_(self, heads_THD: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> None:
        if cos_sin is not None:
            apply_rope_(heads_THD[..., : self.config.rotary_dim], *cos_sin)

    def _add_mlp(self, layer: LayerWeights, x_TE: Tensor, sum_TE: Tensor) -> None:
        """Add the MLP's output for ``x_TE`` to ``sum_TE``, which may be the same."""
        tokens = MLP_TOKENS[self.device.type]
        for rows_TE, sum_rows_TE in zip(x_TE.split(tokens), sum_TE.split(tokens), strict=True):
            normed_TE = self._norm(rows_TE, layer.post_norm_E, layer.post_norm_bias_E)
            up_TF = linear(normed_TE, layer.gate_up_FE, layer.gate_up_bias_F)
            if self.config.gated_mlp:
                gate_TF, up_TF = up_TF.chunk(2, dim=1)
                inner_TF = self._activate(gate_TF).mul_(up_TF)
            else:
                inner_TF = self._activate(up_TF)
            sum_rows_TE += linear(inner_TF, layer.down_EF, layer.down_bias_E)

    def _norm_heads_(self, x_THD: Tensor, weight_D: Tensor | None) -> None:
        if weight_D is None:
            return
        for rows_tHD in x_THD.split(MLP_TOKENS[self.device.type]):
            rows_tHD.copy_(self._norm(rows_tHD, weight_D, None))

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.config.norm == "rms":
            return functional.rms_norm(x, weight.shape, weight, self.config.norm_eps)
        return functional.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
