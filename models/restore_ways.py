"""The ways in which the blocks of a prompt can come back, and a table of the blocks.

Blocks of a size that can come back in the same ways are of one **kind**: how many of each kind are
restored in which way is all that matters for the time, so plans are made of such counts.
Token ids are not stored and count apart: what is recomputed from them is a prefix.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.kvpr import Objective
from models.restore_simulator import Order, Resource

RESOURCES: tuple[Resource, ...] = ("device", "link", "network", "disk")
Chains = tuple[tuple[Resource, ...], ...]
EACH_ALONE: Chains = tuple((resource,) for resource in RESOURCES)
# Every layer of every block is staged before the second layer of any is sent, so even where
# blocks are sent as they come, staging hides behind no more than one layer.
STAGED_FIRST: Chains = (("device",), ("network", "link"), ("disk", "link"))
IDS = "ids"
ACTIVATIONS = "activations"
KV = "kv"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to bring a token back.

    On a ring of N ranks these are the seconds that a token adds to each rank where tokens
    are spread evenly: of a link that every rank has, 1/N of what the token takes there.
    """

    name: str  # "kv", "activations", "ids", "int8", ...
    tier: str = ""  # "host", "disk", "remote"; "" for ids
    seconds: Mapping[Resource, float]  # per token, all layers
    fixed_s: Mapping[Resource, float] = field(default_factory=dict)  # per block: latencies

    def __post_init__(self) -> None:
        costs = (*self.seconds.items(), *self.fixed_s.items())
        if not all(resource in RESOURCES and 0 <= s < math.inf for resource, s in costs):
            raise ValueError(f"seconds of {RESOURCES}, finite and >= 0, expected, got {self}")
        if self.name == IDS and any(s for resource, s in costs if resource != "device"):
            raise ValueError(f"token ids are computed, which takes the device alone, got {self}")

    def block_s(self, resource: Resource, tokens: float) -> float:
        """Return what a block of so many tokens costs."""
        return self.seconds.get(resource, 0.0) * tokens + self.fixed_s.get(resource, 0.0)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where ways are."""
        return self.name, self.tier, *self._costs_s

    def dominated_by(self, other: "Way") -> bool:
        """Whether the other way costs less of something and more of nothing."""
        own_s, others_s = self._costs_s, other._costs_s
        return own_s != others_s and all(a >= b for a, b in zip(own_s, others_s, strict=True))

    @property
    def _costs_s(self) -> tuple[float, ...]:
        kinds = self.seconds, self.fixed_s
        return tuple(of.get(resource, 0.0) for of in kinds for resource in RESOURCES)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks in a row that can all come back in the same ways."""

    start: int
    tokens: int
    ways: tuple[Way, ...]  # in order of preference, should two be equally good


@dataclass(frozen=True, kw_only=True)
class RestoreTask:
    """What a restore is part of, and how ranks execute it."""

    num_layers: int
    suffix_s: float = 0.0  # device seconds of the new tokens that follow
    fixed_s: Mapping[Resource, float] = field(default_factory=dict)  # busy before, with other work
    objective: Objective = "pipelined"
    chains: Chains = STAGED_FIRST  # the seconds of resources that wait for each other add up
    block_tokens: int = 256
    gpu_price: float = 0.0  # seconds of waiting that a second of the device is worth
    step_tokens: int | None = None  # most tokens recomputed in one step; None: all
    step_s: float = 0.0  # device seconds of a step whatever its tokens
    num_ranks: int = 1  # blocks go round the ranks
    buffers: int = 2  # transfer buffers of a rank
    order: Order = "activations_first"

    def __post_init__(self) -> None:
        if min(self.num_layers, self.block_tokens, self.num_ranks, self.buffers) < 1:
            raise ValueError(f"layers, tokens, ranks and buffers must be >= 1, got {self}")
        if min(self.suffix_s, self.gpu_price, self.step_s) < 0 or self.step_tokens == 0:
            raise ValueError(f"seconds and prices must be >= 0, got {self}")

    def together(self, first: Resource, second: Resource) -> bool:
        """Whether one of two resources waits for the other."""
        return any(first in chain and second in chain for chain in self.chains)


