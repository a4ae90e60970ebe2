"""What must be right on the device: the ring over NCCL, and the tests of tests/gpu."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.measure import RowWriter
from benchmarks.rows import Row
from benchmarks.sizes import Sizes
from tests.gpu_checks import CHECKS
from tests.nccl_ranks import nccl_version, why_not
from tests.process_ranks import ProcessRanks
from tests.ring_conformance import COLLECTIVE_CHECKS, EXCHANGE_CHECKS

ROOT = Path(__file__).parents[1]
PYTEST_TIMEOUT_S = 570.0


def run_nccl(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Run the conformance suite between processes; on CPU they use gloo."""
    version = nccl_version()
    reason = why_not(sizes.nccl_ranks, torch.cuda.device_count(), version)
    if device.type == "cuda" and reason is not None:
        rows.write({"check": "all", "skipped": reason})
        return
    backend = "nccl " + ".".join(map(str, version)) if version else "gloo"
    with ProcessRanks(sizes.nccl_ranks, device.type) as ranks:
        for check in (*EXCHANGE_CHECKS, *COLLECTIVE_CHECKS):
            labels = {"check": check.__name__, "ranks": sizes.nccl_ranks, "over": backend}
            if not rows.measure(labels, partial(_holds, partial(ranks.run, check))):
                return  # the ranks may be out of step


def run_checks(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Run tests/gpu by pytest, or, where that is missing, the same checks without it."""
    has_pytest = all(importlib.util.find_spec(name) for name in ("pytest", "pytest_timeout"))
    if device.type == "cuda" and has_pytest:
        _run_pytest(rows)
        return
    for name, check in CHECKS.items():
        if not sizes.only_checks or name in sizes.only_checks:
            rows.measure({"check": name}, partial(_holds, partial(check, device)))


def _holds(check: Callable[[], None]) -> Row:
    check()
    return {"right": True}


def _run_pytest(rows: RowWriter) -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        # Warnings of other versions of libraries are no failure of ours.
        command = [sys.executable, "-m", "pytest", "tests/gpu/test_device.py", "-m", "gpu", "-q"]
        command += ["-W", "default", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, timeout=PYTEST_TIMEOUT_S, check=False)
        for row in junit_rows(report.read_text(encoding="utf-8")):
            rows.write(row)


def junit_rows(report: str) -> list[Row]:
    """Return a row for each test of pytest's XML report."""
    rows = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        row: Row = {"check": case.get("name"), "wall_s": float(case.get("time", "0"))}
        problems = {child.tag: child.get("message", "") for child in case}
        if "skipped" in problems:
            row["skipped"] = problems["skipped"]
        elif problems.keys() & {"failure", "error"}:
            row["error"] = (problems.get("failure") or problems.get("error") or "")[:300]
        else:
            row["right"] = True
        rows.append(row)
    return rows
