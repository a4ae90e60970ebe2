"""Plans of restores: which block of a prompt comes back how.

`plan_restore` solves the linear program (`models.restore_relaxation`), rounds its optimum to
blocks and looks around it for better: what it compares are the times of the simulator
(`models.restore_simulator`), which knows what the program does not, as pieces, buffers, latencies
and the last layer's end. The pure methods are compared too, so by its own model a plan is never
worse than any of them. (The serial objective is compared by its own formula, as printed; what is
predicted is still the execution.) Pure functions: no tensors, no clock.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from models.kvpr import Objective
from models.restore_relaxation import relax
from models.restore_simulator import Execution, Piece, Resource, Staging, sending_order, simulate
from models.restore_ways import ACTIVATIONS, IDS, KV, Blocks, RestoreTask, Segment, Way

_MAX_PIECES = 64  # of a simulation; longer prompts are simulated in larger pieces
_FEW = 128  # choices that are all tried
_SHORT = 16  # blocks, of which one is much: the search begins at more places
_BETTER = 1 - 1e-9

_Counts = tuple[tuple[int, ...], ...]  # of each kind, blocks by way
_Choice = tuple[int, _Counts]  # blocks recomputed, and what becomes of the others


@dataclass(frozen=True, kw_only=True)
class Part:
    """Blocks in a row that come back in one way."""

    start: int
    tokens: int
    way: str
    tier: str


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """What to do, and what it is expected to take."""

    parts: tuple[Part, ...]  # consecutive, every token once; ids only as the first
    recompute_to: int  # position where recomputing from token ids ends
    predicted_s: float  # until the new tokens behind it are computed
    bound_s: float  # optimum of the linear program, of resources that never wait
    busy_s: Mapping[Resource, float]  # of each rank's
    device_idle: float  # share of the predicted time
    link_idle: float
    alternatives_s: Mapping[str, float]  # predicted of pure methods: "ids", "kv", ...
    objective: Objective

    def tokens(self) -> dict[tuple[str, str], int]:
        """Return the tokens by way and tier."""
        sums: dict[tuple[str, str], int] = {}
        for part in self.parts:
            key = part.way, part.tier
            sums[key] = sums.get(key, 0) + part.tokens
        return sums


def plan_restore(segments: Sequence[Segment], task: RestoreTask) -> RestorePlan:
    """Return the plan that restores consecutive segments soonest.

    Raises:
        ValueError: Segments are not consecutive whole blocks, or one cannot come back.
    """
    blocks = Blocks(segments, task.block_tokens)
    search = _Search(blocks, task)
    relaxed = relax(blocks, task)
    pure = {name: search.pure(name) for name in search.names()}
    alternatives_s = {name: search.execute(choice).total_s for name, choice in pure.items()}
    starts = [choice for choice in pure.values() if search.is_useful(choice)]
    below = min(math.floor(relaxed.recomputed), blocks.most)
    for recomputed in (below, min(below + 1, blocks.most)):
        starts.append(search.rounded(recomputed, relaxed.shares))
    best = search.best([*starts, *search.all_of_few()])
    if blocks.count > _SHORT:
        starts = []
    best = search.best([search.descend(choice) for choice in (best, *starts)])
    execution = search.execute(best)
    parts = tuple(_parts(blocks, best))
    return RestorePlan(
        parts=parts,
        recompute_to=int(blocks.end[best[0]]),
        predicted_s=execution.total_s,
        bound_s=relaxed.bound_s,
        busy_s=execution.busy_s,
        device_idle=execution.idle("device"),
        link_idle=execution.idle("link"),
        alternatives_s=alternatives_s,
        objective=task.objective,
    )


class _Search:
    """Choices and their prices."""

    def __init__(self, blocks: Blocks, task: RestoreTask) -> None:
        self._blocks = blocks
        self._task = task
        self._executions: dict[_Choice, Execution] = {}

    def execute(self, choice: _Choice) -> Execution:
        """Simulate a choice."""
        if choice not in self._executions:
            task = self._task
            waits = any(task.together(tier, "link") for tier in ("network", "disk"))
            staging: Staging = "whole" if waits else "piece"
            self._executions[choice] = simulate(
                sending_order(self._pieces(choice), task.order, staging),
                task.num_layers,
                recompute_s=self._recompute_s(choice[0]),
                suffix_s=task.suffix_s,
                fixed_s=task.fixed_s,
                buffers=task.buffers,
                staging=staging,
                recompute_waits=any(task.together(t, "device") for t in ("network", "disk")),
            )
        return self._executions[choice]

    def price_s(self, choice: _Choice) -> float:
        """Return what is to be as small as possible."""
        execution = self.execute(choice)
        total_s = execution.total_s
        if self._task.objective == "serial":
            total_s = self._serial_s(choice)
        return total_s + self._task.gpu_price * execution.busy_s["device"]

    def best(self, choices: Sequence[_Choice]) -> _Choice:
        """Return the cheapest, the first of equals."""
        best = choices[0]
        for choice in choices[1:]:
            if self.price_s(choice) < self.price_s(best) * _BETTER:
                best = choice
        return best

    def descend(self, choice: _Choice) -> _Choice:
        """Walk to cheaper choices in steps of some blocks, then of fewer, until none is left."""
        step = 1 << max(self._blocks.count // 16, 1).bit_length() - 1
        while step:
            better = self.best([choice, *self._around(choice, step)])
            step, choice = (step // 2 if better == choice else step), better
        return choice

    def all_of_few(self) -> Iterator[_Choice]:
        """Yield all useful choices if they are few: of some blocks, the best need not be near."""
        blocks = self._blocks
        ends = range(blocks.least, blocks.most + 1)
        ways = [sum(useful) for useful in blocks.useful]
        if len(ends) > _FEW:
            return
        numbers = [
            [math.comb(n + w - 1, n) for n, w in zip(blocks.rest(end), ways, strict=True) if n]
            for end in ends
        ]
        if sum(map(math.prod, numbers)) > _FEW:
            return
        for end in ends:
            of_kinds = zip(blocks.rest(end), blocks.useful, strict=True)
            counts = itertools.product(*(_shared_out(n, useful) for n, useful in of_kinds))
            yield from ((end, of_each) for of_each in counts)

    def names(self) -> list[str]:
        """Return the names of all ways."""
        names = {way.name: None for ways in self._blocks.kinds for way in ways}
        return [*names, IDS] if self._blocks.most else [*names]

    def pure(self, name: str) -> _Choice:
        """Return the choice of one method wherever it is possible, else of a block's first way."""
        recomputed = self._blocks.most if name == IDS else self._blocks.least
        counts = []
        for ways, rest in zip(self._blocks.kinds, self._blocks.rest(recomputed), strict=True):
            index = next((i for i, way in enumerate(ways) if way.name == name), 0)
            counts.append(tuple(rest if i == index else 0 for i in range(len(ways))))
        return recomputed, tuple(counts)

    def is_useful(self, choice: _Choice) -> bool:
        """Whether no block comes back in a way that another of its ways beats in everything."""
        return all(
            useful or not count
            for of_kind, counts in zip(self._blocks.useful, choice[1], strict=True)
            for useful, count in zip(of_kind, counts, strict=True)
        )

    def rounded(self, recomputed: int, shares: Sequence[Sequence[float]]) -> _Choice:
        """Return whole blocks: what rounding down leaves goes where most was cut off."""
        counts = []
        for of_kind, rest in zip(shares, self._blocks.rest(recomputed), strict=True):
            exact = [share * rest for share in of_kind]
            whole = [math.floor(count + 1e-6) for count in exact]
            by_rest = sorted(range(len(exact)), key=lambda way: whole[way] - exact[way])
            for way in by_rest[: rest - sum(whole)]:
                whole[way] += 1
            counts.append(tuple(whole))
        return recomputed, tuple(counts)

    def _around(self, choice: _Choice, step: int) -> Iterator[_Choice]:
        recomputed, counts = choice
        ways = max(map(len, counts), default=0)
        for target in (recomputed - step, recomputed + step):
            if self._blocks.least <= target <= self._blocks.most:
                moved = dict.fromkeys(self._recompute(choice, target, way) for way in range(ways))
                yield from moved
        for kind, of_kind in enumerate(counts):
            for source, count in enumerate(of_kind):
                for target, useful in enumerate(self._blocks.useful[kind]):
                    if useful and target != source and count:
                        moved_blocks = min(step, count)
                        changed = list(of_kind)
                        changed[source] -= moved_blocks
                        changed[target] += moved_blocks
                        yield recomputed, (*counts[:kind], tuple(changed), *counts[kind + 1 :])

    def _recompute(self, choice: _Choice, target: int, first_way: int) -> _Choice:
        """Move the end of recomputing; blocks leave, or come to, ``first_way`` before others."""
        counts = []
        rests = self._blocks.rest(target)
        for kind, (of_kind, rest) in enumerate(zip(choice[1], rests, strict=True)):
            changed = list(of_kind)
            ways = [(first_way + i) % len(changed) for i in range(len(changed))]
            ways = [way for way in ways if self._blocks.useful[kind][way]] or ways
            more = rest - sum(changed)
            if more > 0:
                changed[ways[0]] += more
            for way in ways:
                less = min(max(-more, 0), changed[way])
                changed[way] -= less
                more += less
            counts.append(tuple(changed))
        return target, tuple(counts)

    def _recompute_s(self, recomputed: int) -> float:
        tokens = int(self._blocks.end[recomputed]) - self._blocks.start
        steps = math.ceil(tokens / (self._task.step_tokens or max(tokens, 1)))
        return float(self._blocks.ids_s[recomputed]) + steps * self._task.step_s

    def _loads(self, choice: _Choice) -> Iterator[tuple[Way, int, int]]:
        """Ways with their blocks, and the tokens of one."""
        for kind, counts in enumerate(choice[1]):
            for way, count in zip(self._blocks.kinds[kind], counts, strict=True):
                if count:
                    yield way, count, self._blocks.kind_tokens[kind]

    def _pieces(self, choice: _Choice) -> list[Piece]:
        """Return the pieces of the fullest rank, joined where they are many."""
        ranks = self._task.num_ranks
        if ranks == 1 and self._blocks.count <= _MAX_PIECES:
            kinds, kind_tokens = self._blocks.kind, self._blocks.kind_tokens
            ways = _ways(self._blocks, choice)
            return [self._piece(way, kind_tokens[kinds[block]], 1.0) for block, way in ways]
        loads = [
            (way, math.ceil(count / ranks), tokens) for way, count, tokens in self._loads(choice)
        ]
        joined = math.ceil(sum(count for _, count, _ in loads) / _MAX_PIECES)
        pieces = []
        for way, count, tokens in loads:
            number = math.ceil(count / joined)
            # A rank's piece is that of a block; what a way costs is spread over all ranks.
            size = count * ranks / number
            pieces += [self._piece(way, tokens, size)] * number
        return pieces

    def _piece(self, way: Way, tokens: int, blocks: float) -> Piece:
        layers = self._task.num_layers
        return Piece(
            link_s=way.block_s("link", tokens) * blocks / layers,
            device_s=way.block_s("device", tokens) * blocks / layers,
            network_s=way.block_s("network", tokens) * blocks,
            disk_s=way.block_s("disk", tokens) * blocks,
            is_copied=way.name == KV,
        )

    def _serial_s(self, choice: _Choice) -> float:
        """Activations, then computing beside the rest of the link, then the new tokens."""
        task, first_s, link_s, project_s = self._task, 0.0, 0.0, 0.0
        for way, count, tokens in self._loads(choice):
            link_s += way.block_s("link", tokens) * count
            project_s += way.block_s("device", tokens) * count
            first_s += way.block_s("link", tokens) * count * (way.name == ACTIVATIONS)
        device_s = project_s + self._recompute_s(choice[0]) + task.fixed_s.get("device", 0.0)
        link_s += task.fixed_s.get("link", 0.0)
        busy_s = self.execute(choice).busy_s
        chains_s = [
            sum(busy_s[resource] for resource in chain)
            for chain in task.chains
            if "device" not in chain
        ]
        return max(max(first_s + device_s, link_s) + task.suffix_s, max(chains_s, default=0.0))


