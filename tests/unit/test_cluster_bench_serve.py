"""`ringspan bench serve`: plans of loads, and what samples come to."""

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from cluster.bench.contestants import Ask
from cluster.bench.serve import read_rates
from cluster.bench.serve_load import MIXES, Piece, Sample, arrivals_s, make_asks, play
from cluster.bench.serve_report import cost_entry, load_entry, meets, percentiles, read_goodput
from models.errors import PromptError


def test_arrivals_are_poisson_and_seeded() -> None:
    """Gaps have the mean 1 / rate, and so much spread; inf is all at once."""
    moments_s = arrivals_s(4.0, 4000, seed=1)
    assert moments_s == arrivals_s(4.0, 4000, seed=1) != arrivals_s(4.0, 4000, seed=2)
    assert moments_s[0] == 0
    assert moments_s[-1] / 3999 == pytest.approx(0.25, rel=0.1)
    assert arrivals_s(math.inf, 3, seed=0) == [0, 0, 0]


def test_loads_have_the_same_lengths_and_other_tokens() -> None:
    """Else a door would find the prompts of the one before it cached."""
    first, second = (
        make_asks(MIXES["mixed"], 50, 256, shared=0.5, seed=3, salt=salt) for salt in (1, 2)
    )
    lengths = [[(len(ask.token_ids), ask.answer_tokens) for ask in of] for of in (first, second)]
    assert lengths[0] == lengths[1]
    assert all(
        a.token_ids[0] != b.token_ids[0] or a != b for a, b in zip(first, second, strict=True)
    )
    assert {tuple(ask.token_ids[:32]) for ask in first} == {tuple(first[0].token_ids[:32])}
    assert len({tuple(ask.token_ids) for ask in first}) == 50


def _sample(error: str | None = None) -> Sample:
    """Planned at 1, sent late at 2; pieces at 3, 4 and 6."""
    arrivals = [(3.0, 1), (4.0, 2), (6.0, 1)]
    return Sample(planned_s=1, sent_s=2, arrivals=arrivals, token_ids=[1, 2, 3, 4], error=error)


def test_latency_counts_from_the_planned_moment() -> None:
    """A generator that is late must not look fast."""
    sample = _sample()
    assert (sample.ttft_s, sample.e2el_s, sample.gaps_s, sample.tpot_s) == (2, 5, [1, 2], 1)


def test_goodput_takes_all_goals_and_no_error() -> None:
    """At the limit is within it."""
    assert meets(_sample(), read_goodput("ttft:2000,itl:2000,e2el:5000,tpot:1000"))
    assert not meets(_sample(), {"ttft": 1.9})
    assert not meets(_sample(), {"itl": 1.5})
    assert not meets(_sample(error="broken"), {})
    for text in ("ttft", "ttft:0", "speed:5", "ttft:x", "itl:inf"):
        with pytest.raises(PromptError, match="--goodput"):
            read_goodput(text)


def test_a_load_counts_its_errors_apart() -> None:
    """They have no latency, but are requests that did not meet the goals."""
    entry = load_entry("grpc", math.inf, [_sample(), _sample("broken")], {"ttft": 2.0})
    assert (entry["requests"], entry["errors"], entry["goodput_share"]) == (2, 1, 0.5)
    assert entry["tokens_per_s"] == pytest.approx(4 / 5)
    assert entry["ttft_s"] == {"p50": 2, "p95": 2, "p99": 2}
    assert entry["sent_late_s"]["p50"] == 1
    assert entry["request_rate"] == "inf"
    assert percentiles([]) is None


def test_a_door_costs_the_median_of_paired_differences() -> None:
    """A slow moment of the machine is in both of a pair."""
    cost = cost_entry(1, {"handle": [1.0, 5.0, 1.0], "grpc": [1.5, 5.25, 1.25]})
    assert cost["over_handle_s"] == {"grpc": 0.25}
    assert cost_entry(1, {"http": [1.0]})["over_handle_s"] == {}


def test_rates() -> None:
    """Inf is a rate; zero is none."""
    assert read_rates("1,2.5,inf,1") == [1, 2.5, math.inf]
    for text in ("0", "-1", "a", "nan"):
        with pytest.raises(PromptError, match="--request-rate"):
            read_rates(text)


def test_a_failed_request_leaves_the_others_alone() -> None:
    """Too few tokens is an error too."""

    async def door(ask: Ask) -> AsyncIterator[Piece]:
        if ask.answer_tokens == 3:
            raise OSError("gone")
        yield (1,), None
        yield (2,), "length"

    asks = [Ask([1], answer) for answer in (2, 3, 4)]
    samples = asyncio.run(play(door, asks, [0.0, 0.0, 0.01]))
    assert [sample.error for sample in samples] == [
        None,
        "OSError: gone",
        "2 tokens of 4, ended by length",
    ]
    assert samples[2].planned_s - samples[0].planned_s == pytest.approx(0.01)
