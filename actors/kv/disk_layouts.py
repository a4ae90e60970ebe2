"""Which layouts a disk tier's directory has, for people and tools that do not know them.

    DIRECTORY / digest of the layout .json

A description counts only where its digest is its name, so it cannot be wrong.
"""

import contextlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from actors.kv.pieces import Layout
from models.whole_file import write_whole

MAX_BYTES = 4096  # more is none of ours


def write_layout(directory: Path, layout: Layout) -> None:
    """Describe a layout beside its own directory, unless it is described there already.

    Raises:
        OSError: The disk is full or fails.
    """
    digest = layout.digest().hex()
    if read_layout(directory, digest) == layout:
        return
    write_whole(directory / f"{digest}.json", json.dumps(asdict(layout)))


def read_layout(directory: Path, digest: str) -> Layout | None:
    """Return the layout of a digest; None: it is not, or wrongly, described."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        with (directory / f"{digest}.json").open("rb") as file:
            layout = Layout(**json.loads(file.read(MAX_BYTES)))
        if layout.digest().hex() == digest:
            return layout
    return None


def find_layouts(directory: Path) -> dict[str, Layout | None]:
    """Return the layouts of a disk tier's directory by their digests; None: not described.

    Raises:
        OSError: It cannot be read.
    """
    digests = [
        each.name
        for each in os.scandir(directory)
        if re.fullmatch("[0-9a-f]{32}", each.name) and each.is_dir(follow_symlinks=False)
    ]
    return {digest: read_layout(directory, digest) for digest in sorted(digests)}
