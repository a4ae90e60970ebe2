"""Sizes of the needle checkpoint, the layout of its residual stream, and one layer in the making.

Shapes: C = hidden size, D = head dim. Weights are written in residual units and
float64; `LayerDraft.tensors` folds in the norms. RoPE pair i is dims (i, i + D/2)
of a head and turns by theta_i = ROPE_THETA ** (-2i / D) per token:

    pairs 0-10    turn visibly: position
    pair 12       turns by 0.18 rad in 2^20 tokens: the sink
    pairs 13-30   turn by less than 0.05 rad in 2^20 tokens: content, one dim per hash bit
    pair 31       stands still: the votes
"""

import math

import numpy as np

from models.needle_codes import BITS, FloatArray, IntArray

NUM_LAYERS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 4, 256, 384
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
MAX_POSITIONS = 1 << 20
ROPE_THETA = 1e18
RMS_NORM_EPS = 1e-5

CONSTANT = 128.0  # value of the constant feature
BOS_AMPLITUDE = 16.0  # value of the BOS feature at BOS
STEEPNESS = 32.0  # silu(32 x) / 32 is relu(x) to within 1e-7 for |x| >= 1/2

# Scores, after the division by sqrt(HEAD_DIM).
OFFSET_SCORE = 240.0  # of an offset head at its offset
MATCH_SCORE = 240.0  # of two equal hashes
SINK_SHARE = 0.94  # what BOS scores in a match head, as a share of MATCH_SCORE
PROBE_SINK_SCORE = 40.0  # what BOS scores in the probe heads, for tokens that are no probe
VOTE_SCORE = 30.0  # of a vote in the tally head; all others score 0

NUM_TURNING_PAIRS = 11
SINK_PAIR, VOTE_PAIR = 12, 31
_HALF_DIM = HEAD_DIM // 2
_CONTENT_PAIRS = np.arange(13, 31)
TURNING_DIMS = np.concatenate(
    [np.arange(NUM_TURNING_PAIRS), _HALF_DIM + np.arange(NUM_TURNING_PAIRS)]
)
CONTENT_DIMS = np.concatenate([_CONTENT_PAIRS, _HALF_DIM + _CONTENT_PAIRS])
THETAS = 1.0 / (np.float64(ROPE_THETA) ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM))  # rad per token

# Share of each turning pair in an offset score: the runner-up lies 0.113 * 240 below.
_SHARES = np.array([6, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1], float) / 23.0
PAIR_AMPLITUDES = np.sqrt(OFFSET_SCORE * math.sqrt(HEAD_DIM) * _SHARES)
SINK_AMPLITUDE = math.sqrt(MATCH_SCORE * math.sqrt(HEAD_DIM))

Terms = dict[int, float]  # coefficient of each residual dim that takes part


class Dims:
    """Which residual dims hold what; a slice of ``BITS`` dims holds one code or hash."""

    ONE, BOS, VOTE, TALLY, STOP = range(5)
    VALUE = slice(5, 5 + BITS)  # code of this token: what it hands out when it is copied
    HASH = slice(VALUE.stop, VALUE.stop + BITS)  # code, after layer 0 H4, after layer 1 H16
    QUERY32 = slice(HASH.stop, HASH.stop + BITS)  # H32 ending here
    KEY32 = slice(QUERY32.stop, QUERY32.stop + BITS)  # H32 ending one token before
    KEY16 = slice(KEY32.stop, KEY32.stop + BITS)  # H16 ending one token before
    PREDICTION = slice(KEY16.stop, KEY16.stop + BITS)  # sum of the codes found in layer 3
    PHASES = slice(PREDICTION.stop, PREDICTION.stop + 2 * NUM_TURNING_PAIRS)  # of a distance probe


def turned_back(distance: int) -> tuple[FloatArray, FloatArray]:
    """Return (cos, -sin) of the turning pairs, ``[NUM_TURNING_PAIRS]`` each.

    A query with these phases meets a constant key in step `distance` tokens before it.
    """
    angles = distance * THETAS[:NUM_TURNING_PAIRS]
    return np.cos(angles), -np.sin(angles)


