"""The installed distribution is ours alone, and its parts hang together."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "actors", "models", "attention", "configs", "k8s")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_belong_to_ringspan_alone(package: str) -> None:
    """Other distributions install a `cluster` or an `attention` too; one would overwrite ours."""
    assert set(importlib.metadata.packages_distributions()[package]) == {"ringspan"}


def test_console_script_works_from_any_directory(tmp_path: Path) -> None:
    """The command is on the path of whoever installed the distribution."""
    command = [str(Path(sys.executable).with_name("ringspan")), "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert "generate" in run.stdout


def test_users_need_no_heavy_imports_for_help() -> None:
    """`import configs` brings neither torch nor ray."""
    code = "import configs, sys; assert not {'torch', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_constraints_satisfy_the_ranges_of_pyproject() -> None:
    """Every pinned version that pyproject names lies in its range."""
    packaging_requirements = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for line in importlib.metadata.requires("ringspan") or []:
        requirement = packaging_requirements.Requirement(line)
        if requirement.name in pins and requirement.marker is None:
            assert pins[requirement.name] in requirement.specifier, line


def test_documents_name_files_that_exist() -> None:
    """Every path in backquotes in the README and docs/ is there."""
    pattern = re.compile(r"`((?:attention|models|actors|cluster|configs|k8s|tests|docs)/[\w/.]*)`")
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in pattern.findall(document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
