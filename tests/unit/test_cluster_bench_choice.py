"""Regret, crossover and prediction error of ``auto``, on times that are made up."""

import json
from pathlib import Path

import pytest

from cluster.bench.choice import measure_row, new_token_counts
from cluster.bench.choice_report import Row, crossovers, regret, row, summary, table
from cluster.bench.contestants import NewTokens
from cluster.bench.picture import draw
from cluster.bench.prediction import errors, step_rows
from cluster.bench.prediction import table as prediction_table
from cluster.bench.runs import Measured
from tests.scripted import MACHINE, Scripted, step


def made_row(
    new_tokens: int,
    kv_s: float,
    q_s: float,
    chosen: str,
    *,
    auto_s: float = 1.0,
    auto_prices_s: dict[str, float] | None = None,
) -> Row:
    """Return a row of 100 tokens; all steps are priced 2 s with pass-KV and 1 s with pass-Q."""
    prices_s = {"pass_kv": 2.0, "pass_q": 1.0}
    steps = {
        "pass_kv": step("pass_kv", predicted_s=1.0, prices_s=prices_s),
        "pass_q": step("pass_q", predicted_s=1.0, prices_s=prices_s),
        "auto": step(chosen, predicted_s=1.0, prices_s=auto_prices_s or prices_s),
    }
    seconds = {"pass_kv": kv_s, "pass_q": q_s, "auto": auto_s}
    measured = {
        rule: [Measured(seconds[rule] * factor, 1, {}, (of,)) for factor in (1.0, 0.5, 1.5)]
        for rule, of in steps.items()
    }
    return row(new_tokens, 100 - new_tokens, measured)


def test_regret_is_told_by_forced_runs_and_by_autos_own() -> None:
    """A slow run of auto's own is no wrong choice, and a lucky one hides none."""
    rows = [
        made_row(1, 4.0, 2.0, "pass_q", auto_s=3.0),
        made_row(100, 6.0, 8.0, "pass_q", auto_s=5.0),
    ]
    assert [each["regret"] for each in rows] == [pytest.approx(0.0), pytest.approx(1 / 3)]
    total = regret(rows)
    assert total["of_choice"] == pytest.approx(10 / 8 - 1)
    assert total["direct"] == pytest.approx(8 / 8 - 1)
    assert total["rows"] == 2


def test_rows_that_no_forced_run_repeats_have_no_regret_of_choice() -> None:
    """Whole on one rank, or on the ring behind a first turn that was whole."""
    others = {"pass_kv": 2.1, "pass_q": 1.0}
    rows = [
        made_row(1, 4.0, 2.0, "whole", auto_s=1.0),
        made_row(2, 4.0, 2.0, "pass_kv", auto_s=1.0, auto_prices_s=others),
    ]
    assert [each["regret"] for each in rows] == [None, None]
    assert regret(rows) == {"of_choice": None, "rows": 0, "direct": pytest.approx(-0.5)}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 2.0, 1.0), (100.0, 1.0, 2.0)], [10.0]),  # half way in logarithms
        ([(100.0, 1.0, 2.0), (1.0, 2.0, 1.0)], [10.0]),  # in any order
        ([(1.0, 4.0, 1.0), (16.0, 1.0, 2.0), (100.0, 1.0, 3.0)], [16.0 ** (2 / 3)]),
        ([(1.0, 1.0, 2.0), (100.0, 1.0, 2.0)], []),
        ([(1.0, 2.0, 1.0), (10.0, 1.0, 1.0), (100.0, 1.0, 2.0)], [10.0]),  # a tie on a point
        ([(1.0, 2.0, 1.0), (10.0, 1.0, 2.0), (100.0, 2.0, 1.0)], [10**0.5, 10**1.5]),
        ([(5.0, 2.0, 1.0)], []),
    ],
)
def test_crossovers_are_where_the_faster_algorithm_changes(
    points: list[tuple[float, float, float]], expected: list[float]
) -> None:
    assert crossovers(points) == [pytest.approx(each) for each in expected]