class Blocks:
    """The blocks of consecutive segments, counted from the first one."""

    def __init__(self, segments: Sequence[Segment], block_tokens: int) -> None:
        """Cut segments into blocks; only the last block may be shorter.

        Raises:
            ValueError: Segments leave gaps or are not of whole blocks, or a block cannot come
                back at all: without a stored form, and not at the end of a prefix of ids.
        """
        self.block_tokens = block_tokens
        self.start = segments[0].start if segments else 0
        self.kinds: list[tuple[Way, ...]] = []  # stored ways of each kind
        self.kind_tokens: list[int] = []  # of a block of each kind
        kind_of: dict[tuple[object, ...], int] = {}
        kinds: list[int] = []
        tokens: list[int] = []
        ids_s: list[float] = []  # of each block; nan: has no ids
        for segment, end in itertools.zip_longest(segments, segments[1:]):
            _check(segment, end, block_tokens)
            stored = tuple(way for way in segment.ways if way.name != IDS)
            ids = next((way for way in segment.ways if way.name == IDS), None)
            keys = tuple(way.key for way in stored)
            for at in range(0, segment.tokens, block_tokens):
                tokens.append(min(block_tokens, segment.tokens - at))
                # A short last block is of a kind of its own.
                kinds.append(kind_of.setdefault((tokens[-1], keys), len(kind_of)))
                if kinds[-1] == len(self.kinds):
                    self.kinds.append(stored)
                    self.kind_tokens.append(tokens[-1])
                ids_s.append(math.nan if ids is None else ids.block_s("device", tokens[-1]))
        self.count = len(kinds)
        self.kind = kinds
        self.end = self.start + np.cumsum([0, *tokens])  # ``[B + 1]``: where the first b end
        members = np.array(kinds, dtype=np.int64)[:, None] == np.arange(len(self.kinds))
        # ``[B + 1, kinds]``: of the first b blocks, those of each kind.
        self.blocks_below = np.concatenate(
            [np.zeros((1, len(self.kinds)), dtype=np.int64), np.cumsum(members, axis=0)]
        )
        self.most = int(np.argmax(np.isnan([*ids_s, math.nan])))  # blocks that ids can restore
        bare = [block for block, kind in enumerate(kinds) if not self.kinds[kind]]
        self.least = bare[-1] + 1 if bare else 0  # and that only they can
        if self.least > self.most:
            raise ValueError(f"block {self.least - 1} is not stored, nor all ids up to it there")
        self.ids_s = np.cumsum([0.0, *ids_s[: self.most]])  # ``[most + 1]``: the first b blocks
        # Ways that some other way of the same kind beats in everything are never chosen.
        self.useful = [
            [not any(way.dominated_by(other) for other in ways) for way in ways]
            for ways in self.kinds
        ]

    def rest(self, recomputed: int) -> list[int]:
        """Return how many of each kind there are behind the first ``recomputed`` blocks."""
        rest: list[int] = (self.blocks_below[-1] - self.blocks_below[recomputed]).tolist()
        return rest


def _check(segment: Segment, following: Segment | None, block_tokens: int) -> None:
    if segment.tokens < 1 or (following is not None and segment.tokens % block_tokens):
        raise ValueError(f"whole blocks of {block_tokens} tokens expected, got {segment}")
    if following is not None and following.start != segment.start + segment.tokens:
        raise ValueError(f"segments must follow each other, got {following} behind {segment}")
    if not segment.ways:
        raise ValueError(f"no way to bring back {segment}")
    if len({(way.name, way.tier) for way in segment.ways}) < len(segment.ways):
        raise ValueError(f"one way is there twice: {segment}")
