"""What ``ringspan bench requests`` makes of arrivals, runs and step records that are made up."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import ClusterError
from actors.records import StepRecord
from cluster.__main__ import main
from cluster.bench import outside, throughput
from cluster.bench.contestants import Ask
from cluster.bench.latency_report import (
    BOTH,
    LONG,
    RIDES,
    STREAMS,
    TURNS,
    Arrivals,
    Scene,
    gaps,
    overlap,
    ratios,
    run_entry,
)
from cluster.bench.picture import draw
from cluster.bench.requests import table
from cluster.bench.runs import Measured
from cluster.bench.yardsticks import _TransformersRunner
from tests.checkpoints import write_llama_checkpoint
from tests.scripted import MACHINE, step

# A token, then bursts of 4, 4 and 2.
BURSTS: Arrivals = ((1.0, 1), (3.0, 4), (5.0, 4), (6.0, 2))


def report() -> dict[str, Any]:
    """Turns wait twice as long as rides; beside the long prompt all wait three times as long."""
    runs = []
    for cluster, slow in ((RIDES, 1.0), (TURNS, 2.0)):
        alone, beside = (
            tuple((moment_s * factor, tokens) for moment_s, tokens in BURSTS)
            for factor in (slow, 3 * slow)
        )
        scenes = {
            STREAMS: Scene(arrivals=(alone, alone)),
            BOTH: Scene(arrivals=(beside,), long_span_s=(0.0, 36.0)),
            LONG: Scene(long_span_s=(1.0, 10.0)),
        }
        runs += [run_entry((cluster, name), 0.5, [scene] * 2) for name, scene in scenes.items()]
    sizes = {"streams": 2, "prompt": 8, "answer": 11, "long": 64, "ranks": 2}
    asks = [Ask([1] * 5, 3), Ask([1] * 9, 7)]
    names = ["N=2, together", "N=2, one by one", throughput.THEIRS]
    measured = {name: [Measured(i + 1.0)] * 2 for i, name in enumerate(names)}
    burst, mixed = records()
    return {
        "benchmark": "ringspan bench requests",
        "kind": "requests",
        "model": "m",
        "machine": MACHINE,
        "latency": {**sizes, "runs": runs, "ratios": ratios(runs)},
        "throughput": throughput.report(asks, measured, ["N=2"]),
        "outside": outside.report([Measured(0.2, steps=(burst,))], [mixed]),
    }


def records() -> tuple[StepRecord, StepRecord]:
    """A burst of four steps of two rows in 160 ms, of which ranks time 130; and a mixed step."""
    burst = dataclasses.replace(
        step(decode=True, wall_s=0.160),
        sequence_ids=(1, 2),
        decode_tokens=8,
        plan_s=0.004,
        ranks_wall_s=(0.140, 0.100),
        ranks_parts_s=({"gemm": 0.1, "wait": 0.03}, {"gemm": 0.01}),
    )
    return burst, dataclasses.replace(burst, phase="mixed", decode_tokens=1, prefill_tokens=90)


def test_a_gap_is_what_a_reader_waits() -> None:
    """A burst is one wait, however many tokens it brings; per token it is spread over them."""
    entry = run_entry((RIDES, STREAMS), 0.5, [Scene(arrivals=(BURSTS,))])
    assert entry["gaps"] == [[(2.0, 4), (2.0, 4), (1.0, 2)]]
    assert (entry["p50_s"], entry["max_s"]) == ([2.0], [2.0])
    assert entry["per_token_s"] == [pytest.approx(0.5)]
    assert entry["p95_over_target"] == pytest.approx(4.0)
    assert "long_s" not in entry


@pytest.mark.parametrize(
    ("span_s", "expected"),
    [
        ((0.0, 9.0), [2.0, 2.0, 1.0]),
        ((3.5, 4.5), [2.0]),  # within one gap
        ((3.0, 5.0), [2.0]),  # it came after the second delta, and was answered with the third
        ((2.0, 5.5), [2.0, 2.0, 1.0]),
    ],
)
def test_gaps_beside_a_long_prompt_are_those_it_had_a_part_in(
    span_s: tuple[float, float], expected: list[float]
) -> None:
    scene = Scene(arrivals=(BURSTS,), long_span_s=span_s)
    assert [gap_s for gap_s, _ in gaps(scene)] == expected


def test_streams_that_ended_too_early_are_told() -> None:
    """Else quiet gaps would be reported as those beside a prompt."""
    for scene in (
        Scene(arrivals=(BURSTS,), long_span_s=(7.0, 9.0)),
        Scene(arrivals=(BURSTS[:1],)),
    ):
        with pytest.raises(ClusterError, match="ask for longer answers"):
            gaps(scene)


def test_overlap_ends_with_the_last_stream() -> None:
    assert overlap(Scene(arrivals=(BURSTS,), long_span_s=(2.0, 10.0))) == pytest.approx(0.5)
    assert overlap(Scene(arrivals=(BURSTS,), long_span_s=(2.0, 4.0))) == 1.0


def test_ratios_compare_clusters_and_what_runs_beside() -> None:
    found = {(r["what"], r["of"], r["over"]): r["median"] for r in report()["latency"]["ratios"]}
    assert len(found) == 9
    assert found["p95_s", f"{RIDES}: {BOTH}", f"{RIDES}: {STREAMS}"] == pytest.approx(3.0)
    assert found["per_token_s", f"{TURNS}: {BOTH}", f"{RIDES}: {BOTH}"] == pytest.approx(2.0)
    assert found["long_s", f"{RIDES}: {BOTH}", f"{RIDES}: {LONG}"] == pytest.approx(4.0)


def test_throughput_counts_tokens_that_were_asked_for() -> None:
    """Not those that a batch makes beyond the shorter answers' ends."""
    found = report()["throughput"]
    assert (found["answer_tokens"], found["longest_answer"]) == (10, 7)
    assert [run["tokens_per_s"] for run in found["runs"]] == pytest.approx([10.0, 5.0, 10 / 3])
    assert [each["median"] for each in found["ratios"]] == pytest.approx([2.0, 3.0])


