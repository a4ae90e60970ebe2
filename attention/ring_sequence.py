"""What every rank knows of a step's sequences before it begins: who holds how many rows of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attention.zigzag import Zigzag


@dataclass(frozen=True)
class RingSequence:
    """One sequence of a step, sharded over the ring: new tokens, and rows of earlier ones.

    The rows are of positions before all new ones, so every new query sees every
    row, on whichever rank it lies.
    """

    zigzag: Zigzag
    cached_rows: tuple[int, ...]  # by rank

    def __post_init__(self) -> None:
        if len(self.cached_rows) != self.zigzag.num_ranks or min(self.cached_rows) < 0:
            raise ValueError(
                f"a sequence over {self.zigzag.num_ranks} ranks needs as many counts of cached"
                f" rows, none negative, got {self.cached_rows}"
            )


class Slice(NamedTuple):
    """Rows of one sequence among those of several."""

    sequence: int
    first_row: int
    num_rows: int


def slices_between(counts: Sequence[int], first: int, end: int) -> Iterator[Slice]:
    """Yield what of each sequence lies between two rows of all sequences, one after another.

    ``counts`` are the sequences' rows; the first row asked for and the one past
    the last are counted over all of them.
    """
    before = 0
    for sequence, count in enumerate(counts):
        start, stop = max(first - before, 0), min(end - before, count)
        if start < stop:
            yield Slice(sequence, start, stop - start)
        before += count