def _shared_out(count: int, useful: Sequence[bool]) -> Iterator[tuple[int, ...]]:
    """Yield all ways to share blocks out among useful ones."""
    if not useful:
        yield ()
    elif not any(useful[1:]):
        yield count if useful[0] else 0, *(0 for _ in useful[1:])
    else:
        for first in range(count + 1 if useful[0] else 1):
            for rest in _shared_out(count - first, useful[1:]):
                yield first, *rest


def _ways(blocks: Blocks, choice: _Choice) -> Iterator[tuple[int, Way]]:
    """Give blocks their ways in the order of positions, a kind's ways one after another."""
    recomputed, counts = choice
    left = [[*of_kind] for of_kind in counts]
    for block in range(recomputed, blocks.count):
        kind = blocks.kind[block]
        index = next(i for i, count in enumerate(left[kind]) if count)
        left[kind][index] -= 1
        yield block, blocks.kinds[kind][index]


def _parts(blocks: Blocks, choice: _Choice) -> Iterator[Part]:
    """Join neighbours that come back in the same way."""
    each = [(IDS, "")] * choice[0]
    each += [(way.name, way.tier) for _, way in _ways(blocks, choice)]
    first = 0
    for (way, tier), run in itertools.groupby(each):
        last = first + sum(1 for _ in run)
        start, end = int(blocks.end[first]), int(blocks.end[last])
        yield Part(start=start, tokens=end - start, way=way, tier=tier)
        first = last
