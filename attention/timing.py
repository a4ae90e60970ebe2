"""Where the time of a step goes, part by part."""

import time
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType

import torch

from attention.spans import SpanRecorder


class PartTimer:
    """Adds up the time of named parts of a step: ``with timer("attention"): ...``.

    On CUDA the parts are bracketed by events on the current stream and read in
    `seconds`, so that timing costs no synchronisation inside a step. Parts do
    not nest.
    """

    def __init__(
        self,
        device: torch.device,
        recorder: SpanRecorder | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the device of a step's work; ``recorder`` gets every part as a span too.

        ``clock`` is that of parts on CPU: with `time.thread_time` what others compute meanwhile,
        on the same core, is not counted.
        """
        self._clock = clock
        self._recorder = recorder
        if recorder is not None:
            recorder.begin()
        self._on_cuda = device.type == "cuda"
        self._spans_s: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._part = ""
        self._start_s = 0.0
        self._start_event: torch.cuda.Event | None = None

    def at_layer(self, layer: int) -> None:
        """Say of which layer the parts are that follow."""
        if self._recorder is not None:
            self._recorder.layer = layer

    def __call__(self, part: str) -> "PartTimer":
        self._part = part
        return self

    def __enter__(self) -> None:
        if self._on_cuda:
            self._start_event = torch.cuda.Event(enable_timing=True)
            self._start_event.record()
        else:
            self._start_s = self._clock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._start_event is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._part, self._start_event, end))
            if self._recorder is not None:
                self._recorder.add_part(self._part, self._start_event, end)
        else:
            end_s = self._clock()
            self._spans_s[self._part] += end_s - self._start_s
            if self._recorder is not None:
                self._recorder.add_part(self._part, self._start_s, end_s)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part so far; on CUDA this waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for part, start, end in self._events:
                self._spans_s[part] += start.elapsed_time(end) / 1000
            self._events.clear()
        return dict(self._spans_s)
