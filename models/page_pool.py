"""The device memory for keys and values of one rank: a pool of pages, allocated once at start."""

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.paged import attend_pages, page_shape, store_rows


@dataclass
class Run:
    """One rank's rows of one sequence, in order of position, and the pages they lie in."""

    page_ids: list[int] = field(default_factory=list)
    num_rows: int = 0


class PagePool:
    """Pages of keys and values for every layer; page p of one layer goes with page p of all.

    Free pages are given out lowest first, so that a run's pages tend to be
    neighbours, which the CPU kernel reads in one call. Not thread-safe.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``num_layers * 2 * num_pages`` pages of ``page_tokens`` tokens each."""
        shape = page_shape(
            device, page_tokens=page_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        # On CPU memory of `empty` is committed page by page as it is written.
        self._pages = torch.empty((num_layers, 2, num_pages, *shape), dtype=dtype, device=device)
        self._free = list(range(num_pages))
        self._runs: dict[int, Run] = {}

    @property
    def num_free_pages(self) -> int:
        """Pages that belong to no run."""
        return len(self._free)

    def run(self, sequence_id: int) -> Run:
        """Return the run of a sequence, empty if it has none yet."""
        return self._runs.get(sequence_id) or Run()

    def grow(self, sequence_id: int, num_rows: int) -> int:
        """Make room for further rows of a sequence; return the index of the first of them.

        Raises:
            MemoryError: The pool has too few free pages; nothing is changed.
        """
        run = self.run(sequence_id)
        needed = -(-(run.num_rows + num_rows) // self.page_tokens) - len(run.page_ids)
        if needed > len(self._free):
            raise MemoryError(
                f"{needed} KV pages needed, {len(self._free)} of {self.num_pages} free"
            )
        self._runs[sequence_id] = run
        run.page_ids += [heapq.heappop(self._free) for _ in range(needed)]
        first_row = run.num_rows
        run.num_rows += num_rows
        return first_row

    def release(self, sequence_id: int) -> None:
        """Give the pages of a sequence back; a sequence that has none is no error."""
        for page_id in self._runs.pop(sequence_id, Run()).page_ids:
            heapq.heappush(self._free, page_id)

    def store(self, layer: int, sequence_id: int, first_row: int, kv_TJD: Tensor) -> None:
        """Write one layer's new rows; ``kv_TJD`` holds keys' heads, then values' heads."""
        run = self._runs[sequence_id]
        for pages, rows_TKD in zip(self._pages[layer], kv_TJD.chunk(2, dim=1), strict=True):
            store_rows(pages, run.page_ids, first_row, rows_TKD)

    def attend(
        self, layer: int, sequence_id: int, q_THD: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out_THD, lse_TH)`` of queries that all see every row of this rank's run."""
        run = self.run(sequence_id)
        k_pages, v_pages = self._pages[layer]
        return attend_pages(q_THD, k_pages, v_pages, run.page_ids, run.num_rows, scale=scale)

    def check_invariants(self) -> None:
        """Assert that every page is free or in exactly one run, and that runs fill their pages."""
        held = [page_id for run in self._runs.values() for page_id in run.page_ids]
        assert sorted(held + self._free) == list(range(self.num_pages))
        for run in self._runs.values():
            assert len(run.page_ids) == -(-run.num_rows // self.page_tokens)
