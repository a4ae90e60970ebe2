"""Times of what all ranks do at once, for the profilers: every result is the same on all ranks."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from attention import Ring
from models.rates import Curve

REPEATS = 5
SLOW_S = 0.05  # what takes longer is repeated less
FEW_REPEATS = 2
SHORT_S = 1e-3  # what takes less runs several times in a row
LONGEST_RUN_S = 0.25  # a size of which one run would take longer is left out of a curve


class Stopwatch:
    """Times what all ranks do at once; every result is that of the slowest rank, on all."""

    def __init__(
        self, ring: Ring, device: torch.device, *, patience_s: float, upper: bool = False
    ) -> None:
        """Take the ring by which ranks tell each other what they measured.

        After ``patience_s``, on a machine that is busy with something else, nothing is
        repeated. With ``upper`` the upper quartiles are believed: those err to the slow side.
        """
        self._ring = ring
        self._device = device
        self._patience_s = patience_s
        self._upper = upper
        self._start_s = time.perf_counter()

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds of one run, which exchanges nothing."""

        def timed(count: int) -> float:
            self._synchronize()
            start_s = time.perf_counter()
            for _ in range(count):
                run()
            self._synchronize()
            return (time.perf_counter() - start_s) / count

        timed(1)
        count = math.ceil(SHORT_S / max(self.slowest(timed(1)), SHORT_S / 100))
        return self.quartile(lambda: timed(count))

    def collective_s(self, run: Callable[[], object]) -> float:
        """Return the seconds of one run, in which all ranks take part."""

        def timed() -> float:
            start_s = time.perf_counter()
            run()
            self._synchronize()
            return time.perf_counter() - start_s

        return self.quartile(timed)

    def quartile(self, timed: Callable[[], float]) -> float:
        """Return a quartile of what some runs say they took; the first one warms up."""
        first_s = self.slowest(timed())
        repeats = REPEATS if first_s < SLOW_S else FEW_REPEATS
        if self.slowest(time.perf_counter() - self._start_s) > self._patience_s:
            repeats = 1
        runs_s = []
        for _ in range(repeats):
            self.slowest(0.0)  # all begin together
            runs_s.append(timed())
        return self.slowest(sorted(runs_s, reverse=self._upper)[(repeats - 1) // 4])

    def of_all(self, run: Callable[[], object]) -> list[float]:
        """Return the seconds of one run on every rank; all begin together."""
        self.slowest(0.0)
        self._synchronize()
        start_s = time.perf_counter()
        run()
        self._synchronize()
        return self._gathered(time.perf_counter() - start_s)

    def slowest(self, seconds: float) -> float:
        """Return the largest of what the ranks say; they go on together."""
        return max(self._gathered(seconds))

    def _gathered(self, seconds: float) -> list[float]:
        if self._ring.size == 1:
            return [seconds]
        mine = torch.tensor([seconds], dtype=torch.float64).to(self._device)
        gathered: list[float] = self._ring.all_gather(mine).flatten().tolist()
        return gathered

    def _synchronize(self) -> None:
        # Not of the device: other threads may keep it busy on streams of their own.
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def measured_curve(
    seconds: Callable[[int], float], sizes: Sequence[int], *, per_key: bool = False
) -> Curve:
    """Measure at those sizes whose runs are short enough; all ranks stop at the same one.

    With ``per_key``, a run of n queries has n keys, and the curve is that of one.
    """
    points: list[tuple[float, float]] = []
    for size in sizes:
        if len(points) > 1:
            before, run_s = points[-1]
            growth = size / before
            run_s *= size * growth if per_key else growth
            if run_s > LONGEST_RUN_S:
                break
        points.append((size, max(seconds(size), 0.0)))
    return Curve.through(points)
