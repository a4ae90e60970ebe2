"""What a rank did when, within a step: spans of its parts, and its transfers.

A mark is a moment on this rank: `time.perf_counter` on CPU, an event on the
current stream on CUDA, so that marking never waits for the device. `SpanRecorder.take`
turns the marks of a step into seconds of this host's `perf_counter`.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Mark = float | torch.cuda.Event
TransferKind = Literal["exchange", "all_gather"]

NO_LAYER = -1
NO_PEER = -1
EVERY_RANK = -2
TRANSFER_KINDS: tuple[TransferKind, ...] = ("exchange", "all_gather")
PART_ROW = np.dtype(
    [
        ("part", "u1"),  # index into `StepSpans.part_names`
        ("layer", "i2"),
        ("to", "i2"),  # whom messages posted within the part go to
        ("sent_bytes", "i8"),  # of these messages
        ("start_s", "f8"),
        ("end_s", "f8"),
    ]
)
TRANSFER_ROW = np.dtype(
    [
        ("kind", "u1"),  # index into TRANSFER_KINDS
        ("layer", "i2"),
        ("to", "i2"),
        ("source", "i2"),
        ("sent_bytes", "i8"),
        ("received_bytes", "i8"),
        ("posted_s", "f8"),
        ("wait_s", "f8"),  # the moment at which the rank began to wait for it
        ("end_s", "f8"),  # the moment at which the wait was over
    ]
)


@dataclass(frozen=True)
class StepSpans:
    """One rank's spans of one step, in seconds of its host's `perf_counter`."""

    part_names: tuple[str, ...]
    parts: npt.NDArray[np.void]  # of PART_ROW, in order of time
    transfers: npt.NDArray[np.void]  # of TRANSFER_ROW, in the order in which they were posted
    start_s: float  # of the whole step on this rank
    end_s: float
    is_cut: bool  # the recorder was full before the step was over


class SpanRecorder:
    """Keeps spans of a rank's steps until they are taken, and so many in all; then it is full."""

    def __init__(self, device: torch.device, max_spans: int) -> None:
        """Take the most spans that all steps together may have."""
        self.layer = NO_LAYER  # of what is recorded next
        self._on_cuda = device.type == "cuda"
        self._free = max_spans
        self._part_names: dict[str, int] = {}
        self._parts: list[tuple[int, int, int, int, Mark, Mark]] = []
        self._transfers: list[list[Any]] = []
        self._posted = (NO_PEER, 0)
        self._zero: tuple[torch.cuda.Event, float] | None = None

    def begin(self) -> None:
        """Begin a step; on CUDA this waits for the device, to know one moment on both clocks."""
        self._parts, self._transfers = [], []
        self._posted, self.layer = (NO_PEER, 0), NO_LAYER
        if self._on_cuda:
            torch.cuda.synchronize()
            zero = _event()
            torch.cuda.synchronize()
            self._zero = (zero, time.perf_counter())

    def mark(self) -> Mark:
        """Return this moment."""
        return _event() if self._on_cuda else time.perf_counter()

    def add_part(self, part: str, start: Mark, end: Mark) -> None:
        """Record a part of the step, and the messages that were posted within it."""
        (to, sent_bytes), self._posted = self._posted, (NO_PEER, 0)
        if self._free > 0:
            self._free -= 1
            index = self._part_names.setdefault(part, len(self._part_names))
            self._parts.append((index, self.layer, to, sent_bytes, start, end))

    def post(
        self, kind: TransferKind, *, to: int, source: int, sent_bytes: int, received_bytes: int
    ) -> "OpenTransfer":
        """Record that a transfer begins now."""
        posted = self.mark()
        if sent_bytes:
            self._posted = (to, self._posted[1] + sent_bytes)
        index = TRANSFER_KINDS.index(kind)
        row = [index, self.layer, to, source, sent_bytes, received_bytes, posted, posted, posted]
        if self._free > 0:
            self._free -= 1
            self._transfers.append(row)
        return OpenTransfer(self, row)

    def take(self, start_s: float, end_s: float) -> StepSpans:
        """Return the spans of the step since `begin`; on CUDA its work must be done."""
        parts = [(*row[:4], *map(self._seconds, row[4:])) for row in self._parts]
        transfers = [(*row[:6], *map(self._seconds, row[6:])) for row in self._transfers]
        return StepSpans(
            part_names=tuple(self._part_names),
            parts=np.array(parts, dtype=PART_ROW),
            transfers=np.array(transfers, dtype=TRANSFER_ROW),
            start_s=start_s,
            end_s=end_s,
            is_cut=self._free == 0,
        )

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        assert self._zero is not None
        zero, zero_s = self._zero
        return zero_s + zero.elapsed_time(mark) / 1000


class OpenTransfer:
    """A transfer whose end is not seen yet."""

    def __init__(self, recorder: SpanRecorder, row: list[Any]) -> None:
        self._recorder = recorder
        self._row = row

    def begin_wait(self) -> None:
        """Record that the rank waits from now on."""
        self._row[7] = self._recorder.mark()

    def end(self) -> None:
        """Record that the transfer is complete."""
        self._row[8] = self._recorder.mark()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
