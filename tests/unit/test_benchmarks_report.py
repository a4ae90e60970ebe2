"""What becomes of rows: ratios, files that keep what they have, a status that is not too kind."""

import json
import lzma
import zipfile
from pathlib import Path

import pytest

from benchmarks.correctness import junit_rows
from benchmarks.nccl_library import unpacked
from benchmarks.report import Outcome, add_ratios, status_of, summary, table, write_files
from benchmarks.rows import Row

FACTS = {"device": "NVIDIA H200", "date": "2026-01-02", "commit": "abc"}


@pytest.mark.parametrize(
    ("rows", "error", "status"),
    [
        ([{"right": True}], "", "ok"),
        ([{"right": True}, {"right": False}], "", "failed"),
        ([{"ms": 1.0}, {"error": "OutOfMemoryError"}], "", "failed"),
        ([{"ms": 1.0}], "not done after 3 s", "failed"),
        ([{"skipped": "one GPU"}], "", "not run"),
        ([], "", "not run"),
    ],
)
def test_status_of_a_section(rows: list[Row], error: str, status: str) -> None:
    """A wrong answer is a failure, and what was skipped is no success."""
    assert status_of(rows, error) == status


def test_ratios_are_to_the_rates_of_the_same_run() -> None:
    outcomes = {
        "rates": Outcome(
            status="ok",
            rows=[
                {"what": "GEMM 8192", "dtype": "bfloat16", "tflop_per_s": 800.0},
                {"what": "GEMM 8192", "dtype": "float32", "tflop_per_s": 50.0},
                {"what": "copy", "gb_per_s": 4000.0},
            ],
        ),
        "attention": Outcome(status="ok", rows=[{"tflop_per_s": 400.0}, {"error": "no"}]),
        "decode": Outcome(status="ok", rows=[{"gb_per_s": 1000.0}]),
    }

    add_ratios(outcomes)

    assert outcomes["attention"].rows == [{"tflop_per_s": 400.0, "of_gemm": 0.5}, {"error": "no"}]
    assert outcomes["decode"].rows[0]["of_copy"] == 0.25


def test_without_rates_there_are_no_ratios() -> None:
    outcomes = {"attention": Outcome(status="ok", rows=[{"tflop_per_s": 400.0}])}
    add_ratios(outcomes)
    assert outcomes["attention"].rows == [{"tflop_per_s": 400.0}]


def test_a_later_run_adds_to_the_file_of_its_commit_and_day(tmp_path: Path) -> None:
    """Where GPU time comes in short pieces, one run makes the exams, another one the rates."""
    write_files(tmp_path, FACTS, {"needle": Outcome(status="ok", rows=[{"right": True}])})
    path = write_files(tmp_path, FACTS, {"nccl": Outcome(status="failed", error="why")})

    assert path.name == "gpu_NVIDIA-H200_2026-01-02.json"
    sections = json.loads(path.read_text())["sections"]
    assert [*sections] == ["nccl", "needle"]
    assert sections["needle"]["rows"] == [{"right": True}]
    page = path.with_suffix(".md").read_text()
    assert "Needle exams: ok" in page
    assert "    why" in page


def test_another_commits_results_are_not_overwritten(tmp_path: Path) -> None:
    first = write_files(tmp_path, FACTS, {"nccl": Outcome(status="ok")})
    second = write_files(tmp_path, FACTS | {"commit": "def"}, {"nccl": Outcome(status="failed")})

    assert second.name == "gpu_NVIDIA-H200_2026-01-02_2.json"
    assert json.loads(first.read_text())["facts"]["commit"] == "abc"


def test_table_has_a_column_for_every_key() -> None:
    rows: list[Row] = [{"ms": 1.23456, "right": True}, {"ms": 2.0, "error": "a | b"}]
    assert table(rows).splitlines() == [
        "| ms | right | error |",
        "| --- | --- | --- |",
        "| 1.235 | yes |  |",
        "| 2 |  | a / b |",
    ]


def test_summary_says_what_was_skipped() -> None:
    outcomes = {"nccl": Outcome(status="not run", rows=[{"skipped": "found NCCL 2.28"}])}
    assert "0 of 1 right (found NCCL 2.28)" in summary(outcomes)


def test_rows_of_a_pytest_report() -> None:
    report = """<testsuites><testsuite>
      <testcase name="a" time="0.5"/>
      <testcase name="b" time="1"><failure message="AssertionError: 1 != 2">...</failure></testcase>
      <testcase name="c" time="0"><skipped message="no CUDA device"/></testcase>
    </testsuite></testsuites>"""
    assert junit_rows(report) == [
        {"check": "a", "wall_s": 0.5, "right": True},
        {"check": "b", "wall_s": 1.0, "error": "AssertionError: 1 != 2"},
        {"check": "c", "wall_s": 0.0, "skipped": "no CUDA device"},
    ]


def test_nccl_comes_plain_packed_or_in_a_wheel(tmp_path: Path) -> None:
    """Whichever is at hand is given to the ring's processes under the library's own name."""
    plain, packed = tmp_path / "mine.so", tmp_path / "libnccl.so.2.xz"
    plain.write_bytes(b"nccl")
    packed.write_bytes(lzma.compress(b"nccl"))
    wheel, target = tmp_path / "nccl.whl", tmp_path / "unpacked"
    target.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nvidia/nccl/lib/libnccl.so.2", b"nccl")

    for given in (plain, packed, wheel):
        assert unpacked(given, target).read_bytes() == b"nccl"
    with pytest.raises(FileNotFoundError, match="--nccl-preload takes an NCCL library"):
        unpacked(tmp_path / "none.so", target)
