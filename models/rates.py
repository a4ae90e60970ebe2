"""What a model's layer costs by its shape, and what a cluster was measured to do in a second.

`models.cost` turns the two into prices. All are plain numbers: no tensors, no clock.
Units: seconds, bytes, floating-point operations, tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

from models.config import ModelConfig

BYTES_PER_S_LIMIT = 1e15  # of a law: what takes no time that can be measured


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One layer as one GPU computes it: under tensor parallelism, that GPU's share of it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear_flops_per_token: float  # of one layer, all but attention
    linear_weight_bytes: float  # of one layer
    kv_element_bytes: float  # of q, k and v, cached and under way
    out_element_bytes: float = 4.0  # of a partial output under way; its LSE is always float32

    @property
    def q_bytes_per_token(self) -> float:
        """One layer's queries."""
        return self.num_heads * self.head_dim * self.kv_element_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """One layer's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * self.kv_element_bytes

    @property
    def partial_bytes_per_token(self) -> float:
        """One layer's partial: an output and one LSE a head (the paper's D + 1 counts one LSE)."""
        return self.num_heads * (self.head_dim * self.out_element_bytes + 4)

    @property
    def attention_flops_per_pair(self) -> float:
        """Of one query with one key, all heads: two products of head_dim each."""
        return 4.0 * self.num_heads * self.head_dim

    @property
    def kv_projection_share(self) -> float:
        """The share of a layer's linear work that only makes keys and values."""
        return (
            4 * self.hidden_size * self.num_kv_heads * self.head_dim / self.linear_flops_per_token
        )


def model_shape(config: ModelConfig, element_bytes: int) -> ModelShape:
    """Return the shape of a model whose weights, keys and values take ``element_bytes`` each."""
    E, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    mlp = (3 if config.gated_mlp else 2) * E * config.intermediate_size
    weights = E * config.head_dim * (heads + config.num_heads) + mlp
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=E,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        linear_flops_per_token=2.0 * weights,
        linear_weight_bytes=float(weights * element_bytes),
        kv_element_bytes=element_bytes,
    )


