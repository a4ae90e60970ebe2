"""Ranges never overlap, and what is given back can be given again."""

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.kv.extents import Extents

UNITS = 24  # of 64 bytes


class ExtentsAgainstBits(RuleBasedStateMachine):
    """The naive model is one flag for each 64 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(UNITS * 64 + 63)
        self.taken = [False] * UNITS
        self.given: list[tuple[int, int]] = []

    @rule(size_bytes=st.integers(1, UNITS * 64 + 64))
    def allocate(self, size_bytes: int) -> None:
        units = -(-size_bytes // 64)
        runs = "".join("x" if each else "." for each in self.taken).split("x")
        fits = any(len(run) >= units for run in runs)

        offset = self.extents.allocate(size_bytes)

        assert (offset is not None) == fits
        if offset is not None:
            at = offset // 64
            assert offset % 64 == 0
            assert not any(self.taken[at : at + units])
            assert len(self.taken[at : at + units]) == units
            # Best fit: no free run that would do is shorter.
            end = at + units
            while end < UNITS and not self.taken[end]:
                end += 1
            assert end - at == min(len(run) for run in runs if len(run) >= units)
            self.taken[at : at + units] = [True] * units
            self.given.append((offset, size_bytes))

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset, size_bytes = self.given.pop(data.draw(st.integers(0, len(self.given) - 1)))
        units = -(-size_bytes // 64)

        self.extents.free(offset, size_bytes)

        self.taken[offset // 64 : offset // 64 + units] = [False] * units

    @invariant()
    def agrees(self) -> None:
        self.extents.check_invariants()
        assert self.extents.free_bytes == 64 * self.taken.count(False)


ExtentsAgainstBits.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestExtentsAgainstBits = ExtentsAgainstBits.TestCase


def test_what_was_not_given_cannot_be_freed() -> None:
    """A range freed twice would be given to two pieces at once."""
    extents = Extents(1024)
    offset = extents.allocate(128)
    assert offset is not None
    with pytest.raises(ValueError, match="freed"):
        extents.free(offset, 256)
    extents.free(offset, 128)
    with pytest.raises(ValueError, match="freed"):
        extents.free(offset, 128)
    with pytest.raises(ValueError, match="at least 1 byte"):
        extents.allocate(0)


def test_many_extents_stay_fast() -> None:
    """An arena of 64 GiB has tens of thousands of pieces; each reserve allocates."""
    extents = Extents(40_000 * 64)
    offsets = [extents.allocate(64) for _ in range(40_000)]
    for offset in offsets[::2]:  # as fragmented as can be
        assert offset is not None
        extents.free(offset, 64)

    begin_s = time.perf_counter()
    for _ in range(2000):
        offset = extents.allocate(64)
        assert offset is not None
        extents.free(offset, 64)
    took_s = time.perf_counter() - begin_s

    assert took_s / 2000 < 1e-3
