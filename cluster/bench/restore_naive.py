"""A restore without any overlap, as a baseline: everything is fetched, then copied, then used."""

from collections.abc import Iterable, Iterator, Sequence

from actors.kv.link import PATIENCE_S, Link
from actors.kv.loader import PATIENCE_S as LOAD_PATIENCE_S
from actors.kv.loader import BlockLoader, Restoring
from actors.kv.messages import RestorePart


class OneAfterTheOther(BlockLoader):
    """Nothing is computed before everything is in the pages."""

    def begin(
        self, sequence_id: int, parts: Sequence[RestorePart], *, patience_s: float = LOAD_PATIENCE_S
    ) -> Restoring:
        """Start to restore, and return when it is done."""
        restoring = super().begin(sequence_id, parts, patience_s=patience_s)
        restoring.wait(self.layout.num_layers - 1)
        return restoring


class FetchedFirst:
    """A link of which everything has come before anything is given away."""

    def __init__(self, link: Link) -> None:
        """Take the link that moves the bytes."""
        self._link = link

    @property
    def bytes_per_s(self) -> float | None:
        """See `Link`."""
        return self._link.bytes_per_s

    @property
    def is_simulated(self) -> bool:
        """See `Link`."""
        return self._link.is_simulated

    @property
    def busy_s(self) -> float:
        """See `Link`."""
        return self._link.busy_s

    @property
    def moved_bytes(self) -> int:
        """See `Link`."""
        return self._link.moved_bytes

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = PATIENCE_S
    ) -> Iterator[memoryview]:
        """See `Link`."""
        copies = [bytearray(view) for view in self._link.fetch(ranges, patience_s)]
        for copy in copies:
            yield memoryview(copy)

    def close(self) -> None:
        """See `Link`."""
        self._link.close()
