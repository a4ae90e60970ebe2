"""``ringspan kv`` over files on disk: what is there, what is bad, and what cannot be read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from actors.kv.disk import DiskTier
from cluster.__main__ import main
from tests.kv_records import LAYOUT, make_record, piece_id

GiB = 2**30
OTHER = dataclasses.replace(LAYOUT, dtype="bfloat16")
DIGEST, OTHER_DIGEST = (layout.digest().hex() for layout in (LAYOUT, OTHER))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three pieces of one layout, and two of another."""
    for layout, count in ((LAYOUT, 3), (OTHER, 2)):
        tier = DiskTier(tmp_path, GiB, layout)
        tier.open()
        for number in range(count):
            piece = piece_id(number)
            assert tier.write(piece, b"tenant", make_record(piece, layout=layout))
    return tmp_path


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.arrow"))


def ask(
    capsys: pytest.CaptureFixture[str], action: str, directory: Path, status: int = 0
) -> dict[str, Any]:
    """Return what the command says of each layout of a directory."""
    assert main(["kv", action, "--json", "--disk-directory", str(directory)]) == status
    told: dict[str, Any] = json.loads(capsys.readouterr().out)[action][str(directory)]
    return told


def test_stats_tell_what_each_layout_holds(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And change nothing."""
    before = files(directory)
    told = ask(capsys, "stats", directory)

    size_bytes = sum(path.stat().st_size for path in (directory / DIGEST).rglob("*.arrow"))
    assert told[DIGEST] == {
        "layout": dataclasses.asdict(LAYOUT),
        "disk": {"files": 3, "bytes": size_bytes},
    }
    assert told[OTHER_DIGEST]["disk"]["files"] == 2
    assert files(directory) == before

    assert main(["kv", "stats", f"kv_store.disk_directory={directory}"]) == 0
    assert "dtype bfloat16, block tokens 16\n  disk    files 2, 0.1 MiB" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_verify_removes_what_is_bad_and_says_so(
    directory: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit in Arrow's framing, in the record, or at the end; then all is well again."""
    path = files(directory)[1]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

    told = ask(capsys, "verify", directory, status=1)
    assert sum(each["disk"]["bad"] for each in told.values()) == 1
    assert sum(each["disk"]["verified"] for each in told.values()) == 4
    assert not path.exists()
    told = ask(capsys, "verify", directory)
    assert sum(each["disk"]["verified"] for each in told.values()) == 4


def test_a_file_of_another_layout_is_bad(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is whole, and has the name of a piece: only its record tells that it is not of here."""
    path = files(directory / OTHER_DIGEST)[0]
    for same in files(directory / DIGEST):
        if same.parent.name == path.parent.name:
            same.unlink()
    path.rename(directory / DIGEST / path.parent.name / path.name)

    assert ask(capsys, "verify", directory, status=1)[DIGEST]["disk"]["bad"] == 1


def test_clear_leaves_no_piece(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ask(capsys, "clear", directory)

    assert [told[digest]["disk"] for digest in (DIGEST, OTHER_DIGEST)] == [
        {"cleared": 3},
        {"cleared": 2},
    ]
    assert files(directory) == []


def test_what_is_not_described_is_not_touched(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, with status 1: its files were neither verified nor removed."""
    (directory / f"{DIGEST}.json").unlink()

    for action in ("stats", "verify", "clear"):
        assert ask(capsys, action, directory, status=1)[DIGEST] is None
    assert len(files(directory / DIGEST)) == 3
    assert main(["kv", "verify", "--disk-directory", str(directory)]) == 1
    assert f"{DIGEST}: no answer, or (on disk) no description" in capsys.readouterr().out


def test_an_empty_directory_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "verify", "--disk-directory", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"nothing is stored in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no KV store to look at: give --address (or RAY_ADDRESS)"),
        (["--disk-directory", "{nowhere}"], "nowhere: No such file or directory; give the"),
        (["--disk-directory", "{file}"], "file: Not a directory; give the directory that"),
        (["--address", "127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
        (["ray.address=127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
        (["--address", "a:1", "--disk-directory", "b"], "not both: got a:1 and b"),
        (["kv_store.disk_dir=x"], "takes ray.address and kv_store.disk_directory only"),
        (["page_tokens=512"], "got 'page_tokens=512'"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 1, one line on stderr, nothing on stdout."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").write_text("")
    places = {"nowhere": tmp_path / "nowhere", "file": tmp_path / "file"}

    status = main(["kv", "stats", *(argument.format(**places) for argument in arguments)])

    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
