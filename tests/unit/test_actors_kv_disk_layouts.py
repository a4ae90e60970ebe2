"""A directory of a disk tier says what it holds, and is never believed something wrong."""

import dataclasses
import json
from pathlib import Path

import pytest

from actors.kv.disk import DiskTier
from actors.kv.disk_layouts import find_layouts
from tests.kv_records import LAYOUT

OTHER = dataclasses.replace(LAYOUT, dtype="bfloat16")
DIGEST = LAYOUT.digest().hex()


def open_tiers(directory: Path) -> None:
    for layout in (LAYOUT, OTHER):
        DiskTier(directory, 2**20, layout).open()


def test_every_layout_that_was_opened_is_described(tmp_path: Path) -> None:
    """What else lies in the directory is not taken for one."""
    open_tiers(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / ("a" * 32)).write_text("a file")

    assert find_layouts(tmp_path) == {layout.digest().hex(): layout for layout in (LAYOUT, OTHER)}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        "\xff",
        "[" * 4000,
        json.dumps(dataclasses.asdict(OTHER)),
        json.dumps({**dataclasses.asdict(LAYOUT), "num_layers": "3"}),
        json.dumps({**dataclasses.asdict(LAYOUT), "more": 1}),
    ],
)
def test_a_wrong_description_is_none_until_the_tier_is_opened(tmp_path: Path, text: str) -> None:
    """Also one of another layout: only what has the digest itself is believed."""
    open_tiers(tmp_path)
    (tmp_path / f"{DIGEST}.json").write_text(text)
    assert find_layouts(tmp_path)[DIGEST] is None

    open_tiers(tmp_path)
    assert find_layouts(tmp_path)[DIGEST] == LAYOUT
