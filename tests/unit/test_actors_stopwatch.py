"""Which of some runs is believed, and how many there are."""

from collections.abc import Callable

import pytest
import torch

from actors.stopwatch import REPEATS, SLOW_S, Stopwatch
from attention import ThreadRanks

CPU = torch.device("cpu")


def scripted(*times_s: float) -> Callable[[], float]:
    """Return runs that say they took these times, the last one for ever."""
    left = list(times_s)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(("upper", "expected_s"), [(False, 2e-3), (True, 4e-3)])
def test_a_quartile_is_believed(upper: bool, expected_s: float) -> None:
    """The first run warms up; of the five that follow neither the best nor the worst counts."""
    times_s = [9e-3, 5e-3, 1e-3, 3e-3, 2e-3, 4e-3]
    assert len(times_s) == 1 + REPEATS
    with ThreadRanks(1) as ranks:
        watch = ranks.run(lambda ring: Stopwatch(ring, CPU, patience_s=60.0, upper=upper))[0]

        assert watch.quartile(scripted(*times_s)) == expected_s


@pytest.mark.parametrize(
    ("first_s", "patience_s", "expected_s"), [(2 * SLOW_S, 60.0, 2.0), (1e-3, 0.0, 1.0)]
)
def test_what_is_slow_is_repeated_less(
    first_s: float, patience_s: float, expected_s: float
) -> None:
    """Two runs of what takes long, one where patience is over."""
    with ThreadRanks(1) as ranks:
        watch = ranks.run(lambda ring: Stopwatch(ring, CPU, patience_s=patience_s, upper=True))[0]

        assert watch.quartile(scripted(first_s, 1.0, 2.0, 3.0)) == expected_s


def test_the_slowest_rank_counts_on_all() -> None:
    """They must decide alike, and a step has ended when the last rank has."""
    with ThreadRanks(3) as ranks:
        slowest = ranks.run(
            lambda ring: Stopwatch(ring, CPU, patience_s=60.0).quartile(
                scripted(1e-3 * (1 + ring.rank))
            )
        )

    assert slowest == [3e-3] * 3
