"""`ringspan bench kv`: what its passes move, and what it makes of their times."""

import json
from pathlib import Path

import pytest

from actors.kv.pieces import verify_record
from cluster.__main__ import main
from cluster.bench.runs import Measured, entry
from cluster.bench.tier_passes import (
    LAYOUT,
    cached_disk_passes,
    disk_passes,
    memory_passes,
    network_passes,
    shared_pieces,
)
from cluster.bench.tiers import GOALS, shares


@pytest.mark.parametrize(
    "tier",
    [memory_passes, network_passes, cached_disk_passes, disk_passes],
    ids=lambda t: t.__name__,
)
def test_a_pass_moves_every_byte(tmp_path: Path, tier: type) -> None:
    """A tier and its yardstick do the same work; else their ratio says nothing."""
    with shared_pieces(2**18, 3) as pieces, tier(pieces, tmp_path) as passes:
        assert len(passes) in (2, 3)
        for name, run in passes.items():
            pieces.target[:] = bytes(len(pieces.target))
            assert run(0).seconds > 0
            for piece, _, target in pieces.each():
                if not name.startswith("own host"):  # whose target is a rank's pages
                    verify_record(target, piece, LAYOUT)
    assert not pieces.path.exists()


def test_shares_are_medians_of_paired_bandwidths() -> None:
    runs = [
        entry(name, [Measured(s * pace) for s in (1.0, 3.0, 2.0)], size_mib=4, bytes=1)
        for goal in GOALS
        for name, pace in ((goal.yardstick, 1.0), (goal.tier, 1.25))
    ]
    made = shares(runs)
    assert [(share["of"], share["goal"]) for share in made] == [(g.tier, g.share) for g in GOALS]
    assert all(share["median"] == pytest.approx(0.8) for share in made)


def test_a_whole_run_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, JSON and a picture; no Ray, no checkpoint, and nothing left behind."""
    flags = ["--sizes-mib", "1", "--pass-mib", "2", "--repeats", "2", "--blocks", "50"]
    paths = ["--directory", str(tmp_path / "disk"), "--output", str(tmp_path / "out")]
    assert main(["bench", "kv", *flags, *paths]) == 0
    table = capsys.readouterr().out
    assert table.count(" goal ") == len(GOALS) + 1
    assert "a disk tier of 50 files opens in" in table
    report = json.loads((tmp_path / "out" / "kv.json").read_text())
    assert "model" not in report
    assert {share["of"] for share in report["shares"]} == {goal.tier for goal in GOALS}
    assert (tmp_path / "out" / "kv.png").read_bytes().startswith(b"\x89PNG")
    assert [path for path in (tmp_path / "disk").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("flags", [["--sizes-mib", "0"], ["--pass-mib", "0"], ["--blocks", "-1"]])
def test_wrong_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kv", *flags]) == 1
    assert capsys.readouterr().err.startswith(f"ringspan: {flags[0]} must be ")
