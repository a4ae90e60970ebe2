"""Activations of a step's rows, in host memory until they are stored or turn out void.

What goes into the projection of keys and values (after the input norm) is taken while a step
is computed, layer by layer, for some of the blocks. A complete block takes its rows away, for
the writer; what is cut off or ended is forgotten. What finds no room is not taken: then the
writer stores keys and values.

Letters: L = layers, S = rows, E = hidden size.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_BYTES = 1 << 30  # of host memory, pinned on CUDA
_GOLDEN_RATIO = 0.6180339887498949

TakeInputs = Callable[[int, Tensor], None]  # layer, ``normed_TE`` of all rows of the step


def keeps_activations(block: int, share: float) -> bool:
    """Return whether a sequence's block is stored as activations, as ``share`` of them are.

    Multiples of the golden ratio lie evenly: any prefix has its share within two blocks, and
    those of a rank that takes every n-th, within a few (n = 8, a Fibonacci number: six).
    """
    return block * _GOLDEN_RATIO % 1.0 < share


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Rows of one step whose KV this rank keeps, of consecutive positions of a sequence."""

    sequence_id: int
    position: int  # of the first
    row: int  # of the first, among the step's
    count: int


@dataclass(eq=False)
class _Buffer:
    data: Tensor  # ``[L, S, E]``
    users: int  # captured rows that lie in it


@dataclass(frozen=True, eq=False)
class Captured:
    """Activations of consecutive positions, within one block."""

    start: int  # position of the first row
    rows: Tensor  # ``[L, S, E]``
    buffer: _Buffer

    @property
    def end(self) -> int:
        """The position behind the last row's."""
        return self.start + self.rows.shape[1]


class ActivationCapture:
    """What one rank has taken. The thread that computes calls all but `release`: any may."""

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        block_tokens: int,
        share: float,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Take ``share`` of the blocks, in no more than ``max_bytes``."""
        self._shape = num_layers, hidden_size
        self._dtype, self._device = dtype, device
        self._block_tokens = block_tokens
        self._share = share
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held_bytes = 0  # guarded by the lock, with the buffers' users
        self._captured: dict[int, list[Captured]] = {}  # by sequence
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def held_bytes(self) -> int:
        """The bytes that are taken now, also by what is being written."""
        with self._lock:
            return self._held_bytes

    def step(self, rows: Iterable[StepRows]) -> TakeInputs | None:
        """Return what takes each layer's inputs of a step; None: nothing is to be taken.

        Rows of a sequence come in order of positions. What was taken at or behind the first of
        them is void, and forgotten.
        """
        wanted = [piece for each in rows for piece in self._wanted(each)]
        # One at a time where they are many, so that no row keeps others' memory. Lone rows, of
        # decode steps, are few, and gathered at once.
        groups = [[piece] for piece in wanted if piece.count > 1]
        if lone := [piece for piece in wanted if piece.count == 1]:
            groups.append(lone)
        targets = [
            (self._selection(group), buffer.data)
            for group in groups
            if (buffer := self._hold(group)) is not None
        ]
        if not targets:
            return None

        def take(layer: int, normed_TE: Tensor) -> None:
            if self._stream is None:
                _copy_rows(layer, normed_TE, targets)
                return
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy_rows(layer, normed_TE, targets)
            normed_TE.record_stream(self._stream)  # it is not given to others before

        return take

    def take(self, sequence_id: int, start: int, end: int) -> list[Captured]:
        """Hand over what there is of some whole blocks, in order; `release` it in the end.

        On CUDA it is there when `taken` says so.
        """
        captured = self._captured.pop(sequence_id, [])
        taken = [each for each in captured if start <= each.start < end]
        if later := [each for each in captured if each.start >= end]:
            self._captured[sequence_id] = later
        self.release([each for each in captured if each.start < start])
        return sorted(taken, key=lambda each: each.start)

    def taken(self) -> "torch.cuda.Event | None":
        """Return the event (CUDA) after which all is there that was taken so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def forget(self, sequence_id: int, position: int = 0) -> None:
        """Drop what was taken at and behind a position: it is void, or nobody stores it."""
        captured = self._captured.pop(sequence_id, [])
        kept = [
            each
            if each.end <= position
            else replace(each, rows=each.rows[:, : position - each.start])
            for each in captured
            if each.start < position
        ]
        if kept:
            self._captured[sequence_id] = kept
        self.release([each for each in captured if each.start >= position])

    def release(self, captured: Sequence[Captured]) -> None:
        """Give back what was handed over: nobody reads it any more."""
        with self._lock:
            for each in captured:
                each.buffer.users -= 1
                if not each.buffer.users:
                    self._held_bytes -= each.buffer.data.nbytes

    def _wanted(self, rows: StepRows) -> Iterator[StepRows]:
        """Yield those rows that are to be taken, block by block."""
        self.forget(rows.sequence_id, rows.position)
        position, end = rows.position, rows.position + rows.count
        while position < end:
            block = position // self._block_tokens
            next_position = min(end, (block + 1) * self._block_tokens)
            if keeps_activations(block, self._share):
                yield replace(
                    rows,
                    position=position,
                    row=rows.row + position - rows.position,
                    count=next_position - position,
                )
            position = next_position

    def _hold(self, group: Sequence[StepRows]) -> _Buffer | None:
        """Have a buffer for the rows of a group; None: there is no room."""
        L, E = self._shape
        count = sum(rows.count for rows in group)
        num_bytes = L * count * E * self._dtype.itemsize
        with self._lock:
            if self._held_bytes + num_bytes > self._max_bytes:
                return None
            self._held_bytes += num_bytes
        data = torch.empty(L, count, E, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        buffer, first = _Buffer(data, len(group)), 0
        for rows in group:
            of_rows = data[:, first : first + rows.count]
            of_sequence = self._captured.setdefault(rows.sequence_id, [])
            of_sequence.append(Captured(rows.position, of_rows, buffer))
            first += rows.count
        return buffer

    def _selection(self, group: Sequence[StepRows]) -> slice | Tensor:
        """Return which of the step's rows a group has."""
        if len(group) == 1:
            return slice(group[0].row, group[0].row + group[0].count)
        selection = torch.tensor([rows.row for rows in group], device=self._device)
        if self._stream is not None:
            selection.record_stream(self._stream)
        return selection


def _copy_rows(
    layer: int, normed_TE: Tensor, targets: Sequence[tuple[slice | Tensor, Tensor]]
) -> None:
    for rows, data_LSE in targets:
        data_LSE[layer].copy_(normed_TE[rows], non_blocking=True)
