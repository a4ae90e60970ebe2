"""What a trace says, in numbers: who did what for how long, and who was late."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actors.timeline import TracedStep
from actors.waits import waited_for
from attention.spans import NO_LAYER, StepSpans

# A layer's attention is over when the last of these is.
ATTENTION_PARTS = ("attention", "merge")
MS = 1e3
MB = 1e6
SHOWN_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class RankSummary:
    """One rank in one step, or in several."""

    rank: int
    wall_s: float
    parts_s: dict[str, float]
    waited_s: float  # in transfers, whatever part they belong to
    waited_for_s: tuple[float, ...]  # of these, for each rank to come to the transfer
    sent_bytes: int
    received_bytes: int
    in_flight_s: float  # while at least one message was on its way here, as far as this rank saw

    @property
    def received_bytes_per_s(self) -> float:
        """At least: a message may be there for a while before the rank looks for it."""
        return self.received_bytes / self.in_flight_s if self.in_flight_s else 0.0


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """One step, or several."""

    name: str
    wall_s: float  # seen by the coordinator
    started_s: tuple[float, ...]  # on each rank, after the coordinator sent the plan
    ranks: tuple[RankSummary, ...]
    late_rank: int | None  # for which the others waited longest; None where nobody waited
    late_s: float  # for which the rank that waited longest for it did so
    # For each layer, how far apart the ranks ended its attention; the worst where it came often.
    layer_skew_s: tuple[float, ...]

    def lines(self, hosts: Sequence[str]) -> Iterator[str]:
        """Return this for people."""
        yield f"{self.name}: {self.wall_s * MS:.1f} ms"
        for of_rank in self.ranks:
            yield from _rank_lines(of_rank, hosts[of_rank.rank])
        if self.started_s:
            first_s = min(self.started_s)
            later = ", ".join(f"{(moment_s - first_s) * MS:.2f}" for moment_s in self.started_s)
            yield f"  began {first_s * MS:.2f} ms after the coordinator; ranks +{later} ms"
        if self.late_rank is not None:
            share = self.late_s / self.wall_s
            yield (
                f"  late: rank {self.late_rank}; another rank waited {self.late_s * MS:.2f} ms for"
                f" it, {share:.1%} of the time"
            )
        if self.layer_skew_s and len(self.ranks) > 1:
            worst = int(np.argmax(self.layer_skew_s))
            yield (
                f"  a layer's attention ended {np.median(self.layer_skew_s) * MS:.2f} ms apart"
                f" (median of layers), {self.layer_skew_s[worst] * MS:.2f} ms in layer {worst}"
            )


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """All steps of a trace, and what they come to."""

    hosts: tuple[str, ...]
    steps: tuple[StepSummary, ...]
    total: StepSummary
    late_steps: dict[int, int]  # how many steps each rank was the late one of
    is_cut: bool
    clock_error_s: float  # the most that moments of two ranks can be off; 0 on one host
    restores: tuple[str, ...] = ()  # a line each

    def text(self) -> str:
        """Return this for people."""
        if not self.steps:
            return "no step was recorded"
        lines = [line for step in self.steps[:SHOWN_STEPS] for line in step.lines(self.hosts)]
        if len(self.steps) > SHOWN_STEPS:
            lines.append(
                f"... and {len(self.steps) - SHOWN_STEPS} more steps (--json has them all)"
            )
        if len(self.steps) > 1:
            lines += self.total.lines(self.hosts)
        late = ", ".join(
            f"rank {rank} in {steps} of {len(self.steps)} steps"
            for rank, steps in sorted(self.late_steps.items(), key=lambda item: -item[1])
        )
        lines += self.restores
        lines.append(f"the others waited longest for: {late or 'nobody'}")
        if self.clock_error_s:
            lines.append(f"clocks of the hosts agree within {self.clock_error_s * MS:.2f} ms")
        if self.is_cut:
            lines.append("the trace was full: what came after its last span is missing")
        return "\n".join(lines)


def summarise(
    hosts: Sequence[str],
    steps: Sequence[TracedStep],
    *,
    is_cut: bool = False,
    clock_error_s: float = 0.0,
    restores: Sequence[str] = (),
) -> TraceSummary:
    """Return what the spans of all ranks come to; ``hosts`` are the ranks'."""
    summaries = tuple(_step(step) for step in steps)
    return TraceSummary(
        hosts=tuple(hosts),
        steps=summaries,
        total=_total(summaries, len(hosts)),
        late_steps=dict(Counter(s.late_rank for s in summaries if s.late_rank is not None)),
        is_cut=is_cut,
        clock_error_s=clock_error_s,
        restores=tuple(restores),
    )


def _step(step: TracedStep) -> StepSummary:
    record = step.record
    for_whom = waited_for(step.spans)
    ranks = []
    for rank, (spans, parts_s) in enumerate(zip(step.spans, record.ranks_parts_s, strict=True)):
        transfers = spans.transfers
        ranks.append(
            RankSummary(
                rank=rank,
                wall_s=record.ranks_wall_s[rank],
                parts_s=parts_s,
                waited_s=float((transfers["end_s"] - transfers["wait_s"]).sum()),
                waited_for_s=tuple(for_whom[rank, :-1].tolist()),
                sent_bytes=int(transfers["sent_bytes"].sum()),
                received_bytes=int(transfers["received_bytes"].sum()),
                in_flight_s=_in_flight_s(spans),
            )
        )
    late_rank, late_s = _late(ranks)
    return StepSummary(
        name=(
            f"step {record.number} {record.phase}, {record.new_tokens} tokens after"
            f" {record.cached_tokens}, {record.algorithm} over {record.num_ranks} ranks"
        ),
        wall_s=record.wall_s,
        started_s=tuple(spans.start_s - step.start_s for spans in step.spans),
        ranks=tuple(ranks),
        late_rank=late_rank,
        late_s=late_s,
        layer_skew_s=_layer_skew_s(step.spans),
    )


