"""What becomes of a restore on one rank, by events: a link, a device and the tiers behind them.

The **link** sends one piece after another, layer by layer, each layer of a piece in the time that
it says. A piece that needs the device (activations to project) takes one of a few transfer
buffers until it is projected; without a free one the link waits. The **device** projects what has
arrived, and with the rest of its time computes what is recomputed from token ids, then layer by
layer the new tokens behind the restored ones. Of those, layer i needs layer i of all pieces. It
never idles while it could compute. **Network** and **disk** bring pieces into host memory first.

Projection goes before all other work of the device and interrupts it: kernels of two streams, or
threads of two kinds, share a device, and what frees the link is not kept waiting for a whole
prefill step. Thus link and projection do not depend on the rest, which fills the gaps they leave.

Plain numbers, no clock: the same input gives the same output.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Resource = Literal["device", "link", "network", "disk"]
# activations_first: as the paper sends them. interleaved: spread evenly among the rest of the
# layer, so that the link has something to send while the device projects.
Order = Literal["activations_first", "interleaved"]
# whole: nothing is sent before all is in host memory. piece: each piece once it is there.
Staging = Literal["whole", "piece"]

_SAME = 1e-9  # relative: layers as equal as this repeat from here on


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is loaded of one block; all of its layers cost the same."""

    link_s: float  # of one layer
    device_s: float = 0.0  # of one layer, once it has arrived
    network_s: float = 0.0  # into host memory, all layers
    disk_s: float = 0.0
    is_copied: bool = False  # what it takes of the device is no more than to be copied there

    @property
    def is_projected(self) -> bool:
        """Whether the device makes something of what has arrived."""
        return self.device_s > 0.0 and not self.is_copied


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, by the place of the piece in the order of sending."""

    late_s: Mapping[int, float] = field(default_factory=dict)  # in host memory so much later
    # Found damaged at its first layer: no more of it is sent, and this much is computed instead.
    lost: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """When what was done."""

    total_s: float
    busy_s: Mapping[Resource, float]
    loaded_s: tuple[float, ...]  # when each layer of all pieces was in the pages
    recomputed_s: float  # when the last token id was computed
    done_s: tuple[float, ...]  # when each layer of the new tokens was computed

    def idle(self, resource: Resource) -> float:
        """Return the share of the time in which a resource did nothing."""
        return max(0.0, 1.0 - self.busy_s[resource] / self.total_s) if self.total_s else 0.0


def sending_order(pieces: Iterable[Piece], order: Order, staging: Staging = "whole") -> list[Piece]:
    """Return the pieces in the order in which each layer of them is sent.

    Staged piece by piece, those go first that take least to come into host memory.
    """
    pieces = list(pieces)
    projected = [piece for piece in pieces if piece.is_projected]
    loaded = [piece for piece in pieces if not piece.is_projected]
    ordered = projected + loaded
    if order == "interleaved":
        places = [
            ((i + 0.5) / len(kind), piece)
            for kind in (projected, loaded)
            for i, piece in enumerate(kind)
        ]
        ordered = [piece for _, piece in sorted(places, key=lambda place: place[0])]
    if staging == "piece":
        ordered.sort(key=lambda piece: piece.network_s + piece.disk_s)
    return ordered


def simulate(
    pieces: Sequence[Piece],
    num_layers: int,
    *,
    recompute_s: float = 0.0,
    suffix_s: float = 0.0,
    fixed_s: Mapping[Resource, float] | None = None,
    buffers: int = 2,
    staging: Staging = "whole",
    recompute_waits: bool = False,
    faults: Faults | None = None,
) -> Execution:
    """Execute a plan on one rank.

    Args:
        pieces: Those of this rank, in the order in which each layer is sent.
        num_layers: Layers of the model.
        recompute_s: Device seconds of the tokens recomputed from their ids.
        suffix_s: Device seconds of the new tokens, all layers.
        fixed_s: Seconds for which each resource has other work before this.
        buffers: Pieces under way that the device has yet to project.
        staging: When what is not in host memory can be sent.
        recompute_waits: The device too begins only when all is in host memory.
        faults: Pieces that come late or not at all.
    """
    if num_layers < 1 or buffers < 1:
        raise ValueError(f"layers and buffers must be >= 1, got {num_layers} and {buffers}")
    fixed: dict[Resource, float] = {"device": 0.0, "link": 0.0, "network": 0.0, "disk": 0.0}
    fixed |= fixed_s or {}
    faults = faults or Faults()
    staged_s, busy_s = _stage(pieces, fixed, faults, staging)
    link = _Link(pieces, buffers, fixed["link"], staged_s, frozenset(faults.lost))
    loaded_s = link.run(num_layers)
    device = _Gaps(link.projected)
    begin_s = max(staged_s, default=0.0) if recompute_waits else 0.0
    begin_s = max(begin_s, device.finish(0.0, fixed["device"]))
    done_s = recomputed_s = device.finish(begin_s, recompute_s)
    for index, lost_s in sorted(faults.lost.items()):
        done_s = device.finish(max(done_s, link.first_layer_s[index]), lost_s)
    layers_s = []
    for layer_loaded_s in loaded_s:
        done_s = device.finish(max(done_s, layer_loaded_s), suffix_s / num_layers)
        layers_s.append(done_s)
    busy_s["link"] = fixed["link"] + link.busy_s
    busy_s["device"] = (
        fixed["device"] + recompute_s + suffix_s + device.busy_s + sum(faults.lost.values())
    )
    return Execution(
        total_s=done_s,
        busy_s=busy_s,
        loaded_s=tuple(loaded_s),
        recomputed_s=recomputed_s,
        done_s=tuple(layers_s),
    )


def _stage(
    pieces: Sequence[Piece], fixed: Mapping[Resource, float], faults: Faults, staging: Staging
) -> tuple[list[float], dict[Resource, float]]:
    """When each piece is in host memory, and how long network and disk were busy."""
    network_s, disk_s = fixed["network"], fixed["disk"]
    staged_s = []
    for index, piece in enumerate(pieces):
        there_s = 0.0
        if piece.disk_s:
            there_s = disk_s = disk_s + piece.disk_s
        if piece.network_s:
            there_s = network_s = max(network_s, there_s) + piece.network_s
        staged_s.append(there_s + faults.late_s.get(index, 0.0))
    if staging == "whole":
        staged_s = [max(staged_s)] * len(staged_s) if staged_s else []
    busy_s: dict[Resource, float] = {
        "network": fixed["network"] + sum(piece.network_s for piece in pieces),
        "disk": fixed["disk"] + sum(piece.disk_s for piece in pieces),
    }
    return staged_s, busy_s


class _Link:
    """The link and the projections behind it; layers that repeat are counted, not walked."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        buffers: int,
        free_s: float,
        staged_s: Sequence[float],
        lost: frozenset[int],
    ) -> None:
        self.busy_s = 0.0
        self.first_layer_s: dict[int, float] = {}  # when a lost piece was found out
        self.projected: list[NDArray[np.float64]] = []  # ``[jobs, (start, end)]`` of some layers
        self._pieces = pieces
        self._staged_s = staged_s
        self._lost = lost
        self._free_s = free_s
        self._consumed_s = [0.0] * buffers  # when the last ones to use each buffer left it

    def run(self, num_layers: int) -> list[float]:
        """Return when each layer was loaded and projected."""
        loaded_s: list[float] = []
        before: list[float] | None = None
        whole = [(p.link_s, p.device_s) for i, p in enumerate(self._pieces) if i not in self._lost]
        while len(loaded_s) < num_layers:
            began_s = self._free_s
            loaded_s.append(self._layer(whole) if loaded_s else self._first_layer())
            took_s = self._free_s - began_s
            # How far projection is behind the link is all that the next layer depends on.
            behind = [max(at_s - self._free_s, 0.0) for at_s in self._consumed_s]
            if len(loaded_s) > 1 and before is not None and _same(before, behind, took_s):
                self._repeat(loaded_s, num_layers - len(loaded_s), took_s)
            before = behind
        return loaded_s

    def _first_layer(self) -> float:
        """Pieces may still be on their way into host memory, or turn out to be damaged."""
        loaded_s = 0.0
        for index, piece in enumerate(self._pieces):
            self._free_s = max(self._free_s, self._staged_s[index])
            if index in self._lost:
                self._free_s += piece.link_s
                self.busy_s += piece.link_s
                self.first_layer_s[index] = self._free_s
            else:
                loaded_s = self._layer([(piece.link_s, piece.device_s)])
        return loaded_s

    def _layer(self, costs: Sequence[tuple[float, float]]) -> float:
        jobs = []
        free_s, consumed_s = self._free_s, self._consumed_s
        for link_s, device_s in costs:
            if device_s:
                free_s = max(free_s, consumed_s[0]) + link_s
                start_s = max(free_s, consumed_s[-1])
                jobs.append((start_s, start_s + device_s))
                consumed_s = [*consumed_s[1:], start_s + device_s]
            else:
                free_s += link_s
        if jobs:
            self.projected.append(np.array(jobs))
        self.busy_s += sum(link_s for link_s, _ in costs)
        self._free_s, self._consumed_s = free_s, consumed_s
        return max(free_s, consumed_s[-1]) if costs else 0.0  # nothing is there from the start

    def _repeat(self, loaded_s: list[float], times: int, took_s: float) -> None:
        shifts_s = took_s * np.arange(1, times + 1)
        if self.projected and times:
            repeated = self.projected[-1][None] + shifts_s[:, None, None]
            self.projected.append(repeated.reshape(-1, 2))
        self.busy_s += times * sum(
            piece.link_s for i, piece in enumerate(self._pieces) if i not in self._lost
        )
        loaded_s.extend((loaded_s[-1] + shifts_s).tolist())
        self._free_s += times * took_s


