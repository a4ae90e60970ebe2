"""`ringspan bench serve` at toy size, before a real cluster."""

import argparse
import json
from pathlib import Path

import pytest

from cluster import bench


@pytest.mark.campaign
def test_all_doors_answer_alike(
    shared_ray: None, needle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of the report is there, without errors, and the picture is drawn."""
    parser = argparse.ArgumentParser()
    bench.add_command(parser.add_subparsers())
    flags = "--random-input-len 8,16 --random-output-len 2,4 --num-prompts 4 --request-rate 50,inf"
    options = parser.parse_args(
        ["bench", "serve", "--model", str(needle), *flags.split(), "--repeats", "2"]
        + ["--streams", "32", "--json", "--output", str(tmp_path)]
    )
    assert options.run(options) == 0
    report = json.loads(capsys.readouterr().out)
    assert {run["door"] for run in report["loads"]} == {"handle", "grpc", "http"}
    assert len(report["loads"]) == 6
    for run in report["loads"] + report["concurrent"]:
        assert run["errors"] == 0, run["first_errors"]
    assert all(many["same"] == many["compared"] == 16 for many in report["concurrent"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt", ".png"}
