"""A profile is found again by what it depends on, and a bad file is never the user's trouble."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from actors.profile_file import (
    FORMAT,
    ProfileFacts,
    ProfileFile,
    RestoreFacts,
    default_directory,
    device_name,
    host_numbers,
)
from tests.unit.test_models_prices import CPU, TINY
from tests.unit.test_models_restore_rates import DISK

FACTS = ProfileFacts(
    devices=("AMD EPYC, 2 cores",) * 2,
    hosts=(0, 0),
    threads=1,
    dtype="float32",
    kv_cache_dtype="auto",
    model=TINY,
)
RESTORE = RestoreFacts(block_tokens=256, host_dtype="auto", disk_directory="/disk")


@pytest.fixture
def file(tmp_path: Path) -> ProfileFile:
    return ProfileFile(str(tmp_path / "profiles"), FACTS)


def test_rates_are_found_again(file: ProfileFile) -> None:
    """By another process with the same facts; the directory is made."""
    assert file.load() is None

    file.save(CPU)

    assert ProfileFile(str(file.path.parent), FACTS).load() == CPU


@pytest.mark.parametrize(
    "change",
    [
        {"devices": ("NVIDIA H100", "NVIDIA H100")},
        {"hosts": (0, 1)},
        {"threads": 2},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "int8"},
        {"torch": "2.0"},
        {"model": dataclasses.replace(TINY, num_layers=5)},
    ],
)
def test_other_facts_have_other_rates(file: ProfileFile, change: dict[str, object]) -> None:
    """Even under the same name: somebody may have copied a file."""
    file.save(CPU)
    other = ProfileFile(str(file.path.parent), dataclasses.replace(FACTS, **change))  # type: ignore[arg-type]

    assert other.load() is None
    file.path.rename(other.path)
    assert other.load() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 2, "sections": {}}',
    ],
)
def test_a_damaged_file_is_as_none(file: ProfileFile, content: bytes) -> None:
    """It is measured anew and written over."""
    file.path.parent.mkdir()
    file.path.write_bytes(content)

    assert file.load() is None
    file.save(CPU)
    assert file.load() == CPU


def test_rates_of_another_kind_are_as_none(file: ProfileFile) -> None:
    """The section is there, but a number is missing."""
    file.save_section("ring", {"hop": 1})

    assert file.load() is None


def test_sections_live_side_by_side(file: ProfileFile) -> None:
    """Others measure other rates into the same file."""
    file.save(CPU)
    file.save_section("link", {"bytes_per_s": 3e9})

    assert file.section("link") == {"bytes_per_s": 3e9}
    assert file.load() == CPU
    assert json.loads(file.path.read_text())["format"] == FORMAT


def test_rates_of_restores_are_found_again(file: ProfileFile) -> None:
    """Beside those of the ring, which stay."""
    file.save(CPU)
    assert file.load_restore(RESTORE) is None

    file.save_restore(RESTORE, DISK)

    assert ProfileFile(str(file.path.parent), FACTS).load_restore(RESTORE) == DISK
    assert file.load() == CPU


@pytest.mark.parametrize(
    "change",
    [
        {"block_tokens": 512},
        {"host_dtype": "int8"},
        {"disk_directory": None},
        {"disk_directory": "/other"},
        {"xxhash": "0"},
        {"format": 0},
    ],
)
def test_other_stores_have_other_rates(file: ProfileFile, change: dict[str, object]) -> None:
    """The ring's are not theirs: only restores are measured anew."""
    file.save(CPU)
    file.save_restore(RESTORE, DISK)

    assert file.load_restore(dataclasses.replace(RESTORE, **change)) is None  # type: ignore[arg-type]
    assert file.load() == CPU


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"facts": dataclasses.asdict(RESTORE)},
        {"facts": dataclasses.asdict(RESTORE), "rates": [1]},
        {"facts": dataclasses.asdict(RESTORE), "rates": DISK.to_json() | {"load": None}},
        {"facts": None, "rates": DISK.to_json()},
        {"rates": DISK.to_json()},
    ],
)
def test_damaged_rates_of_restores_are_as_none(
    file: ProfileFile, values: dict[str, object]
) -> None:
    """They are measured anew and written over."""
    file.save_section("restore", values)

    assert file.load_restore(RESTORE) is None
    file.save_restore(RESTORE, DISK)
    assert file.load_restore(RESTORE) == DISK


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """A file lies where the directory should be: the rates are used and not kept."""
    blocked = tmp_path / "profiles"
    blocked.write_text("")

    file = ProfileFile(str(blocked), FACTS)
    file.save(CPU)

    assert file.load() is None


def test_writers_do_not_mix(file: ProfileFile) -> None:
    """Two clusters that start at once leave one whole file and nothing else."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: file.save(CPU), range(32)))

    assert file.load() == CPU
    assert list(file.path.parent.iterdir()) == [file.path]


def test_default_directory_is_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the XDG base directory specification says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "ringspan"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "ringspan"


def test_hosts_count_by_arrangement() -> None:
    """Names and addresses of hosts change from day to day."""
    assert host_numbers(["b", "b", "a", "b"]) == (0, 0, 1, 0)


def test_a_cpu_has_a_name() -> None:
    """Two kinds of machines that share a home directory have different profiles."""
    assert "cores" in device_name(torch.device("cpu"))
