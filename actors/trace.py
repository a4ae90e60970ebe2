"""The recording of a trace: what all ranks did in the steps from `start` to `stop`."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.cluster_info import ClusterInfo
from actors.errors import ClusterError, TraceError
from actors.messages import StepResult
from actors.ranks import Ranks
from actors.records import Restored, StepRecord
from actors.timeline import TracedRestore, TracedStep, chrome_trace
from actors.trace_summary import TraceSummary, summarise
from attention.clocks import RankClock, boot_id
from attention.spans import StepSpans

MAX_SPANS = 100_000  # of all ranks together: some 4 MB here, 20 MB as JSON
ASKED_TIMES = 7  # for the clock of rank 0, where it is another host's


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What all ranks did in some steps. All moments are on the clock of rank 0's host."""

    hosts: tuple[str, ...]  # of each rank
    clocks: tuple[RankClock, ...]
    steps: tuple[TracedStep, ...]
    is_cut: bool  # there was more than `MAX_SPANS`; the last step ends early, or later ones miss
    restores: tuple[TracedRestore, ...] = ()

    def write(self, path: Path) -> None:
        """Write it for https://ui.perfetto.dev or chrome://tracing.

        Raises:
            TraceError: The file cannot be written.
        """
        try:
            path.write_text(self._json(), encoding="utf-8")
        except OSError as error:
            raise TraceError(f"cannot write the trace to {path}: {error.strerror}") from None

    def _json(self) -> str:
        return json.dumps(chrome_trace(self.hosts, self.steps, self.restores))

    def summary(self) -> TraceSummary:
        """Return who did what for how long, and who was late, step by step."""
        # Between two ranks, neither of which is rank 0, the errors of both count.
        errors_s = sorted(clock.error_s for clock in self.clocks)
        return summarise(
            self.hosts,
            self.steps,
            is_cut=self.is_cut,
            clock_error_s=sum(errors_s[-2:]),
            restores=[each.restored.line() for each in self.restores],
        )


class Tracer:
    """Keeps the spans that the ranks send with their results. Lives in the coordinator."""

    def __init__(self) -> None:
        self._clocks: tuple[RankClock, ...] | None = None
        self._own_offset_s = 0.0
        self._is_on = False
        self._is_cut = False
        self._steps: list[TracedStep] = []
        self._restores: list[TracedRestore] = []

    async def start(self, ranks: Ranks, num_ranks: int) -> None:
        """Have all ranks record the steps that begin from now on.

        Raises:
            TraceError: They do already.
            ClusterError: A rank was lost.
        """
        if self._is_on:
            raise TraceError("a trace is being recorded already: call stop_trace first")
        self._is_on = True
        try:
            clocks: list[RankClock] = await ranks.call(
                "start_trace", MAX_SPANS // num_ranks, timeout_s=None
            )
            same_host = clocks[0].boot_id == boot_id()
            self._own_offset_s = 0.0 if same_host else await _offset_to_rank_0(ranks)
        except BaseException:
            self._is_on = False
            raise
        self._steps, self._restores, self._is_cut = [], [], False
        self._clocks = tuple(clocks)

    def add(self, start_s: float, record: StepRecord, results: Sequence[StepResult]) -> None:
        """Keep a step's spans, if it was recorded; ``start_s`` is the coordinator's time."""
        if self._clocks is None or self._is_cut:
            return
        spans = [result.spans for result in results if result.spans is not None]
        if len(spans) < len(results):
            return  # the step began before the recording
        self._is_cut = any(of_rank.is_cut for of_rank in spans)
        step = TracedStep(
            record=record,
            start_s=start_s - self._own_offset_s,
            spans=tuple(map(_moved, spans, (clock.offset_s for clock in self._clocks))),
        )
        self._steps.append(step)

    def add_restore(self, begin_s: float, restored: Restored) -> None:
        """Keep what came back, if it is recorded; ``begin_s`` is the coordinator's time."""
        if self._clocks is not None and not self._is_cut:
            start_s = begin_s - self._own_offset_s
            self._restores.append(TracedRestore(start_s=start_s, restored=restored))

    async def stop(self, ranks: Ranks, info: ClusterInfo) -> Trace:
        """Return what was recorded, and record no more. A lost rank does not lose the trace.

        Raises:
            TraceError: No trace is being recorded.
        """
        if self._clocks is None:
            raise TraceError("no trace is being recorded: call start_trace first")
        trace = Trace(
            hosts=info.hosts,
            clocks=self._clocks,
            steps=tuple(self._steps),
            restores=tuple(self._restores),
            is_cut=self._is_cut,
        )
        self._clocks, self._steps, self._restores = None, [], []
        self._is_on = False
        with contextlib.suppress(ClusterError):
            await ranks.call("stop_trace", timeout_s=None)
        return trace


async def _offset_to_rank_0(ranks: Ranks) -> float:
    """How far this process's clock is ahead of rank 0's, from the quickest of some answers."""
    answers = []
    for _ in range(ASKED_TIMES):
        asked_s = time.perf_counter()
        clock_s = await ranks.ask(0, "clock_s")
        took_s = time.perf_counter() - asked_s
        answers.append((took_s, asked_s + took_s / 2 - clock_s))
    return min(answers)[1]


def _moved(spans: StepSpans, offset_s: float) -> StepSpans:
    """Return spans on the clock of rank 0."""
    if offset_s == 0.0:
        return spans
    parts, transfers = spans.parts.copy(), spans.transfers.copy()
    for name in ("start_s", "end_s"):
        parts[name] -= offset_s
    for name in ("posted_s", "wait_s", "end_s"):
        transfers[name] -= offset_s
    return dataclasses.replace(
        spans,
        parts=parts,
        transfers=transfers,
        start_s=spans.start_s - offset_s,
        end_s=spans.end_s - offset_s,
    )
