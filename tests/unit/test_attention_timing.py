"""Parts of a step are told by the clock that is asked for."""

import torch

from attention.timing import PartTimer


def test_parts_add_up_by_the_given_clock() -> None:
    """A thread's own clock leaves out what others compute meanwhile on its core."""
    times_s = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    timer = PartTimer(torch.device("cpu"), clock=lambda: next(times_s))

    for part in ("project", "link", "project"):
        with timer(part):
            pass

    assert timer.seconds() == {"project": 3.0, "link": 0.5}