def _same(before: Sequence[float], behind: Sequence[float], took_s: float) -> bool:
    return all(
        math.isclose(a, b, abs_tol=_SAME * took_s) for a, b in zip(before, behind, strict=True)
    )


class _Gaps:
    """A device's time between projections, which other work fills."""

    def __init__(self, projected: Sequence[NDArray[np.float64]]) -> None:
        jobs = np.concatenate(projected) if projected else np.zeros((0, 2))
        self._starts: list[float] = jobs[:, 0].tolist()
        self._ends: list[float] = jobs[:, 1].tolist()
        lengths = (jobs[:, 1] - jobs[:, 0]).tolist()
        self._before: list[float] = [0.0, *itertools.accumulate(lengths)]  # projecting, by job
        self._gaps = [s - b for s, b in zip(self._starts, self._before, strict=False)]
        self.busy_s = self._before[-1]

    def finish(self, begin_s: float, seconds: float) -> float:
        """Return when work of so many seconds is done that begins no sooner than ``begin_s``."""
        if not seconds:
            return begin_s
        job = bisect.bisect_right(self._starts, begin_s)
        in_job = job > 0 and begin_s < self._ends[job - 1]
        gap_s = self._gaps[job - 1] if in_job else begin_s - self._before[job]
        gap_s += seconds
        return gap_s + self._before[bisect.bisect_left(self._gaps, gap_s)]
