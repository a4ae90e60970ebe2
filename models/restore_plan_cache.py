"""Plans already made: prompts of one shape ask for the same plan again and again."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from models.restore_plan import RestorePlan, plan_restore
from models.restore_ways import RestoreTask, Segment

_DIGITS = 2  # after the first: rates are corrected after each restore, by less than they are known


class PlanCache:
    """The plans used last, found by what was asked, its seconds rounded to three digits.

    A plan found is the one made for the first such task: its predicted times are as rough as
    the rounding.
    """

    def __init__(self, capacity: int = 256) -> None:
        """Keep so many plans."""
        self._capacity = capacity
        self._plans: OrderedDict[object, RestorePlan] = OrderedDict()

    def plan(self, segments: Sequence[Segment], task: RestoreTask) -> RestorePlan:
        """Return what `plan_restore` does, if need be by calling it."""
        ways = {id(way): way for segment in segments for way in segment.ways}
        keys = {at: _rounded(way.key) for at, way in ways.items()}
        key = (
            *(_rounded(value) for value in vars(task).values()),
            *(
                (segment.start, segment.tokens, *(keys[id(way)] for way in segment.ways))
                for segment in segments
            ),
        )
        if key not in self._plans:
            self._plans[key] = plan_restore(segments, task)
            if len(self._plans) > self._capacity:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}e}") if value else 0.0
    if isinstance(value, Mapping):
        return tuple(sorted((name, _rounded(of)) for name, of in value.items()))
    return tuple(map(_rounded, value)) if isinstance(value, tuple) else value
