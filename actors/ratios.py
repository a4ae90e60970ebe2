"""Measured to predicted times: the last ones of each kind, whose middle is believed."""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

KEPT = 15  # of each kind


class Ratios:
    """The last ratios of measured to predicted time, by kind."""

    def __init__(self, limit: float) -> None:
        """Pass over what is above ``limit`` or below 1 / ``limit``: a stall, say."""
        self._limit = limit
        self._kept: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))

    def keep(self, kind: str, predicted_s: float | None, measured_s: float) -> None:
        """Keep one ratio; without a prediction there is none."""
        if predicted_s and 1 / self._limit <= measured_s / predicted_s <= self._limit:
            self._kept[kind].append(measured_s / predicted_s)

    def count(self, kind: str) -> int:
        """Return how many are kept of a kind."""
        return len(self._kept.get(kind, ()))

    def middle(
        self, kind: str, of: Callable[[Sequence[float]], float] = statistics.median
    ) -> float:
        """Return the middle of those of a kind, 1 where there are none."""
        kept = self._kept.get(kind)
        return of(kept) if kept else 1.0
