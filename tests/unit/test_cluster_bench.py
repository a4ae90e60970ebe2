"""What `ringspan bench` makes of its runs."""

from pathlib import Path
from typing import Any

import pytest

from cluster.bench import _entry, _lengths, _ratios, table
from cluster.bench_picture import draw
from cluster.contestants import Measured
from models.errors import PromptError

NAMES = ("N=2", "N=1, 2 threads", "N=1", "ideal N=2", "transformers, 2 threads")


def report(tokens: tuple[int, ...] = (64, 128)) -> dict[str, Any]:
    """Runs of 1, 2, 3 ... seconds, each contestant twice as slow as the one before."""
    runs = [
        _entry(length, name, [Measured(2.0**i * s, 2**20, {"gemm": s}) for s in (1.0, 3.0, 2.0)])
        for length in tokens
        for i, name in enumerate(NAMES)
    ]
    machine = {"cpu": "a machine", "date": "2026-01-01"}
    return {
        "benchmark": "ringspan bench prefill",
        "model": "m",
        "machine": machine,
        "runs": runs,
        "ratios": _ratios("prefill", runs),
    }


def test_entries_hold_medians_and_the_largest_peak() -> None:
    entry = _entry(8, "N=1", [Measured(3.0, 5), Measured(1.0, 9, {"wait": 4.0}), Measured(2.0, 1)])
    assert (entry["median_s"], entry["peak_bytes"]) == (2.0, 9)
    assert entry["parts_s"] == {"wait": 0.0}


def test_ratios_are_medians_of_pairs() -> None:
    """Run by run, so that a slow minute of the machine falls on both sides."""
    ratios = {(r["tokens"], r["of"], r["over"]): r["median"] for r in report()["ratios"]}
    assert ratios[64, "transformers, 2 threads", "N=2"] == pytest.approx(16.0)
    assert ratios[128, "N=2", "ideal N=2"] == pytest.approx(1 / 8)
    assert len(ratios) == 12


def test_table_and_picture(tmp_path: Path) -> None:
    """A line for each run and each ratio, and a PNG."""
    lines = table(report()).splitlines()
    assert sum("gemm" in line for line in lines) == 10
    assert sum(" = " in line for line in lines) == 12
    draw(report(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "1,b", "0", "4,-1"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match="--lengths must be"):
        _lengths(text)
