"""Rows of results, written one by one, so that what is done stays when a section ends badly."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file of JSON lines, which need not exist."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows that were written."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def describe(row: Row) -> str:
    """Return a row as one line for people."""
    return ", ".join(f"{key} {show(value)}" for key, value in row.items())


def show(value: object) -> str:
    """Return a value with as many digits as mean something."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
