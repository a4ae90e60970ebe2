"""From rows to files: ratios to the rates of the same run, JSON, markdown, a short table."""

import itertools
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.plan import SECTIONS
from benchmarks.rows import Row, show

Status = Literal["ok", "failed", "not run"]


@dataclass(kw_only=True)
class Outcome:
    """What came of one section."""

    status: Status
    seconds: float = 0.0
    error: str = ""
    rows: list[Row] = field(default_factory=list)


Outcomes = dict[str, Outcome]


def status_of(rows: list[Row], error: str) -> Status:
    """Return failed where anything went wrong or an answer is not right; all skipped is not run."""
    if error or any("error" in row or row.get("right") is False for row in rows):
        return "failed"
    return "ok" if any("skipped" not in row for row in rows) else "not run"


def add_ratios(outcomes: Outcomes) -> None:
    """Add to the rows what they are of the matrix product rate and of the copy rate, in place."""
    rates = outcomes["rates"].rows if "rates" in outcomes else []
    gemm = next((row.get("tflop_per_s") for row in rates if row.get("dtype") == "bfloat16"), None)
    copy = next((row.get("gb_per_s") for row in rates if row["what"] == "copy"), None)
    for name, key, rate, ratio in (
        ("attention", "tflop_per_s", gemm, "of_gemm"),
        ("prefill", "tflop_per_s", gemm, "mfu_of_gemm"),
        ("decode", "gb_per_s", copy, "of_copy"),
    ):
        for row in outcomes[name].rows if name in outcomes else []:
            if rate and key in row:
                row[ratio] = row[key] / rate


def write_files(directory: Path, facts: dict[str, str], outcomes: Outcomes) -> Path:
    """Write JSON and markdown; sections that an earlier run of this commit and day has stay."""
    directory.mkdir(parents=True, exist_ok=True)
    path, kept = _file_for(directory, facts)
    merged = kept | outcomes
    merged = {name: merged[name] for name in SECTIONS if name in merged}
    content = {
        "facts": facts,
        "sections": {name: asdict(outcome) for name, outcome in merged.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(facts, merged), encoding="utf-8")
    return path


def _file_for(directory: Path, facts: dict[str, str]) -> tuple[Path, Outcomes]:
    """Return a new file, or this commit's and day's own with what it holds; never another's."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-")
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"_{number}"
        path = directory / f"gpu_{device}_{facts['date']}{suffix}.json"
        if not path.is_file():
            break
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["facts"] == facts:
            return path, {name: Outcome(**of) for name, of in earlier["sections"].items()}
    return path, {}


def markdown(facts: dict[str, str], outcomes: Outcomes) -> str:
    """Return the results as a page."""
    pieces = [
        f"# {facts['device']}, {facts['date']}",
        "Written by `python -m benchmarks.gpu`. Medians after a warm-up, on CUDA between events, of"
        " random data. GB are 10^9 bytes; a copy counts what it reads and what it writes.",
        table([{"": key, "found": value} for key, value in facts.items()]),
    ]
    for name, outcome in outcomes.items():
        pieces.append(f"## {SECTIONS[name].title}: {outcome.status}")
        if outcome.error:
            pieces.append(f"    {outcome.error}")
        if outcome.rows:
            pieces.append(table(outcome.rows))
    return "\n\n".join(pieces) + "\n"


def table(rows: list[Row]) -> str:
    """Return rows as a markdown table; its columns are all keys, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[show(row.get(column)).replace("|", "/") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(outcomes: Outcomes) -> str:
    """Return one line a section: what came of it, and its most telling figure."""
    lines = []
    for name, outcome in outcomes.items():
        figure = outcome.error or headline(name, outcome.rows)
        lines.append(f"{name:<10} {outcome.status:<8} {outcome.seconds:6.0f} s  {figure}")
    return "\n".join(lines)


def headline(name: str, rows: list[Row]) -> str:
    """Return the most telling figure of a section's rows."""
    skipped = next((str(row["skipped"]) for row in rows if "skipped" in row), "")
    if name in ("nccl", "checks", "needle"):
        right = sum(bool(row.get("right")) for row in rows)
        return f"{right} of {len(rows)} right" + (f" ({skipped})" if skipped else "")
    measured = [row for row in rows if "ms" in row]
    if not measured:
        return ""
    if name == "rates":
        return ", ".join(
            f"{row['what']} {row['dtype']} {show(row['tflop_per_s'])} TFLOP/s"
            if "dtype" in row
            else f"{row['what']} {show(row['gb_per_s'])} GB/s"
            for row in measured
        )
    last = measured[-1]
    if name == "attention":
        best = max(measured, key=lambda row: row["tflop_per_s"])
        return f"at best {_at(best)}"
    return f"{last.get('tokens', last.get('context'))} tokens: {_at(last)}"


def _at(row: Row) -> str:
    ratios = ("of_gemm", "mfu_of_gemm", "of_copy", "of_load")
    keys = ("kernel", "mask", "ms", "tflop_per_s", "gb_per_s", *ratios)
    return ", ".join(f"{key} {show(row[key])}" for key in keys if key in row)