def _total(steps: Sequence[StepSummary], num_ranks: int) -> StepSummary:
    ranks = [_rank_total([step.ranks[rank] for step in steps], rank) for rank in range(num_ranks)]
    late_rank, late_s = _late(ranks)
    return StepSummary(
        name=f"all {len(steps)} steps",
        wall_s=sum(step.wall_s for step in steps),
        started_s=(),
        ranks=tuple(ranks),
        late_rank=late_rank,
        late_s=late_s,
        layer_skew_s=tuple(
            max(skews_s) for skews_s in zip(*(step.layer_skew_s for step in steps), strict=False)
        ),
    )


def _rank_total(steps: Sequence[RankSummary], rank: int) -> RankSummary:
    parts_s: Counter[str] = Counter()
    for step in steps:
        parts_s.update(step.parts_s)
    columns = zip(*(step.waited_for_s for step in steps), strict=True)
    return RankSummary(
        rank=rank,
        wall_s=sum(step.wall_s for step in steps),
        parts_s=dict(parts_s),
        waited_s=sum(step.waited_s for step in steps),
        waited_for_s=tuple(math.fsum(column) for column in columns),
        sent_bytes=sum(step.sent_bytes for step in steps),
        received_bytes=sum(step.received_bytes for step in steps),
        in_flight_s=sum(step.in_flight_s for step in steps),
    )


def _late(ranks: Sequence[RankSummary]) -> tuple[int | None, float]:
    """Which rank another one waited longest for, and how long."""
    waits = [
        (seconds, peer)
        for of_rank in ranks
        for peer, seconds in enumerate(of_rank.waited_for_s)
        if peer != of_rank.rank and seconds > 0.0
    ]
    late_s, late_rank = max(waits, default=(0.0, None))
    return late_rank, late_s


def _in_flight_s(spans: StepSpans) -> float:
    """The time in which at least one message was under way to this rank."""
    arriving = spans.transfers[spans.transfers["received_bytes"] > 0]
    arriving = arriving[np.argsort(arriving["posted_s"])]
    # What ended before the latest end so far was counted with the transfer that it overlaps.
    seen_s = np.maximum.accumulate(arriving["end_s"])
    before_s = np.concatenate([[-np.inf], seen_s[:-1]])
    return float((seen_s - np.maximum(arriving["posted_s"], before_s)).clip(min=0.0).sum())


def _layer_skew_s(spans: Sequence[StepSpans]) -> tuple[float, ...]:
    """How far apart the ranks ended each layer's attention, at most over the step's passes."""
    passes = [_attention_ends(of_rank) for of_rank in spans]
    common = set(passes[0]).intersection(*passes[1:])
    skews_s: dict[int, float] = {}
    for number, layer in common:
        ends_s = [ends[number, layer] for ends in passes]
        skews_s[layer] = max(skews_s.get(layer, 0.0), max(ends_s) - min(ends_s))
    return tuple(skews_s.get(layer, 0.0) for layer in range(max(skews_s, default=-1) + 1))


def _attention_ends(spans: StepSpans) -> dict[tuple[int, int], float]:
    """When each pass through the layers ended the attention of each layer."""
    wanted = [index for index, name in enumerate(spans.part_names) if name in ATTENTION_PARTS]
    is_wanted = np.isin(spans.parts["part"], wanted) & (spans.parts["layer"] != NO_LAYER)
    rows = spans.parts[is_wanted]
    layers = rows["layer"].astype(int)
    passes = np.cumsum(np.diff(layers, prepend=0) < 0)
    # Rows are in order of time: the last one of a key stays.
    return dict(
        zip(zip(passes.tolist(), layers.tolist(), strict=True), rows["end_s"].tolist(), strict=True)
    )


def _rank_lines(of_rank: RankSummary, host: str) -> Iterator[str]:
    wall_s, parts_s = of_rank.wall_s, of_rank.parts_s
    rest_s = max(0.0, wall_s - sum(parts_s.values()))
    named = [*sorted(parts_s.items(), key=lambda item: -item[1]), ("other", rest_s)]
    parts = ", ".join(
        f"{part} {seconds * MS:.1f} ms ({seconds / wall_s:.0%})" for part, seconds in named
    )
    yield f"  rank {of_rank.rank} on {host}, {wall_s * MS:.1f} ms: {parts}"
    causes = [
        f"{seconds * MS:.2f} ms for rank {peer}"
        for peer, seconds in enumerate(of_rank.waited_for_s)
        if peer != of_rank.rank and seconds > 0.0
    ]
    waits = f"waited {of_rank.waited_s * MS:.2f} ms" + (f", {', '.join(causes)}" if causes else "")
    if of_rank.received_bytes:
        yield (
            f"    {waits}; sent {of_rank.sent_bytes / MB:.2f} MB, received"
            f" {of_rank.received_bytes / MB:.2f} MB at"
            f" >= {of_rank.received_bytes_per_s / MB:.1f} MB/s"
        )
    elif len(of_rank.waited_for_s) > 1:
        yield f"    {waits}"