def test_rounds_of_mixed_requests_are_of_equal_sizes() -> None:
    """So that they can be compared, with tokens of their own."""
    options = argparse.Namespace(mixed=20, repeats=2, mixed_prompts=(3, 9), mixed_answers=(1, 4))
    rounds = list(throughput.mixed_asks(options, 100))
    shapes = [[(len(ask.token_ids), ask.answer_tokens) for ask in asks] for asks in rounds]
    assert shapes[0] == shapes[1] == shapes[2]
    assert {prompt for prompt, _ in shapes[0]} == set(range(3, 10))
    assert {answer for _, answer in shapes[0]} == {1, 2, 3, 4}
    assert rounds[1][0].token_ids != rounds[2][0].token_ids


def test_time_outside_the_model_is_told_for_each_decode_step() -> None:
    """Of the slowest rank: what another spends waits for it."""
    burst, mixed = records()
    entry = outside.phase_entry("decode", [burst, mixed])
    assert entry is not None
    assert (entry["plans"], entry["decode_steps"]) == (1, 4)
    assert entry["parts_us"] == pytest.approx({"plan": 1000, "ray": 5000, "other": 2500})
    assert entry["total_us"] == pytest.approx(8500)
    assert entry["share_of_20_ms"] == pytest.approx(0.425)
    assert entry["step_s"] == pytest.approx(0.041)

    beside = outside.phase_entry("mixed", [burst, mixed])
    assert beside is not None
    assert beside["total_us"] == pytest.approx(34000)


def test_bursts_of_unequal_rows_do_not_count() -> None:
    """A record has their sum only, and no count of steps follows from it."""
    burst, _ = records()
    assert outside.decode_steps(dataclasses.replace(burst, decode_tokens=7)) is None
    assert outside.phase_entry("decode", [dataclasses.replace(burst, decode_tokens=7)]) is None


def test_what_no_step_accounts_for_is_told() -> None:
    burst, mixed = records()
    runs = [Measured(0.164 * 2 + 0.010, steps=(burst, mixed))]
    assert outside.in_no_step_us(runs) == pytest.approx(5000)


def test_table_and_picture_of_requests(tmp_path: Path) -> None:
    """A line for each run and ratio, from JSON as well, and a PNG."""
    lines = table(json.loads(json.dumps(report()))).splitlines()
    assert sum(" = " in line for line in lines) == 9 + 2
    assert sum(line.startswith(("decode rides", "decode takes")) for line in lines) == 6
    assert any(line.split()[:3] == ["decode", "1", "4"] for line in lines)
    draw(report(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_of_another_length_is_no_measurement() -> None:
    with pytest.raises(ClusterError, match="N=2 made 3 tokens where 4 were asked for"):
        Ask([1, 2], 4).check("N=2", 3)


def test_transformers_batch_has_every_token_of_the_longest(tmp_path: Path) -> None:
    """Prompts of unequal lengths, padded; no end of sequence ends a row."""
    runner = _TransformersRunner(str(write_llama_checkpoint(tmp_path)), torch.get_num_threads())
    measured = runner.batch([[5, 6, 7], [8]], 6)
    assert measured.seconds > 0
    assert measured.peak_bytes > 2**20


@pytest.mark.parametrize(
    "flags",
    [
        ["--answer", "1"],
        ["--streams", "0"],
        ["--ranks", "0"],
        ["--long", "-5"],
        ["--mixed-prompts", "32"],
        ["--mixed-prompts", "0,4"],
        ["--mixed-answers", "9,4"],
        ["--mixed-answers", "a,4"],
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "requests", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ringspan: {flags[0]} must be ")
    assert error.count("\n") == 1
