"""Which byte ranges of an arena are free.

Best fit over ranges aligned to 64 bytes; neighbours that are both free become one.
"""

from bisect import bisect_left, insort

from actors.kv.pieces import ALIGNMENT


def aligned(size_bytes: int) -> int:
    """Return the bytes that a range of this size takes."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Extents:
    """Free and allocated ranges of ``[0, capacity_bytes)``. Not thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        """All is free at first; a last part shorter than 64 bytes is never given."""
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self.free_bytes = 0
        self._allocated: dict[int, int] = {}  # offset -> size, of what is given
        self._free: dict[int, int] = {}  # offset -> size, of each free range
        self._free_ends: dict[int, int] = {}  # end of a free range -> its offset
        self._by_size: list[tuple[int, int]] = []  # (size, offset) of free ranges, sorted
        if self.capacity_bytes > 0:
            self._add_free(0, self.capacity_bytes)

    @property
    def allocated(self) -> dict[int, int]:
        """Offset and bytes, rounded up to 64, of each range that is given."""
        return dict(self._allocated)

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a range of so many bytes, or None where no free range is as large.

        Raises:
            ValueError: The size is not positive.
        """
        if size_bytes < 1:
            raise ValueError(f"a range must have at least 1 byte, got {size_bytes}")
        size = aligned(size_bytes)
        at = bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        found_size, offset = self._by_size[at]
        self._remove_free(offset)
        if found_size > size:
            self._add_free(offset + size, found_size - size)
        self._allocated[offset] = size
        return offset

    def free(self, offset: int, size_bytes: int) -> None:
        """Take back a range that `allocate` gave.

        Raises:
            ValueError: No range of this size was given at this offset.
        """
        size = aligned(size_bytes)
        if self._allocated.get(offset) != size:
            raise ValueError(
                f"a range of {size} bytes at offset {offset} was freed, but what is allocated"
                f" there is {self._allocated.get(offset, 0)} bytes"
            )
        del self._allocated[offset]
        before = self._free_ends.get(offset)
        if offset + size in self._free:
            size += self._remove_free(offset + size)
        if before is not None:
            size += self._remove_free(before)
            offset = before
        self._add_free(offset, size)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the ranges tile the capacity, free neighbours joined."""
        ranges = sorted(
            [(offset, size, True) for offset, size in self._free.items()]
            + [(offset, size, False) for offset, size in self._allocated.items()]
        )
        expected, was_free = 0, False
        for offset, size, is_free in ranges:
            assert offset == expected, "ranges overlap or leave a hole"
            assert offset % ALIGNMENT == 0
            assert size % ALIGNMENT == 0
            assert size > 0
            assert not (is_free and was_free), "free neighbours were not joined"
            expected, was_free = offset + size, is_free
        assert expected == self.capacity_bytes
        assert self.free_bytes == sum(self._free.values())
        assert self._by_size == sorted((size, offset) for offset, size in self._free.items())
        assert self._free_ends == {offset + size: offset for offset, size in self._free.items()}

    def _add_free(self, offset: int, size: int) -> None:
        self._free[offset] = size
        self._free_ends[offset + size] = offset
        insort(self._by_size, (size, offset))
        self.free_bytes += size

    def _remove_free(self, offset: int) -> int:
        size = self._free.pop(offset)
        del self._free_ends[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        self.free_bytes -= size
        return size
