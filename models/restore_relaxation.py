"""The linear program behind a restore: tokens as a fluid, resources that never wait.

Of ``f_g``, the share of a group of blocks that is recomputed from token ids, and ``y_kw``, the
share of the blocks of kind k that comes back in way w:

    min  T + price * (device seconds)
    sum_w y_kw + sum_g f_g n_gk / n_k = 1       every block once
    sum over a chain of resources of their seconds <= T

The serial objective, as printed by KVPR, sends activations first and then the rest beside all
computation: ``activations + device <= T`` and ``link <= T``. Recomputing gets dearer with the
position, so the program fills groups from the first by itself; where measured costs are less
tidy, `models.restore_plan` still makes a prefix of what comes out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.restore_simulator import Resource
from models.restore_ways import ACTIVATIONS, RESOURCES, Blocks, RestoreTask

_MAX_GROUPS = 64
_TIE = 1e-6  # price of a busy second where the time is the same: nothing is done in vain


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """The optimum of the fluid; no plan is faster, but for the last layers' ends."""

    bound_s: float  # T
    recomputed: float  # blocks, of the prefix
    shares: tuple[tuple[float, ...], ...]  # of each kind's other blocks, by way


def relax(blocks: Blocks, task: RestoreTask) -> Relaxation:
    """Solve the linear program by HiGHS.

    Raises:
        RuntimeError: The solver gives up.
    """
    from scipy.optimize import linprog  # not where a machine only computes

    columns = _Columns(blocks, task)
    rows, constants_s = columns.limits()
    unit_s = float(np.max(np.abs(rows).sum(axis=1) + constants_s, initial=0.0)) or 1.0
    price = columns.device * (task.gpu_price + _TIE) + (columns.total - columns.device) * _TIE
    equal, once = columns.every_block_once()
    solved = linprog(
        [*(price / unit_s), 1.0],
        A_ub=np.column_stack([rows / unit_s, -np.ones(len(rows))]),
        b_ub=-constants_s / unit_s,
        A_eq=np.column_stack([equal, np.zeros(len(equal))]) if len(equal) else None,
        b_eq=once if len(equal) else None,
        bounds=[*((0.0, most) for most in columns.most), (0.0, None)],
        method="highs",
    )
    if solved.status != 0:
        raise RuntimeError(f"the plan of a restore was not solved: {solved.message}")
    return Relaxation(
        bound_s=float(solved.x[-1]) * unit_s,
        recomputed=blocks.least + float(solved.x[: len(columns.groups)] @ columns.groups),
        shares=columns.shares(solved.x),
    )


class _Columns:
    """The variables: what each costs if it is 1, by resource."""

    def __init__(self, blocks: Blocks, task: RestoreTask) -> None:
        self._task = task
        edges = np.unique(
            np.linspace(blocks.least, blocks.most, _MAX_GROUPS + 1).round().astype(np.int64)
        )
        self.groups = np.diff(edges)  # blocks in each
        self._in_group = np.diff(blocks.blocks_below[edges], axis=0)  # ``[groups, kinds]``
        self._kind_blocks = blocks.rest(blocks.least)
        step_s = task.step_s / task.step_tokens if task.step_tokens else 0.0
        ids_s = np.diff(blocks.ids_s[edges]) + step_s * np.diff(blocks.end[edges])
        self.ways = [
            (kind, index)
            for kind, ways in enumerate(blocks.kinds)
            for index in range(len(ways))
            if self._kind_blocks[kind]
        ]
        none = np.zeros(len(ids_s))
        self._costs: dict[Resource, NDArray[np.float64]] = {
            resource: np.concatenate(
                [
                    ids_s if resource == "device" else none,
                    [
                        blocks.kinds[kind][way].block_s(resource, blocks.kind_tokens[kind])
                        * self._kind_blocks[kind]
                        for kind, way in self.ways
                    ],
                ]
            )
            for resource in RESOURCES
        }
        self._sent_first = np.concatenate(
            [none, [blocks.kinds[k][w].name == ACTIVATIONS for k, w in self.ways]]
        )
        self.most = [1.0] * len(ids_s) + [float(blocks.useful[k][w]) for k, w in self.ways]
        self._before_s = float(blocks.ids_s[blocks.least])  # what only ids can bring back
        self._num_ways = [len(ways) for ways in blocks.kinds]

    @property
    def device(self) -> NDArray[np.float64]:
        return self._costs["device"]

    @property
    def total(self) -> NDArray[np.float64]:
        return sum(self._costs.values(), start=np.zeros(len(self.most)))

    def limits(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows and constants of ``row @ variables + constant <= T``."""
        task = self._task
        rows, constants_s = [], []
        for chain in task.chains:
            rows.append(sum((self._costs[r] for r in chain), start=np.zeros(len(self.most))))
            constants_s.append(sum(task.fixed_s.get(resource, 0.0) for resource in chain))
            if "device" in chain:
                constants_s[-1] += self._before_s + task.suffix_s
            elif "link" in chain:
                # New tokens follow layer by layer: behind the last of them one is left to
                # compute, before the first one there is one to load.
                rest = 1 - 1 / task.num_layers
                rows.append(rows[-1] - rest * self._costs["link"])
                fixed_s = constants_s[-1]
                constants_s[-1] = fixed_s + task.suffix_s / task.num_layers
                constants_s.append(fixed_s + task.suffix_s)
        if task.objective == "serial":
            link = self._costs["link"]
            rows += [self._costs["device"] + link * self._sent_first, link]
            constants_s += [
                self._before_s + task.suffix_s + task.fixed_s.get("device", 0.0),
                task.suffix_s + task.fixed_s.get("link", 0.0),
            ]
        return np.array(rows), np.array(constants_s)

    def every_block_once(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        kinds = np.flatnonzero(self._kind_blocks)
        equal = np.zeros((len(kinds), len(self.most)))
        for row, kind in enumerate(kinds):
            equal[row, : len(self.groups)] = self._in_group[:, kind] / self._kind_blocks[kind]
            for column, (of, _) in enumerate(self.ways, len(self.groups)):
                equal[row, column] = of == kind
        return equal, np.ones(len(kinds))

    def shares(self, x: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
        """Return each kind's shares by way; if all of it is recomputed, the first way's is 1."""
        shares = [[0.0] * count for count in self._num_ways]
        for (kind, way), share in zip(self.ways, x[len(self.groups) : -1], strict=True):
            shares[kind][way] = max(float(share), 0.0)
        for of_kind in shares:
            total = sum(of_kind)
            for way, share in enumerate(of_kind):
                of_kind[way] = share / total if total > _TIE else float(way == 0)
        return tuple(map(tuple, shares))
