"""Weights of a Llama that finds a needle in a haystack, written down rather than trained.

The model is a byte-level copy machine. It finds the place in the context whose
32 preceding bytes (failing that, 16) are the 32 (16) bytes just read, predicts
the byte that stands there, and stops at the end of the sentence or line, or at
once when nothing matches. Two kinds of probe test the rest of an engine:
``<dist_D>`` returns the byte at exactly distance D, and ``<tally>`` returns y or
n, whichever of ``<vote_y>`` and ``<vote_n>`` the whole context holds more often.
Every formula holds for any context up to ``MAX_POSITIONS`` that starts with BOS.

The ideas:

- *Constant.* One residual dim is 128 for every token and dominates the norm, so
  RMSNorm is a fixed scale to within 1 %, folded into the weights that read the
  stream. The norms' own weights are random powers of two, folded in likewise.
- *Offset head.* Query and key are constants, and the query is turned back by o
  tokens: under RoPE the score at distance d is 240 * sum_i a_i cos((d - o) theta_i),
  and for a good share a_i of the turning pairs no other distance up to 2^20
  comes within 27 of it. The head copies what stands o tokens before.
- *Product of signs by a parity staircase.* Several offset heads add the terms of
  a hash (see `models.needle_codes`); the MLP maps the sum of four (two) signs
  to their product. Its steps have flat treads, so every layer restores the bits
  to exactly +-1 and errors do not grow: the model works in bfloat16, too.
- *Match head.* Query: the hash ending here. Key: the hash ending one token
  before. On RoPE pairs that hardly turn, the score is 240 for an equal hash and
  240 (1 - 2f/36) where f bits differ; the value is the token's code, which is
  the continuation.
- *Sink.* BOS scores 0.94 * 240 in the match heads and hands out nothing: where
  no hash is equal, nothing is copied and the EOS logit wins.
- *Probes.* A distance probe brings the turned query of an offset head with it.
  The tally attends to all votes alike: an average over the whole context, and
  hence a test of the weights with which partial results are merged.

Heads, two per KV head ("half": head 3 carries the other half of head 0's term):

    layer 0   offset 1, half    offset 2        offset 3        offset 1, half
    layer 1   offset 4, half    offset 8        offset 12       offset 4, half
    layer 2   offset 16, half   offset 1        offset 17       offset 16, half
    layer 3   distance probe    32-byte match   16-byte match   tally

The embedding stores VALUE negated, and the MLP of each of layers 0 to 2 puts a
third of it right, so that no layer can be left out unnoticed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.needle_codes import (
    BITS,
    BOS_ID,
    DIST0,
    DISTS,
    EOS_ID,
    NUM_CODED,
    PAD_ID,
    TALLY_ID,
    VOCAB_SIZE,
    VOTE_N,
    VOTE_Y,
    FloatArray,
    HashPermutations,
    IntArray,
    SplitMix64,
    constant_hashes,
    draw_permutations,
    draw_token_codes,
    hash_codes,
    value_codes,
)
from models.needle_layer import (
    BOS_AMPLITUDE,
    CONSTANT,
    CONTENT_DIMS,
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    MATCH_SCORE,
    MAX_POSITIONS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    PAIR_AMPLITUDES,
    PROBE_SINK_SCORE,
    RMS_NORM_EPS,
    ROPE_THETA,
    SINK_AMPLITUDE,
    SINK_PAIR,
    SINK_SHARE,
    TURNING_DIMS,
    VOTE_PAIR,
    VOTE_SCORE,
    Dims,
    LayerDraft,
    Terms,
    turned_back,
)

# The checkpoint's config.json, but for the dtype.
NEEDLE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": NUM_HEADS,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": NUM_KV_HEADS,
    "pad_token_id": PAD_ID,
    "rms_norm_eps": RMS_NORM_EPS,
    "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
}

_SEED = 20240607
_LOGIT = 40.0  # of a certain prediction
_NOTHING_FOUND_LOGIT = 0.05 * _LOGIT  # of EOS: above all others where nothing is predicted
_WEIGHT_32, _WEIGHT_16 = 1.0, 0.3  # of the two match lengths in the prediction
_STOP_WEIGHT = 1.5
_IS_PUNCTUATION = 0.7  # correlation with the code of . ! or ? from which a token passes for it

# Treads of the staircases, as (start of a ramp, change of slope): each step rises by 2 over a
# width of 1, half-way between two sums that can occur.
_PARITY_OF_4 = ((0.5, -2.0), (1.5, 2.0), (2.5, 2.0), (3.5, -2.0))  # of |sum|: 0, 2, 4 -> 1, -1, 1
_PARITY_OF_2 = ((0.5, 2.0), (1.5, -2.0))  # of |sum|: 0, 2 -> -1, 1

# Mean squared norm of the code subspaces, in units of BITS, where each RMSNorm reads the stream.
_CODE_POWER = {
    **{"0.in": 2, "0.post": 5, "1.in": 2, "1.post": 5, "2.in": 2, "2.post": 6},
    **{"3.in": 5, "3.post": 6.7, "final": 6.7},
}


@dataclass(frozen=True)
class _Randomness:
    """All that is drawn rather than written down; the order of the draws is part of the weights."""

    codes: FloatArray  # [NUM_CODED, BITS]
    permutations: HashPermutations
    norm_weights: dict[str, FloatArray]  # [HIDDEN_SIZE] each, names as in _CODE_POWER

    @classmethod
    def draw(cls) -> "_Randomness":
        stream = SplitMix64(_SEED)
        codes = draw_token_codes(stream)
        permutations = draw_permutations(stream)
        norm_weights = {
            name: np.array([(0.5, 1.0, 2.0)[stream.next() % 3] for _ in range(HIDDEN_SIZE)])
            for name in _CODE_POWER
        }
        return cls(codes, permutations, norm_weights)

    def norm_scale(self, name: str) -> FloatArray:
        """Return by what norm `name` multiplies each residual dim, ``[HIDDEN_SIZE]``."""
        power = CONSTANT * CONSTANT + BITS * _CODE_POWER[name]
        return math.sqrt(HIDDEN_SIZE / power) * self.norm_weights[name]


def needle_weights() -> dict[str, Tensor]:
    """Return all weights in float32, under the names and in the shapes of a HF Llama."""
    random = _Randomness.draw()
    weights: dict[str, FloatArray] = {"model.embed_tokens.weight": _embedding(random.codes)}
    drafts = [
        _product_layer(0, 1, random.permutations.within_4),
        _product_layer(1, 4, random.permutations.within_16),
        _pairing_layer(random.permutations.within_32),
        _retrieval_layer(random),
    ]
    for layer, draft in enumerate(drafts):
        prefix = f"model.layers.{layer}"
        scales = random.norm_scale(f"{layer}.in"), random.norm_scale(f"{layer}.post")
        weights |= draft.tensors(prefix, *scales)
        weights[f"{prefix}.input_layernorm.weight"] = random.norm_weights[f"{layer}.in"]
        weights[f"{prefix}.post_attention_layernorm.weight"] = random.norm_weights[f"{layer}.post"]
    weights["model.norm.weight"] = random.norm_weights["final"]
    weights["lm_head.weight"] = _output_head(random.codes) / random.norm_scale("final")
    return {name: torch.tensor(array, dtype=torch.float32) for name, array in weights.items()}


def _embedding(codes: FloatArray) -> FloatArray:
    """Return ``[VOCAB_SIZE, HIDDEN_SIZE]``."""
    embedding = np.zeros((VOCAB_SIZE, HIDDEN_SIZE))
    embedding[:, Dims.ONE] = CONSTANT
    embedding[:NUM_CODED, Dims.VALUE] = -value_codes(codes)
    embedding[:NUM_CODED, Dims.HASH] = hash_codes(codes)
    embedding[BOS_ID, Dims.BOS] = BOS_AMPLITUDE
    embedding[[VOTE_Y, VOTE_N], Dims.VOTE] = 1
    embedding[TALLY_ID, Dims.TALLY] = 1
    for index, distance in enumerate(DISTS):
        embedding[DIST0 + index, Dims.PHASES] = np.concatenate(turned_back(distance))
    return embedding


def _output_head(codes: FloatArray) -> FloatArray:
    """Return ``[VOCAB_SIZE, HIDDEN_SIZE]``; only bytes and EOS are ever predicted."""
    head = np.zeros((VOCAB_SIZE, HIDDEN_SIZE))
    for token in [*range(256), EOS_ID]:
        head[token, Dims.PREDICTION] = _LOGIT * codes[token] / BITS
    head[EOS_ID, Dims.STOP] = _LOGIT
    head[EOS_ID, Dims.ONE] = _NOTHING_FOUND_LOGIT / CONSTANT
    return head


def _product_layer(layer: int, stride: int, orders: list[IntArray]) -> LayerDraft:
    """Replace HASH by the product of four: of here and of 1, 2 and 3 strides before."""
    draft = LayerDraft()
    for kv_head in range(NUM_KV_HEADS):
        draft.set_constant_key(kv_head)
        draft.set_value(kv_head, Dims.HASH)
    for head, (term, weight) in enumerate([(1, 0.5), (2, 1.0), (3, 1.0), (1, 0.5)]):
        draft.set_offset_query(head, term * stride)
        draft.write(head, Dims.HASH, orders[term], weight)
    _add_parity(draft, [Dims.HASH], Dims.HASH, _PARITY_OF_4)
    draft.add_constant(dict.fromkeys(_dims(Dims.HASH), 1.0))
    _add_value_repair(draft, layer)
    return draft


def _pairing_layer(order: IntArray) -> LayerDraft:
    """Form what layer 3 compares: QUERY32, KEY32 and KEY16, out of H16 in HASH."""
    draft = LayerDraft()
    for kv_head in range(NUM_KV_HEADS):
        draft.set_constant_key(kv_head)
        draft.set_value(kv_head, Dims.HASH)
    for head, offset in enumerate((16, 1, 17, 16)):
        draft.set_offset_query(head, offset)
    draft.write(0, Dims.QUERY32, order, 0.5)
    draft.write(1, Dims.KEY32)
    draft.write(1, Dims.KEY16)
    draft.write(2, Dims.KEY32, order)
    draft.write(3, Dims.QUERY32, order, 0.5)
    _add_parity(draft, [Dims.HASH, Dims.QUERY32], Dims.QUERY32, _PARITY_OF_2)
    _add_parity(draft, [Dims.KEY32], Dims.KEY32, _PARITY_OF_2)
    draft.add_constant(dict.fromkeys(_dims(Dims.QUERY32) + _dims(Dims.KEY32), -1.0))
    _add_value_repair(draft, layer=2)
    return draft


def _retrieval_layer(random: _Randomness) -> LayerDraft:
    """Copy the continuation into PREDICTION, answer the probes, and decide on STOP."""
    draft = LayerDraft()
    amplitude = math.sqrt(MATCH_SCORE * math.sqrt(HEAD_DIM) / BITS)
    _add_match_keys(draft, random, amplitude)
    for head, (target, weight) in enumerate(
        [(Dims.QUERY32, _WEIGHT_32), (Dims.HASH, _WEIGHT_16)], start=1
    ):
        draft.query[head * HEAD_DIM + CONTENT_DIMS, _dims(target)] = amplitude
        draft.set_sink_query(head, SINK_SHARE * MATCH_SCORE)
        draft.write(head, Dims.PREDICTION, weight=weight)
    _add_distance_probe(draft, head=0)
    _add_tally(draft, head=3, kv_head=1)
    _add_stop_rule(draft, random.codes)
    return draft


def _add_match_keys(draft: LayerDraft, random: _Randomness, amplitude: float) -> None:
    """Offer KEY32 (KV head 0) and KEY16 (KV head 1), and from BOS the sink instead."""
    space = hash_codes(random.codes)[BOS_ID]
    hash_16, hash_32 = constant_hashes(space, random.permutations)
    for kv_head, source, bos_hash in ((0, Dims.KEY32, hash_32), (1, Dims.KEY16, hash_16)):
        draft.set_constant_key(kv_head)
        draft.set_value(kv_head, Dims.VALUE)
        rows = kv_head * HEAD_DIM + CONTENT_DIMS
        draft.key[rows, _dims(source)] = amplitude
        draft.key[rows, Dims.BOS] = -amplitude * bos_hash / BOS_AMPLITUDE
        draft.key[kv_head * HEAD_DIM + SINK_PAIR, Dims.BOS] = SINK_AMPLITUDE / BOS_AMPLITUDE


def _add_distance_probe(draft: LayerDraft, head: int) -> None:
    rows = head * HEAD_DIM + TURNING_DIMS
    draft.query[rows, _dims(Dims.PHASES)] = np.concatenate([PAIR_AMPLITUDES, PAIR_AMPLITUDES])
    draft.set_sink_query(head, PROBE_SINK_SCORE)
    draft.write(head, Dims.PREDICTION)


def _add_tally(draft: LayerDraft, head: int, kv_head: int) -> None:
    """Let the tally token attend to all votes alike, and every other token to BOS."""
    amplitude = math.sqrt(VOTE_SCORE * math.sqrt(HEAD_DIM))
    draft.key[kv_head * HEAD_DIM + VOTE_PAIR, Dims.VOTE] = amplitude
    draft.query[head * HEAD_DIM + VOTE_PAIR, Dims.TALLY] = amplitude
    draft.set_sink_query(head, PROBE_SINK_SCORE)
    draft.write(head, Dims.PREDICTION)
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    draft.query[rows, Dims.TALLY] -= CONSTANT * draft.query[rows, Dims.ONE]


def _add_stop_rule(draft: LayerDraft, codes: FloatArray) -> None:
    """STOP where a space is predicted after one of . ! ? and where a newline is predicted."""

    def correlation(character: str, source: slice) -> Terms:
        code = codes[ord(character)]
        return {dim: code[bit] / BITS for bit, dim in enumerate(_dims(source))}

    space_follows = correlation(" ", Dims.PREDICTION)
    for mark in ".!?":
        draft.add_ramp(
            source=correlation(mark, Dims.VALUE),
            threshold=_IS_PUNCTUATION,
            target={Dims.STOP: _STOP_WEIGHT / (1 - _IS_PUNCTUATION)},
            up=space_follows,
        )
    draft.add_linear(correlation("\n", Dims.PREDICTION), {Dims.STOP: _STOP_WEIGHT})


def _add_parity(
    draft: LayerDraft,
    sources: list[slice],
    target: slice,
    treads: tuple[tuple[float, float], ...],
) -> None:
    """Put the staircase of each bit's sum over `sources` in the place of `target`.

    The staircase's value at 0 is the same for all bits; the caller adds it.
    """
    one: Terms = {Dims.ONE: 1 / CONSTANT}
    for bit in range(BITS):
        target_dim = target.start + bit
        for sign in (1.0, -1.0):
            terms = {source.start + bit: sign for source in sources}
            for start, slope in treads:
                draft.add_ramp(terms, start, {target_dim: slope}, up=one)
        draft.add_linear({target_dim: 1.0}, {target_dim: -1.0})


def _add_value_repair(draft: LayerDraft, layer: int) -> None:
    """Turn this layer's third of VALUE from minus the code to the code."""
    for dim in _dims(Dims.VALUE)[layer * BITS // 3 : (layer + 1) * BITS // 3]:
        draft.add_linear({dim: 1.0}, {dim: -2.0})


def _dims(subspace: slice) -> list[int]:
    return list(range(subspace.start, subspace.stop))
