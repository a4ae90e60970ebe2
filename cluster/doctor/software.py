"""What is installed, and whether it is what is imported."""

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cluster.doctor.finding import Finding, ok, problem, warning

ROOT = Path(__file__).parents[2]
OURS = ("cluster", "actors", "attention", "models", "configs")
TOLD = ("torch", "ray", "pyarrow", "grpcio", "transformers")


def check_python() -> Finding:
    """The interpreter against what the project asks for."""
    return judge_python(sys.version_info[:3], _metadata()[0])


def judge_python(version: tuple[int, ...], requires: str) -> Finding:
    """Compare a version with ``>=3.11``."""
    found = ".".join(map(str, version))
    least = tuple(int(part) for part in re.findall(r"\d+", requires))
    if version < least:
        advice = f"make the virtual environment anew with Python {requires}"
        return problem("python", f"this is Python {found}, but {requires} is needed", advice)
    return ok("python", f"{found}, of {sys.executable}")


def check_packages() -> list[Finding]:
    """Every package that is needed, against the range that it must be of."""
    requirements = _metadata()[1]
    versions: dict[str, str | None] = {}
    for requirement in requirements:
        name = _name(requirement)
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return judge_packages(requirements, versions)


def judge_packages(
    requirements: Sequence[str], versions: Mapping[str, str | None]
) -> list[Finding]:
    """Name each package that is missing or out of its range."""
    wrong = []
    for requirement in requirements:
        name = _name(requirement)
        version = versions.get(name)
        advice = f"pip install '{requirement}'"
        if version is None:
            sentence = f"{name} is not installed, but {requirement} is needed"
            wrong.append(problem("packages", sentence, advice))
        elif not _is_within(requirement, version):
            sentence = f"{name} is {version}, but {requirement} is needed"
            wrong.append(problem("packages", sentence, advice))
    told = ", ".join(f"{name} {versions[name]}" for name in TOLD if versions.get(name))
    return wrong or [ok("packages", f"all {len(requirements)} are within their ranges: {told}")]


def _is_within(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then only a minimum is understood, which is all that is asked for
        least = requirement.partition(">=")[2]
        return _numbers(version) >= _numbers(least)
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~;\s]", requirement, maxsplit=1)[0]


def _metadata() -> tuple[str, list[str]]:
    """Return the range of Python and the requirements, of the checkout or of what is installed."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return values["requires-python"], list(values["dependencies"])
    found = importlib.metadata.metadata("ringspan")
    requires = [
        each for each in importlib.metadata.requires("ringspan") or () if "extra" not in each
    ]
    return found["Requires-Python"], requires


def check_shadows() -> list[Finding]:
    """Whether our packages are ours: their names are common ones."""
    places = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places[name] = None if spec is None or spec.origin is None else Path(spec.origin).parent
    owners = importlib.metadata.packages_distributions()
    return judge_shadows(ROOT, places, {name: owners.get(name, []) for name in OURS}, Path.cwd())


def judge_shadows(
    root: Path,
    places: Mapping[str, Path | None],
    owners: Mapping[str, Collection[str]],
    directory: Path,
) -> list[Finding]:
    """Name each package of ours that is, or for Ray's workers would be, somebody else's.

    Args:
        root: Where this code lies.
        places: The folder from which each package is imported.
        owners: The distributions that have installed each.
        directory: From which Ray's workers import first.
    """
    wrong = []
    for name, place in places.items():
        if place is None or place.resolve() != (root / name).resolve():
            wrong.append(
                problem(
                    "own packages",
                    f"{name} is imported from {place or 'nowhere'}, not from {root / name}",
                    "another folder of that name comes first on sys.path: start in another"
                    " directory, unset PYTHONPATH, or rename it",
                )
            )
        others = set(owners.get(name, ())) - {"ringspan"}
        if others:
            wrong.append(
                problem(
                    "own packages",
                    f"{', '.join(sorted(others))} installs a package {name} too, over ours",
                    f"pip uninstall {' '.join(sorted(others))}, then install ringspan again",
                )
            )
        nearby = directory / name
        if (nearby / "__init__.py").is_file() and nearby.resolve() != (root / name).resolve():
            wrong.append(
                warning(
                    "own packages",
                    f"this directory has a package {name}, which Ray's workers import before ours",
                    "start in another directory",
                )
            )
    return wrong or [ok("own packages", f"{', '.join(places)} are those of {root}")]
