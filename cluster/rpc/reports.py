"""Log-probabilities, and what is told of a request beside its answers, as messages and back.

A report may be larger than a message: it is cut into pieces, which come before the delta that it
belongs to.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from actors.messages import Logprob, Logprobs, PromptReport, RequestDelta, StepReport, TokenIds
from actors.records import Restored, StepRecord
from cluster.rpc import ringspan_v1_pb2 as pb

PIECE_ENTRIES = 2**14  # log-probabilities of one message, of at most 100 bytes or so each
PIECE_IDS = 2**16
PIECE_STEPS = 256
_RANKS = ("ranks_wall_s", "ranks_parts_s")  # not of the same form in a message


def write_place(place: Logprobs | None) -> pb.PlaceLogprobs:
    """Return the message of one place's log-probabilities; None is empty."""
    return pb.PlaceLogprobs(
        tokens=[
            pb.TokenLogprob(
                token_id=token_id, logprob=each.logprob, rank=each.rank, text=each.decoded_token
            )
            for token_id, each in (place or {}).items()
        ]
    )


def read_place(message: pb.PlaceLogprobs) -> Logprobs:
    """Return one place's log-probabilities."""
    return {
        each.token_id: Logprob(
            logprob=each.logprob,
            rank=each.rank,
            decoded_token=each.text if each.HasField("text") else None,
        )
        for each in message.tokens
    }


def write_reports(delta: RequestDelta, *, with_ids: bool) -> Iterator[pb.GenerateResponse]:
    """Yield the messages that go before a delta's own."""
    if delta.prompt is not None:
        yield from _write_prompt(delta.prompt, with_ids)
    if delta.report is not None:
        yield from _write_steps(delta.report)


def _write_prompt(report: PromptReport, with_ids: bool) -> Iterator[pb.GenerateResponse]:
    told = 0
    ids = report.token_ids if with_ids else ()
    for begin in range(0, len(ids), PIECE_IDS):
        piece = pb.PromptReport(token_ids=ids[begin : begin + PIECE_IDS])
        yield pb.GenerateResponse(prompt_report=piece)
        told += 1
    for places in _pieces(report.logprobs or ()):
        piece = pb.PromptReport(logprobs=[write_place(place) for place in places])
        yield pb.GenerateResponse(prompt_report=piece)
        told += 1
    if not told:
        yield pb.GenerateResponse(prompt_report=pb.PromptReport())


def _pieces(places: Sequence[Logprobs | None]) -> Iterator[list[Logprobs | None]]:
    """Cut places so that no piece has many more than `PIECE_ENTRIES` entries."""
    piece: list[Logprobs | None] = []
    entries = 0
    for place in places:
        piece.append(place)
        entries += 1 + len(place or ())
        if entries >= PIECE_ENTRIES:
            yield piece
            piece, entries = [], 0
    if piece:
        yield piece


def _write_steps(report: StepReport) -> Iterator[pb.GenerateResponse]:
    for begin in range(0, len(report.steps), PIECE_STEPS):
        steps = [_write_step(step) for step in report.steps[begin : begin + PIECE_STEPS]]
        yield pb.GenerateResponse(step_report=pb.StepReport(steps=steps))
    restored = None
    if report.restored is not None:
        restored = pb.Restored(**dataclasses.asdict(report.restored))
    yield pb.GenerateResponse(step_report=pb.StepReport(restored=restored))


def _write_step(step: StepRecord) -> pb.StepRecord:
    values = {name: value for name, value in vars(step).items() if name not in _RANKS}
    parts = [pb.Parts(seconds=seconds) for seconds in step.ranks_parts_s]
    return pb.StepRecord(**values, ranks_wall_s=step.ranks_wall_s, ranks_parts_s=parts)


class ReportReader:
    """Puts the pieces of one try's reports together."""

    def __init__(self, sent_ids: TokenIds | None) -> None:
        """Begin; ``sent_ids`` are the prompt's where it was sent as ids, which are not told."""
        self._ids = [] if sent_ids is None else [sent_ids]
        self._logprobs: list[Logprobs | None] = []
        self._steps: list[StepRecord] = []
        self._restored: Restored | None = None
        self._has_prompt = self._has_steps = False

    def take(self, response: pb.GenerateResponse) -> None:
        """Take a piece."""
        if response.WhichOneof("event") == "prompt_report":
            self._has_prompt = True
            piece = response.prompt_report
            if piece.token_ids:
                self._ids.append(np.asarray(piece.token_ids, dtype=np.int32))
            # The prompt's first token has none.
            self._logprobs += [read_place(each) or None for each in piece.logprobs]
        else:
            self._has_steps = True
            report = response.step_report
            self._steps += [_read_step(each) for each in report.steps]
            if report.HasField("restored"):
                self._restored = _read_restored(report.restored)

    def add_to(self, delta: RequestDelta) -> RequestDelta:
        """Return the delta that came behind these pieces, with its reports; they are told once."""
        if self._has_prompt:
            self._has_prompt = False
            ids = np.concatenate([*self._ids, np.empty(0, np.int32)])
            logprobs = tuple(self._logprobs) or None
            prompt = PromptReport(token_ids=ids, logprobs=logprobs)
            delta = dataclasses.replace(delta, prompt=prompt)
        if self._has_steps:
            self._has_steps = False
            report = StepReport(steps=tuple(self._steps), restored=self._restored)
            delta = dataclasses.replace(delta, report=report)
        return delta


def _read_step(message: pb.StepRecord) -> StepRecord:
    return StepRecord(
        **_read_fields(message, StepRecord, except_for=(*_RANKS, "sequence_ids", "phase")),
        phase=cast(Any, message.phase),
        sequence_ids=tuple(message.sequence_ids),
        ranks_wall_s=tuple(message.ranks_wall_s),
        ranks_parts_s=tuple(dict(parts.seconds) for parts in message.ranks_parts_s),
    )


def _read_restored(message: pb.Restored) -> Restored:
    return Restored(**_read_fields(message, Restored))


def _read_fields(message: Any, kind: Any, except_for: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of a dataclass that has the message's names."""
    optional = {"predicted_s", "simulated_link_bytes_per_s"}
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in except_for:
            continue
        value = getattr(message, field.name)
        if field.name in optional and not message.HasField(field.name):
            value = None
        values[field.name] = dict(value) if hasattr(value, "items") else value
    return values