class LayerDraft:
    """One decoder layer in the making: its heads, then the units of its MLP, in order."""

    def __init__(self) -> None:
        self.query = np.zeros((NUM_HEADS * HEAD_DIM, HIDDEN_SIZE))
        self.key = np.zeros((NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE))
        self.value = np.zeros((NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE))
        self.output = np.zeros((HIDDEN_SIZE, NUM_HEADS * HEAD_DIM))
        self.gate = np.zeros((INTERMEDIATE_SIZE, HIDDEN_SIZE))
        self.up = np.zeros((INTERMEDIATE_SIZE, HIDDEN_SIZE))
        self.down = np.zeros((HIDDEN_SIZE, INTERMEDIATE_SIZE))
        self._units_used = 0

    def set_constant_key(self, kv_head: int) -> None:
        """Offer every offset head the same key from every token."""
        rows = kv_head * HEAD_DIM + np.arange(NUM_TURNING_PAIRS)
        self.key[rows, Dims.ONE] = PAIR_AMPLITUDES / CONSTANT

    def set_value(self, kv_head: int, source: slice) -> None:
        rows = kv_head * HEAD_DIM + np.arange(BITS)
        self.value[rows, np.arange(source.start, source.stop)] = 1.0

    def set_offset_query(self, head: int, offset: int) -> None:
        """Let `head` attend to the token `offset` before."""
        cosines, sines = turned_back(offset)
        rows = head * HEAD_DIM + TURNING_DIMS
        query = np.concatenate([PAIR_AMPLITUDES * cosines, PAIR_AMPLITUDES * sines])
        self.query[rows, Dims.ONE] = query / CONSTANT

    def set_sink_query(self, head: int, score: float) -> None:
        """Let `head` give BOS this score, from every token."""
        rows = head * HEAD_DIM + SINK_PAIR
        amplitude = score * math.sqrt(HEAD_DIM) / SINK_AMPLITUDE / CONSTANT
        # The sink pair turns slowly; in step with BOS half-way through the longest context.
        angle = 0.5 * MAX_POSITIONS * THETAS[SINK_PAIR]
        self.query[rows, Dims.ONE] = amplitude * math.cos(angle)
        self.query[rows + _HALF_DIM, Dims.ONE] = -amplitude * math.sin(angle)

    def write(
        self, head: int, target: slice, order: IntArray | None = None, weight: float = 1.0
    ) -> None:
        """Add ``weight * value[order]`` of `head` to the residual dims `target`."""
        columns = head * HEAD_DIM + (np.arange(BITS) if order is None else order)
        self.output[np.arange(target.start, target.stop), columns] += weight

    def add_unit(self, gate: Terms, up: Terms, down: Terms) -> None:
        """Add one SwiGLU unit, ``silu(gate) * up`` into `down`."""
        unit = self._units_used
        assert unit < INTERMEDIATE_SIZE
        for weights, terms in ((self.gate, gate), (self.up, up)):
            for dim, coefficient in terms.items():
                weights[unit, dim] = coefficient
        for dim, coefficient in down.items():
            self.down[dim, unit] = coefficient
        self._units_used += 1

    def add_linear(self, source: Terms, target: Terms) -> None:
        """Add `source` times each coefficient to the dims of `target`."""
        open_gate = {Dims.ONE: STEEPNESS / CONSTANT}
        down = {dim: coefficient / STEEPNESS for dim, coefficient in target.items()}
        self.add_unit(open_gate, source, down)

    def add_constant(self, target: Terms) -> None:
        self.add_linear({Dims.ONE: 1 / CONSTANT}, target)

    def add_ramp(self, source: Terms, threshold: float, target: Terms, up: Terms) -> None:
        """Add ``relu(source - threshold) * up`` times each coefficient to the dims of `target`."""
        gate = {dim: STEEPNESS * coefficient for dim, coefficient in source.items()}
        gate[Dims.ONE] = -threshold * STEEPNESS / CONSTANT
        down = {dim: coefficient / STEEPNESS for dim, coefficient in target.items()}
        self.add_unit(gate, up, down)

    def tensors(
        self, prefix: str, attention_scale: FloatArray, mlp_scale: FloatArray
    ) -> dict[str, FloatArray]:
        """Return the projections by name; the scales ``[C]`` are what the two norms multiply by."""
        return {
            f"{prefix}.self_attn.q_proj.weight": self.query / attention_scale,
            f"{prefix}.self_attn.k_proj.weight": self.key / attention_scale,
            f"{prefix}.self_attn.v_proj.weight": self.value / attention_scale,
            f"{prefix}.self_attn.o_proj.weight": self.output,
            f"{prefix}.mlp.gate_proj.weight": self.gate / mlp_scale,
            f"{prefix}.mlp.up_proj.weight": self.up / mlp_scale,
            f"{prefix}.mlp.down_proj.weight": self.down,
        }
