"""A trace as Chrome's trace event format: what https://ui.perfetto.dev shows as rows of spans.

The coordinator and every rank are a process each. A rank's rows are its steps,
its compute, and its messages from the post to the end that this rank saw; where
several are under way at once there are several rows of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.records import Restored, StepRecord
from attention.spans import EVERY_RANK, NO_LAYER, TRANSFER_KINDS, StepSpans

Event = dict[str, Any]
COORDINATOR = 0  # process number; rank r is r + 1
# Thread numbers; RESTORES, SEND and RECEIVE are the first of as many rows as it takes.
STEPS, COMPUTE, RESTORES, SEND, RECEIVE = 0, 1, 2, 1_000, 1_000_000
ROWS = {
    STEPS: "steps",
    COMPUTE: "compute",
    RESTORES: "restores",
    SEND: "send",
    RECEIVE: "receive",
}


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """A step as all ranks saw it, on one clock."""

    record: StepRecord
    start_s: float  # seen by the coordinator
    spans: tuple[StepSpans, ...]  # of each rank


@dataclass(frozen=True, kw_only=True)
class TracedRestore:
    """A prefix that came back from the KV stores, from the choice on, on the steps' clock."""

    start_s: float
    restored: Restored


def chrome_trace(
    hosts: Sequence[str], steps: Sequence[TracedStep], restores: Sequence[TracedRestore] = ()
) -> dict[str, Any]:
    """Return the trace as a JSON object; ``hosts`` are the ranks'. Time begins with the first span.

    Names of rows come first, then complete events in order of time, in microseconds.
    """
    spans: list[Event] = []
    for step in steps:
        record = step.record
        args = {"new_tokens": record.new_tokens, "algorithm": record.algorithm}
        spans.append(_span(COORDINATOR, STEPS, _name(record), step.start_s, record.wall_s, args))
        for rank, of_rank in enumerate(step.spans):
            took_s = of_rank.end_s - of_rank.start_s
            spans.append(_span(rank + 1, STEPS, _name(record), of_rank.start_s, took_s, {}))
            spans += _compute(rank, of_rank)
    for rank in range(len(hosts)):
        spans += _messages(rank, steps, SEND)
        spans += _messages(rank, steps, RECEIVE)
    spans += _restores(restores)
    rows = sorted({(event["pid"], event["tid"]) for event in spans})
    zero_s = min((event["ts"] for event in spans), default=0.0)
    for event in spans:
        begin_us = round((event["ts"] - zero_s) * 1e6, 3)
        end_us = round((event["ts"] + event["dur"] - zero_s) * 1e6, 3)
        event["ts"], event["dur"] = begin_us, max(0.0, round(end_us - begin_us, 3))
    spans.sort(key=lambda event: (event["ts"], -event["dur"]))
    return {"traceEvents": [*_names(hosts, rows), *spans], "displayTimeUnit": "ms"}


def _restores(restores: Sequence[TracedRestore]) -> Iterator[Event]:
    """Plans and what came of them; those that overlap are on rows of their own."""
    row_ends_s: list[float] = []
    for each in sorted(restores, key=lambda restore: restore.start_s):
        index, took_s = _free_row(row_ends_s, each.start_s), each.restored.measured_s
        row_ends_s[index : index + 1] = [each.start_s + took_s]
        args = {"plan": each.restored.line(), **asdict(each.restored)}
        yield _span(COORDINATOR, RESTORES + index, "restore", each.start_s, took_s, args)


def _free_row(row_ends_s: Sequence[float], start_s: float) -> int:
    """Return the first row on which nothing is at that moment, or a new one."""
    free = (i for i, row_end_s in enumerate(row_ends_s) if row_end_s <= start_s)
    return next(free, len(row_ends_s))


def _compute(rank: int, spans: StepSpans) -> Iterator[Event]:
    for index, layer, to, sent_bytes, start_s, end_s in spans.parts.tolist():
        args = _args(layer)
        if sent_bytes:
            args |= {"bytes": sent_bytes, "to": _peer(to)}
        yield _span(rank + 1, COMPUTE, spans.part_names[index], start_s, end_s - start_s, args)


def _messages(rank: int, steps: Sequence[TracedStep], first_row: int) -> Iterator[Event]:
    """A rank's messages of one direction; those that overlap are on rows of their own."""
    row_ends_s: list[float] = []
    for step in steps:
        for row in step.spans[rank].transfers.tolist():
            kind, layer, to, source, sent_bytes, received_bytes, posted_s, wait_s, end_s = row
            sends = first_row == SEND
            num_bytes = sent_bytes if sends else received_bytes
            if num_bytes == 0:
                continue
            index = _free_row(row_ends_s, posted_s)
            row_ends_s[index : index + 1] = [end_s]
            args = _args(layer) | ({"to": _peer(to)} if sends else {"from": _peer(source)})
            args |= {"bytes": num_bytes, "waited_us": round((end_s - wait_s) * 1e6, 3)}
            name, took_s = TRANSFER_KINDS[kind], end_s - posted_s
            yield _span(rank + 1, first_row + index, name, posted_s, took_s, args)


def _names(hosts: Sequence[str], rows: Sequence[tuple[int, int]]) -> Iterator[Event]:
    processes = ["coordinator", *(f"rank {rank} ({host})" for rank, host in enumerate(hosts))]
    for pid, name in enumerate(processes):
        yield _metadata("process_name", pid, 0, {"name": name})
        yield _metadata("process_sort_index", pid, 0, {"sort_index": pid})
    for pid, tid in rows:
        first = max(row for row in ROWS if row <= tid)
        name = ROWS[first] if tid == first else f"{ROWS[first]} {tid - first + 1}"
        yield _metadata("thread_name", pid, tid, {"name": name})
        yield _metadata("thread_sort_index", pid, tid, {"sort_index": tid})


def _metadata(name: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _span(
    pid: int, tid: int, name: str, start_s: float, took_s: float, args: dict[str, Any]
) -> Event:
    """A complete event, still in seconds."""
    event = {"ph": "X", "name": name, "cat": "ringspan", "pid": pid, "tid": tid}
    return {**event, "ts": start_s, "dur": took_s, "args": args}


def _args(layer: int) -> dict[str, Any]:
    return {} if layer == NO_LAYER else {"layer": layer}


def _peer(rank: int) -> str:
    return "every rank" if rank == EVERY_RANK else f"rank {rank}"


def _name(record: StepRecord) -> str:
    return f"step {record.number} {record.phase}"