def test_errors_are_medians_over_runs_then_over_rows() -> None:
    """Runs of pass-KV in row 1 take 2, 1 and 3 s; predicted was 1 s, priced 2 s."""
    found = summary([made_row(1, 2.0, 1.0, "pass_q"), made_row(100, 1.0, 2.0, "pass_q")])
    kv = found["errors"]["pass_kv"]
    # Row 1: 1/2, 0, 2/3; row 2: 0, 1, 1/3.
    assert kv["error"] == {"median": pytest.approx((1 / 2 + 1 / 3) / 2), "max": pytest.approx(0.5)}
    assert kv["price_error"]["max"] == pytest.approx(1.0)
    assert found["crossovers_percent"] == [pytest.approx(10.0)]
    assert found["predicted_crossovers_percent"] == []


@pytest.mark.parametrize(
    ("tokens", "percents", "expected"),
    [(1000, [1, 2.5, 100], [10, 25, 1000]), (10, [1, 2.5, 20], [1, 2])],
)
def test_a_miss_rate_is_one_new_token_at_least(
    tokens: int, percents: list[float], expected: list[int]
) -> None:
    assert new_token_counts(tokens, percents) == expected


def test_a_full_miss_begins_with_nothing() -> None:
    """All of 64 tokens are new, for everybody; the first of three turns is to warm up."""
    prices_s = {"pass_kv": 2.0, "pass_q": 1.0}
    people = [
        Scripted(rule, (step(algorithm, predicted_s=2.5, prices_s=prices_s),))
        for rule, algorithm in (("pass_kv", "pass_kv"), ("pass_q", "pass_q"), ("auto", "pass_q"))
    ]
    made = measure_row(people, NewTokens(500), 64, 64, 2)
    assert people[0].first_turns == [[]]
    assert [len(ids) for ids in people[2].turns] == [64] * 3
    assert made["miss_percent"] == 100.0
    assert made["pass_kv"]["seconds"] == [2.0, 3.0]
    assert made["pass_kv"]["error"] == pytest.approx((0.25 + 1 / 6) / 2)
    assert made["auto"]["algorithm"] == "pass_q"


def test_table_and_picture_of_choices(tmp_path: Path) -> None:
    """A line a row; where auto computed the sequence whole it says so, and JSON takes it all."""
    rows = [made_row(1, 2.0, 1.0, "pass_q"), made_row(9, 1.0, 2.0, "whole")]
    report = {
        "benchmark": "ringspan bench choice",
        "kind": "choice",
        "model": "m",
        "machine": MACHINE,
        "tokens": 100,
        "rows": rows,
        **summary(rows),
    }
    text = table(json.loads(json.dumps(report)))
    assert "whole" in text
    assert "1 of 2 rows" in text
    assert "miss rate of 3 %; by prices at none in this range" in text
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_errors_by_phase_and_ring(tmp_path: Path) -> None:
    """Against the coordinator's clock, and against the slowest rank's, which is 10 % less here."""
    fast = Measured(1.0, steps=(step(predicted_s=1.0), step(decode=True, predicted_s=0.9)))
    slow = Measured(2.0, steps=(step(predicted_s=1.0, wall_s=2.0),))
    steps = [*step_rows("N=2", 16, 0, fast), *step_rows("N=2", 16, 0, slow)]
    prefill, decode = errors(steps)
    assert (prefill["phase"], prefill["steps"]) == ("prefill", 2)
    assert prefill["wall"] == {"median": pytest.approx(0.25), "p90": pytest.approx(0.45)}
    assert decode["ranks"]["median"] == pytest.approx(0.0)
    assert decode["wall"]["p90"] == pytest.approx(0.1)

    report = {
        "benchmark": "ringspan bench prediction",
        "kind": "prediction",
        "model": "m",
        "machine": MACHINE,
        "steps": steps,
        "errors": errors(steps),
    }
    assert sum("N=2" in line for line in prediction_table(report).splitlines()) == 4
    draw(report, tmp_path / "picture.png")
