"""One GPU is enough to compute and to measure: neither Ray nor a configuration is needed for it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "omegaconf", "grpc", "pyarrow", "tqdm", "scipy", "hypothesis", "pytest")
MODULES = (
    "attention",
    "actors.worker",
    "actors.messages",
    "actors.generation",
    "actors.device_memory",
    *(f"models.{path.stem}" for path in sorted((ROOT / "models").glob("[a-z]*.py"))),
    *(f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("[a-z]*.py"))),
    "tests.ring_conformance",
    "tests.gpu_checks",
)
BLOCKING = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules}:
    importlib.import_module(module)
"""


def run_without(absent: tuple[str, ...], modules: tuple[str, ...]) -> None:
    """Import modules in a process in which others cannot be imported."""
    code = BLOCKING.format(absent=absent, modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_computing_needs_no_ray() -> None:
    """A GPU machine with torch, safetensors and transformers alone runs `make gpu`."""
    run_without(ABSENT, MODULES)


def test_a_blocked_module_is_noticed() -> None:
    """Otherwise the test above would pass whatever is imported."""
    with pytest.raises(AssertionError, match="No module named 'ray'"):
        run_without(ABSENT, ("actors.remote",))
