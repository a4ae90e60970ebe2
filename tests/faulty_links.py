"""Links on which something goes wrong, as tests of whoever reads from one need them.

Each takes a good link, and does harm to a share of the ranges, by a seed of its own.
`num_faults` says how many it has harmed so far: a test that saw none has tested nothing.
"""

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from actors.kv.link import PATIENCE_S, Link, LinkLost


class FaultyLink:
    """A link that passes everything on; the others say what they do instead."""

    def __init__(self, link: Link, *, seed: int = 0, share: float = 1.0) -> None:
        """Do harm to about ``share`` of the ranges."""
        self.num_faults = 0
        self._link = link
        self._share = share
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def bytes_per_s(self) -> float | None:
        return self._link.bytes_per_s

    @property
    def is_simulated(self) -> bool:
        return self._link.is_simulated

    @property
    def busy_s(self) -> float:
        return self._link.busy_s

    @property
    def moved_bytes(self) -> int:
        return self._link.moved_bytes

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = PATIENCE_S
    ) -> Iterator[memoryview]:
        return self._harm(list(ranges), patience_s)

    def close(self) -> None:
        self._link.close()

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        yield from self._link.fetch(ranges, patience_s)

    def _draw(self, below: int = 0) -> int | None:
        """Return a number below a limit where harm is to be done, else None."""
        with self._lock:
            if self._rng.random() >= self._share:
                return None
            self.num_faults += 1
            return self._rng.randrange(max(below, 1))


class DelayedLink(FaultyLink):
    """Ranges come late, each by another time."""

    def __init__(
        self, link: Link, *, max_delay_s: float = 0.02, seed: int = 0, share: float = 1.0
    ) -> None:
        """Delay each range by up to ``max_delay_s``."""
        super().__init__(link, seed=seed, share=share)
        self._max_delay_s = max_delay_s

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        for view in self._link.fetch(ranges, patience_s):
            parts = self._draw(1000)
            if parts is not None:
                time.sleep(parts / 1000 * self._max_delay_s)
            yield view


class LosingLink(FaultyLink):
    """The link is lost before a range comes, and stays so."""

    def __init__(self, link: Link, *, seed: int = 0, share: float = 1.0) -> None:
        """Lose the link at about one in 1 / ``share`` ranges."""
        super().__init__(link, seed=seed, share=share)
        self.is_lost = False

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        views = self._link.fetch(ranges, patience_s)
        for _ in ranges:
            if not self.is_lost:
                self.is_lost = self._draw() is not None
            if self.is_lost:
                raise LinkLost("this link was to be lost here")
            yield next(views)


class CorruptingLink(FaultyLink):
    """One bit of a range is another one. What lies in the arena stays as it is."""

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        for view in self._link.fetch(ranges, patience_s):
            bit = self._draw(8 * len(view)) if view else None
            if bit is None:
                yield view
                continue
            copied = bytearray(view)
            copied[bit // 8] ^= 1 << bit % 8
            yield memoryview(copied)


class ReorderingLink(FaultyLink):
    """Instead of a range another one of the same fetch and size comes, out of turn or twice."""

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        yield from self._link.fetch([self._other(each, ranges) for each in ranges], patience_s)

    def _other(self, asked: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
        others = [each for each in ranges if each[1] == asked[1] and each != asked]
        at = self._draw(len(others)) if others else None
        return asked if at is None else others[at]
