"""Ways in which a stored prefix comes back, forced or solved, and what each is to take.

A split is what of a prefix is recomputed from token ids and what of the rest comes as layer
inputs; the others come as KV.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.kv.finder import StoredBlocks
from actors.kv.messages import RestoreChoice
from actors.restore import RestorePlanner, projected_blocks
from models.kvpr import Objective
from models.restore_plan import RestorePlan, plan_restore
from models.restore_ways import ACTIVATIONS, IDS, RestoreTask, Segment

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of blocks that come as layer inputs
# Of the prefix that is recomputed: on links that are fast, and where recomputing is as fast.
RECOMPUTED, RECOMPUTED_MUCH = (1 / 16, 1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2, 5 / 8, 3 / 4)
Problem = tuple[Sequence[Segment], RestoreTask]


@dataclass(frozen=True, order=True)
class Split:
    """A forced split, in blocks of a prefix."""

    recomputed: int  # the first blocks
    projected: int  # those behind them

    def choice(self, found: StoredBlocks, problem: Problem | None) -> RestoreChoice | None:
        """Return what the finder is to bring, with its prediction where there are rates."""
        start, tokens = found.lookup.start, _block_tokens(found)
        if self.recomputed >= len(found.blocks):
            return None
        return RestoreChoice(
            recompute_to=start + self.recomputed * tokens,
            takes_activations=self.blocks,
            predicted_s=None if problem is None else self.plan(*problem).predicted_s,
        )

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks that come as layer inputs, of a prefix that begins at position 0."""
        return frozenset(range(self.recomputed, self.recomputed + self.projected))

    def plan(self, segments: Sequence[Segment], task: RestoreTask) -> RestorePlan:
        """Return the one plan that there is if each block has no other way than this split's."""
        forced = []
        for index, segment in enumerate(segments):
            name = IDS if index < self.recomputed else None
            if name is None and index in self.blocks:
                name = ACTIVATIONS
            ways = [way for way in segment.ways if (name or way.name) == way.name]
            forced.append(dataclasses.replace(segment, ways=tuple(ways[:1])))
        return plan_restore(forced, task)


def fractions(num_blocks: int) -> list[Split]:
    """Return the splits without recomputing, from all KV to all layer inputs."""
    return [Split(0, round(fraction * num_blocks)) for fraction in FRACTIONS]


def recomputed(num_blocks: int, fraction: float, shares: Sequence[float]) -> list[Split]:
    """Return splits that recompute something, with so much of the rest as layer inputs."""
    ends = dict.fromkeys(min(max(1, round(share * num_blocks)), num_blocks) for share in shares)
    return [Split(end, round(fraction * (num_blocks - end))) for end in ends]


def forced(split: Split, planner: RestorePlanner) -> Callable[[StoredBlocks], RestoreChoice | None]:
    """Return what forces a split, and predicts what it takes."""
    return lambda found: split.choice(found, planner.problem(found))


def solved(
    planner: RestorePlanner, *, objective: Objective
) -> Callable[[StoredBlocks], RestoreChoice | None]:
    """Return what solves for KV and layer inputs alone, by one of the objectives."""

    def choose(found: StoredBlocks) -> RestoreChoice | None:
        problem = planner.problem(found)
        assert problem is not None
        segments, task = problem
        stored = [
            dataclasses.replace(segment, ways=tuple(way for way in segment.ways if way.name != IDS))
            for segment in segments
        ]
        plan = plan_restore(stored, dataclasses.replace(task, objective=objective))
        return RestoreChoice(
            recompute_to=plan.recompute_to,
            takes_activations=projected_blocks(plan, task),
            predicted_s=plan.predicted_s,
        )

    return choose


def _block_tokens(found: StoredBlocks) -> int:
    return found.blocks[0].sources[-1].end
