"""Attention of a batch of sequences, one query each, to rows in pages.

Where rows lie is the same in all layers, so it is worked out once a step. A layer
then costs few kernel calls:

    CPU   every page is a set of keys, with the query of its sequence; full pages that are
          neighbours are the batch of one call, whosever they are; each page that is not
          full is a call
    CUDA  one call of the kernel that reads pages, where it takes them; else a call for
          each sequence (`PagedRows`)

A partial has the same bits whatever else is in the batch: pages are computed apart,
and how those of one sequence are merged follows from their number.

Letters as in `attention`, and B = sequences, R = query heads of one KV head, M = sets of keys.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from attention.cpu_kernel import attend_packed
from attention.cuda_kernels import PageIndex, attend_flash_pages, flash_reads_pages
from attention.merge import merge_stacked
from attention.paged import PagedRows, is_head_major

PagedRun = tuple[Sequence[int], int]  # pages, and the rows in them


class PagedBatch:
    """Where the rows of each of several sequences lie, on one device."""

    def __init__(self, runs: Sequence[PagedRun], *, page_tokens: int, device: torch.device) -> None:
        """Take the runs; one may have no rows, and runs may share pages."""
        self.runs = runs
        self._page_tokens = page_tokens
        self._device = device

    def attend(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out_BHD, lse_BH)`` in float32: query b sees all rows of run b."""
        assert len(q_BHD) == len(self.runs)
        if is_head_major(k_pages):
            return self._key_sets.attend(q_BHD, k_pages, v_pages, scale)
        if len(self.runs) > 1 and flash_reads_pages(k_pages):
            return self._attend_flash(q_BHD, k_pages, v_pages, scale)
        partials = [
            PagedRows(k_pages, v_pages, page_ids, num_rows).attend(q_1HD, scale=scale)
            for (page_ids, num_rows), q_1HD in zip(self.runs, q_BHD.split(1), strict=True)
        ]
        outs_1HD, lses_1H = zip(*partials, strict=True)
        return torch.cat(outs_1HD), torch.cat(lses_1H)

    def _attend_flash(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Call the paged kernel once, for the sequences that have rows."""
        filled, index = self._page_index
        if filled is None:
            return attend_flash_pages(q_BHD, k_pages, v_pages, index, scale)
        out_BHD = torch.zeros(q_BHD.shape, dtype=torch.float32, device=q_BHD.device)
        lse_BH = out_BHD.new_full(q_BHD.shape[:2], -torch.inf)
        if len(filled):
            found = attend_flash_pages(q_BHD[filled], k_pages, v_pages, index, scale)
            out_BHD[filled], lse_BH[filled] = found
        return out_BHD, lse_BH

    @cached_property
    def _page_index(self) -> tuple[Tensor | None, PageIndex]:
        """The sequences that have rows, None where all have, and where these lie."""
        filled = [number for number, (_, num_rows) in enumerate(self.runs) if num_rows]
        runs = [self.runs[number] for number in filled]
        index = PageIndex.of(runs, self._page_tokens, self._device)
        if len(filled) == len(self.runs):
            return None, index
        return torch.tensor(filled, dtype=torch.int64, device=self._device), index

    @cached_property
    def _key_sets(self) -> "_KeySets":
        return _KeySets(self.runs, self._page_tokens)


class _KeySets:
    """On CPU: which call reads which pages, and which results belong to which sequence."""

    def __init__(self, runs: Sequence[PagedRun], page_tokens: int) -> None:
        full: list[tuple[int, int, int]] = []  # page, sequence, its place in the run
        last: list[tuple[int, int, int]] = []  # the same
        num_sets = [-(-num_rows // page_tokens) for _, num_rows in runs]
        for sequence, (page_ids, num_rows) in enumerate(runs):
            num_full = num_rows // page_tokens
            full += [(page, sequence, place) for place, page in enumerate(page_ids[:num_full])]
            if num_full < num_sets[sequence]:
                last.append((page_ids[num_full], sequence, num_full))
        # In order of pages more of them are neighbours, but not where sequences share them.
        if len({page for page, _, _ in full}) == len(full):
            full.sort()
        self._calls = [(*stretch, page_tokens) for stretch in _stretches([p for p, _, _ in full])]
        self._calls += [(page, 1, runs[sequence][1] % page_tokens) for page, sequence, _ in last]
        sets: list[list[int]] = [[0] * count for count in num_sets]
        for number, (_, sequence, place) in enumerate(full + last):
            sets[sequence][place] = number
        self._sequence_M = torch.tensor([sequence for _, sequence, _ in full + last]).long()
        self._has_empty = not all(sets)
        self._groups, self._order_B = _merge_groups(sets, no_keys=len(self._sequence_M))

    def attend(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """See `PagedBatch.attend`."""
        q_BKRD = q_BHD.unflatten(1, (k_pages.shape[0], -1))
        q_MKRD = q_BKRD.index_select(0, self._sequence_M)
        k_PKCD, v_PKCD = k_pages.transpose(0, 1), v_pages.transpose(0, 1)
        outs_RKD, lses_RK, done = [], [], 0
        for page, count, rows in self._calls:
            out_NKRD, lse_NKR = attend_packed(
                q_MKRD.narrow(0, done, count),
                k_PKCD.narrow(0, page, count).narrow(2, 0, rows),
                v_PKCD.narrow(0, page, count).narrow(2, 0, rows),
                scale,
            )
            # So they lie in memory: joined with a plain copy.
            outs_RKD.append(out_NKRD.transpose(1, 2))
            lses_RK.append(lse_NKR.transpose(1, 2))
            done += count
        if self._has_empty:
            _, K, R, D = q_MKRD.shape
            outs_RKD.append(torch.zeros(1, R, K, D))
            lses_RK.append(torch.full((1, R, K), -torch.inf))
        out_MRKD, lse_MRK = torch.cat(outs_RKD), torch.cat(lses_RK)
        merged = [_merge_sets(out_MRKD, lse_MRK, sets) for sets in self._groups]
        outs_BRKD, lses_BRK = zip(*merged, strict=True)
        out_BRKD, lse_BRK = outs_BRKD[0], lses_BRK[0]
        if len(merged) > 1:
            out_BRKD = torch.cat(outs_BRKD).index_select(0, self._order_B)
            lse_BRK = torch.cat(lses_BRK).index_select(0, self._order_B)
        return out_BRKD.transpose(1, 2).flatten(1, 2), lse_BRK.transpose(1, 2).flatten(1, 2)


def _stretches(page_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``(first page, pages)`` of each stretch of neighbours."""
    stretches: list[tuple[int, int]] = []
    for page in page_ids:
        if stretches and sum(stretches[-1]) == page:
            stretches[-1] = stretches[-1][0], stretches[-1][1] + 1
        else:
            stretches.append((page, 1))
    return stretches


def _merge_groups(sets: Sequence[list[int]], no_keys: int) -> tuple[list[slice | Tensor], Tensor]:
    """Return which sets are merged at once, ``[sets, sequences]`` each, and the way back.

    Sequences of as many sets are a group; no keys are a set too. The sets of a single
    sequence that follow each other are a slice.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for sequence, numbers in enumerate(sets):
        groups[max(1, len(numbers))].append(sequence)
    parts: list[slice | Tensor] = []
    for group in groups.values():
        table = [sets[sequence] or [no_keys] for sequence in group]
        first, last = table[0][0], table[0][-1]
        if len(table) == 1 and table[0] == list(range(first, last + 1)):
            parts.append(slice(first, last + 1))
        else:
            parts.append(torch.tensor(table).t())
    order = torch.tensor([sequence for group in groups.values() for sequence in group])
    return parts, order.argsort()


def _merge_sets(out_MRKD: Tensor, lse_MRK: Tensor, sets: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Merge the sets of a group's sequences: ``(out_BRKD, lse_BRK)`` of the group."""
    if isinstance(sets, slice):
        out_SBRKD, lse_SBRK = out_MRKD[sets].unsqueeze(1), lse_MRK[sets].unsqueeze(1)
    elif len(sets) > 1:
        out_SBRKD, lse_SBRK = out_MRKD[sets], lse_MRK[sets]
    else:
        return out_MRKD.index_select(0, sets[0]), lse_MRK.index_select(0, sets[0])
    if len(out_SBRKD) == 1:
        return out_SBRKD[0], lse_SBRK[0]
    return merge_stacked(out_SBRKD, lse_SBRK)
