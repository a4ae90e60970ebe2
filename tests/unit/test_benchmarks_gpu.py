"""Every section runs on CPU at toy sizes through the code that runs on CUDA."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.measure import RowWriter
from benchmarks.one_rank import LoneRing
from benchmarks.plan import SECTIONS
from benchmarks.report import status_of
from benchmarks.rows import read_rows
from benchmarks.sizes import ON_CPU
from tests.ring_conformance import COLLECTIVE_CHECKS, Check

WRITE_A_ROW = "import sys; open(sys.argv[1], 'a').write('{\"ms\": 1.5}\\n'); "


@pytest.mark.parametrize("name", SECTIONS)
def test_section_runs_on_cpu(tmp_path: Path, name: str) -> None:
    """What breaks here would break on a GPU, where minutes are dear."""
    rows = tmp_path / "rows.jsonl"

    assert gpu._run_section(name, ON_CPU, "cpu", rows) == 0

    assert status_of(read_rows(rows), "") == "ok", read_rows(rows)


def test_run_writes_results_with_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way of a whole run: processes, rows, ratios, files, and a short table last."""
    arguments = ["--device", "cpu", "--quick", "--only", "decode", "--out", str(tmp_path)]

    assert gpu.main([*arguments, "--commit", "abc"]) == 0

    (path,) = tmp_path.glob("gpu_cpu_*.json")
    results = json.loads(path.read_text())
    assert results["facts"]["commit"] == "abc"
    assert results["sections"]["decode"]["rows"][0]["of_copy"] > 0
    assert path.with_suffix(".md").is_file()
    assert capsys.readouterr().out.splitlines()[-3].startswith("rates      ok")


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ("sys.exit(3)", "its process ended with status 3"),
        ("import time; time.sleep(60)", "not done after 3 s"),
    ],
)
def test_a_section_that_ends_badly_keeps_its_rows(tmp_path: Path, ending: str, error: str) -> None:
    """A kernel may kill its process, or hang it."""
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", WRITE_A_ROW + ending, str(rows)]

    outcome = gpu._outcome(command, rows, dict(os.environ), timeout_s=3.0)

    assert outcome.status == "failed"
    assert outcome.error == error
    assert outcome.rows == [{"ms": 1.5}]


def test_a_size_that_fails_does_not_end_its_section(tmp_path: Path) -> None:
    """One length too many for the memory leaves the others."""
    path = tmp_path / "rows.jsonl"
    writer = RowWriter(path, torch.device("cpu"))

    def fail() -> dict[str, object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    assert not writer.measure({"tokens": 1}, fail)
    assert writer.measure({"tokens": 2}, lambda: {"ms": 1.0})

    failed, done = read_rows(path)
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert done["ms"] == 1.0


def test_sections_without_time_are_not_started(tmp_path: Path) -> None:
    """What there was no time for is said, and is no failure."""
    arguments = ["--device", "cpu", "--quick", "--only", "rates", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--time-limit-s", "1"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["sections"]["rates"]["error"] == "no time was left"


@pytest.mark.parametrize("check", COLLECTIVE_CHECKS, ids=lambda check: check.__name__)
def test_lone_ring_conforms(check: Check) -> None:
    """It stands for a process group of one."""
    check(LoneRing(), torch.device("cpu"))