@dataclass(frozen=True)
class Curve:
    """A rising piecewise-linear law through measured points ``(x, seconds)``.

    Left of the first point it is level, right of the last it goes on as steeply
    as between the last two. One point alone is a law through the origin.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> "Curve":
        """Return the curve of measured points; where noise makes it fall, it stays level."""
        rising: list[tuple[float, float]] = []
        for x, seconds in sorted(points):
            rising.append((x, max(seconds, rising[-1][1] if rising else 0.0)))
        return cls(tuple(rising))

    @classmethod
    def proportional(cls, seconds_per_unit: float) -> "Curve":
        """Return the law ``seconds_per_unit * x``."""
        return cls(((0.0, 0.0), (1.0, seconds_per_unit)))

    def __post_init__(self) -> None:
        xs, seconds = zip(*self.points, strict=True) if self.points else ((), ())
        if not xs or not all(0 <= value < math.inf for value in (*xs, *seconds)):
            raise ValueError(f"a curve needs points of finite numbers >= 0, got {self.points}")
        if list(xs) != sorted(set(xs)) or list(seconds) != sorted(seconds):
            raise ValueError(f"a curve must rise, got {self.points}")

    def __call__(self, x: float) -> float:
        """Return the seconds at ``x``."""
        points = self.points
        if len(points) == 1:
            return points[0][1] * x / points[0][0]
        if x <= points[0][0]:
            return points[0][1]
        right = next((i for i, point in enumerate(points) if x <= point[0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(right, 1) - 1], points[max(right, 1)]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def scaled(self, factor: float) -> "Curve":
        """Return the law of what takes ``factor`` times as long."""
        return Curve(tuple((x, seconds * factor) for x, seconds in self.points))

    @property
    def last_slope(self) -> float:
        """Seconds per unit of x beyond the last point."""
        x = self.points[-1][0]
        return self(x + 1) - self(x)


@dataclass(frozen=True)
class Affine:
    """The time of a message or a copy: ``latency_s + bytes / bytes_per_s``."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (0 <= self.latency_s < math.inf and self.bytes_per_s > 0):
            raise ValueError(f"latency must be finite and >= 0, bytes per second > 0: {self}")

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> "Affine":
        """Return the law through two measured points ``(bytes, seconds)``.

        Where noise makes the larger one the quicker, both take as long as the smaller.
        """
        (small_bytes, small_s), (large_bytes, large_s) = small, large
        more_bytes = large_bytes - small_bytes
        bytes_per_s = more_bytes / max(large_s - small_s, more_bytes / BYTES_PER_S_LIMIT)
        return cls(max(small_s - small_bytes / bytes_per_s, 0.0), bytes_per_s)

    def scaled(self, factor: float) -> "Affine":
        """Return the law of what takes ``factor`` times as long."""
        return Affine(self.latency_s * factor, self.bytes_per_s / factor)

    def __call__(self, num_bytes: float) -> float:
        """Return the seconds for so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates that a file can hold: numbers, laws and curves."""

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and names."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote.

        Raises:
            ValueError: The values are not rates: a name is missing or unknown, a number is none.
        """
        kinds = get_type_hints(cls)
        if not isinstance(values, Mapping) or set(values) != set(kinds):
            raise ValueError("these are not the names of rates")
        return cls(**{name: _READERS[kind](values[name]) for name, kind in kinds.items()})


@dataclass(frozen=True, kw_only=True)
class Rates(Measured):
    """What `actors.profiler` measured on a ring, under the load that a step puts on it.

    Attention is told in seconds per key as a function of the number of queries:
    where these are few, a key costs the time to read it, however many queries
    look at it.
    """

    linear: Curve  # tokens -> s: one layer, all but attention
    causal_key: Curve  # queries -> s a key: as many keys, each query sees those before it
    dense_key: Curve  # queries -> s a key: all see all, keys in one piece
    paged_key: Curve  # queries -> s a key: all see all, keys in pages
    call_s: float  # one call of the attention kernel, however small
    merge: Curve  # rows -> s: one partial into the sum
    store: Affine  # one layer's new keys and values into pages
    gather: Affine  # cached keys and values out of pages, to be sent
    hop: Affine  # from each rank to the next, all at once
    returns: Affine  # partials back: of one round, or (not streamed) All2All of all rounds
    collective: Affine  # all_gather; the bytes of one rank's part
    overlap: float  # share of a transfer that costs time though computation could hide it, 0 to 1
    round_s: float = 0.0  # further cost of a round with another rank's part; it hides nothing
    jitter: float = 0.0  # share of its work by which the slowest rank is later than the mean
    step_s: float = 0.0  # of a step outside the layers: embedding, logits, sampling
    dispatch_s: float = 0.0  # of a plan: to all ranks, and their results back

    def __post_init__(self) -> None:
        values = (self.call_s, self.round_s, self.jitter, self.step_s, self.dispatch_s)
        if not all(0 <= value < math.inf for value in values) or not 0 <= self.overlap <= 1:
            raise ValueError(f"rates must be finite and >= 0, overlap at most 1: {self}")

    def flops_per_s(self, model: ModelShape) -> float:
        """Return what attention achieves on many queries: the paper's C, of one GPU."""
        return model.attention_flops_per_pair / max(self.dense_key.last_slope, 1e-30)


def _read_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"not a number: {value!r}")
    return float(value)


def _read_affine(value: Any) -> Affine:
    if not isinstance(value, Mapping) or set(value) != {"latency_s", "bytes_per_s"}:
        raise ValueError(f"not a latency and a rate: {value!r}")
    return Affine(_read_number(value["latency_s"]), _read_number(value["bytes_per_s"]))


def _read_curve(value: Any) -> Curve:
    points = value.get("points") if isinstance(value, Mapping) else None
    if not isinstance(points, list | tuple) or any(
        not isinstance(point, list | tuple) or len(point) != 2 for point in points
    ):
        raise ValueError(f"not the points of a curve: {value!r}")
    return Curve(tuple((_read_number(x), _read_number(y)) for x, y in points))


def _read_affine_or_none(value: Any) -> Affine | None:
    return None if value is None else _read_affine(value)


_READERS: dict[Any, Callable[[Any], Any]] = {
    float: _read_number,
    Affine: _read_affine,
    Affine | None: _read_affine_or_none,
    Curve: _read_curve,
}
