"""What every kind of `ringspan bench` makes of its runs and flags."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.__main__ import main
from cluster.bench.command import _checkpoint, read_counts, read_percents
from cluster.bench.contestants import NewTokens
from cluster.bench.conversation import ANEW, KEPT, ONE, PAIRS, THEIRS, second_turns
from cluster.bench.picture import draw
from cluster.bench.runs import Measured, entry, interleave, paired_ratios, ratio_table
from cluster.bench.speed import PAIRS as SPEED_PAIRS
from cluster.bench.speed import PREFILL_PAIRS
from cluster.bench.yardsticks import _TransformersRunner
from models.errors import PromptError
from tests.checkpoints import write_llama_checkpoint
from tests.scripted import MACHINE, Scripted

NAMES = ("N=2", "N=1, 2 threads", "N=1", "ideal N=2", "transformers, 2 threads")


def report(tokens: tuple[int, ...] = (64, 128)) -> dict[str, Any]:
    """Runs of 1, 2, 3 ... seconds, each contestant twice as slow as the one before."""
    runs = [
        entry(name, [Measured(2.0**i * s, 2**20, {"gemm": s}) for s in (1.0, 3.0, 2.0)], tokens=n)
        for n in tokens
        for i, name in enumerate(NAMES)
    ]
    return {
        "benchmark": "ringspan bench prefill",
        "kind": "prefill",
        "model": "m",
        "machine": MACHINE,
        "runs": runs,
        "ratios": paired_ratios(runs, SPEED_PAIRS + PREFILL_PAIRS),
    }


def test_entries_hold_medians_and_the_largest_peak() -> None:
    made = entry("N=1", [Measured(3.0, 5), Measured(1.0, 9, {"wait": 4.0}), Measured(2.0, 1)])
    assert (made["median_s"], made["peak_bytes"]) == (2.0, 9)
    assert made["parts_s"] == {"wait": 0.0}
    assert made["algorithm"] is None


def test_ratios_are_medians_of_pairs() -> None:
    """Run by run, so that a slow minute of the machine falls on both sides."""
    ratios = {(r["tokens"], r["of"], r["over"]): r["median"] for r in report()["ratios"]}
    assert ratios[64, "transformers, 2 threads", "N=2"] == pytest.approx(16.0)
    assert ratios[128, "N=2", "ideal N=2"] == pytest.approx(1 / 8)
    assert len(ratios) == 12


def test_everybody_runs_before_anybody_runs_again() -> None:
    order: list[tuple[str, int]] = []

    def act(name: str, number: int) -> Measured:
        order.append((name, number))
        return Measured(float(number))

    actions = {"a": lambda number: act("a", number), "b": lambda number: act("b", number)}
    measured = interleave(actions, [1, 2])
    assert order == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert [run.seconds for run in measured["b"]] == [1.0, 2.0]


def test_table_and_picture(tmp_path: Path) -> None:
    """A line for each run and each ratio, and a PNG."""
    lines = ratio_table(report()).splitlines()
    assert sum("gemm" in line for line in lines) == 10
    assert sum(" = " in line for line in lines) == 12
    draw(report(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_second_turns_are_other_tokens_behind_one_first_turn(tmp_path: Path) -> None:
    """Else a repeat would find the tokens of the one before it cached."""
    people = [Scripted(name) for name in (KEPT, ANEW, ONE, THEIRS)]
    tokens = NewTokens(100)
    runs = second_turns(people, tokens, 50, 7, 3) + second_turns(people, tokens, 90, 7, 3)

    assert [len(person.first_turns) for person in people] == [2, 2, 2, 2]
    assert [len(ids) for ids in people[0].first_turns] == [50, 90]
    for turns in (people[0].turns[:4], people[0].turns[4:]):  # one of them to warm up
        assert [len(ids) for ids in turns] == [7] * 4
        assert len({ids[0] for ids in turns}) == 4
    assert people[0].turns == people[3].turns
    assert [len(run["seconds"]) for run in runs] == [3] * 8

    made = report() | {"kind": "conversation", "new_tokens": 7, "runs": runs}
    made["ratios"] = paired_ratios(runs, PAIRS)
    assert sum(" = " in line for line in ratio_table(made).splitlines()) == 8
    draw(made, tmp_path / "picture.png")


def test_each_turn_of_transformers_begins_with_the_same_cache(tmp_path: Path) -> None:
    """And computes the new tokens alone: its peak and time are those of a second turn."""
    checkpoint = write_llama_checkpoint(tmp_path)
    runner = _TransformersRunner(str(checkpoint), torch.get_num_threads())
    runner.begin(list(range(20)))
    for new_ids in ([30, 31, 32], [40], [50, 51]):
        assert runner.turn(new_ids).seconds > 0
        assert runner._cache.get_seq_length() == 20


def test_no_two_draws_begin_alike() -> None:
    """And when there is nothing new to begin with, that is said instead of measuring a hit."""
    tokens = NewTokens(3)
    assert len({tokens(2)[0] for _ in range(3)}) == 3
    with pytest.raises(PromptError, match="ask for fewer --repeats"):
        tokens(2)
    assert tokens.context(0) == []
    assert len(tokens(1)) == 1


@pytest.mark.parametrize("text", ["", "1,b", "0", "4,-1"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match="--lengths must be"):
        read_counts("lengths", text)


@pytest.mark.parametrize("text", ["", "ten", "0", "100.5", "nan", "5,-1"])
def test_wrong_miss_rates_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match="--miss must be"):
        read_percents("miss", text)


def test_lists_keep_their_order_and_lose_doubles() -> None:
    assert read_counts("cached", "8,0,8", least=0) == [8, 0]
    assert read_percents("miss", "2.5,100,2.5") == [2.5, 100.0]


@pytest.mark.parametrize(
    "flags",
    [
        ["prefill", "--repeats", "0"],
        ["conversation", "--new-tokens", "-1"],
        ["conversation", "--lengths", "1,x"],
        ["choice", "--tokens", "0"],
        ["choice", "--miss", "101"],
        ["prediction", "--cached", "-1"],
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any process starts."""
    assert main(["bench", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ringspan: {flags[1]} must be ")
    assert error.count("\n") == 1


def test_a_checkpoint_of_ones_own_is_taken_where_it_lies(tmp_path: Path) -> None:
    assert _checkpoint("models/mine", tmp_path) == Path("models/mine")
    assert not list(tmp_path.iterdir())
