"""What runs come to: medians, paired ratios, peak memory, and the table of them."""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actors.records import StepRecord

Input = TypeVar("Input")
Name = TypeVar("Name")
Run = TypeVar("Run")
Pair = tuple[str, str]  # names of contestants: of, over


@dataclass(frozen=True)
class Measured:
    """One run. ``parts_s`` is the mean over ranks; ``peak_bytes`` the largest process's RSS."""

    seconds: float
    peak_bytes: int = 0
    parts_s: dict[str, float] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()  # of ours: the prefill, then bursts of decode

    @property
    def algorithm(self) -> str | None:
        """How the first step was computed: pass_kv, pass_q or whole; None of others than ours."""
        return self.steps[0].algorithm if self.steps else None


def interleave(
    actions: Mapping[Name, Callable[[Input], Run]], inputs: Iterable[Input]
) -> dict[Name, list[Run]]:
    """Have everybody run each input before anybody runs the next.

    Each round begins with another, so that nobody always follows the same one.
    """
    measured: dict[Name, list[Run]] = {name: [] for name in actions}
    order = deque(actions)
    for each in inputs:
        for name in order:
            measured[name].append(actions[name](each))
        order.rotate(-1)
    return measured


def entry(name: str, measured: Sequence[Measured], **facts: Any) -> dict[str, Any]:
    """Return one contestant's runs as plain values."""
    parts = {part for run in measured for part in run.parts_s}
    algorithms = [run.algorithm for run in measured if run.algorithm is not None]
    return {
        **facts,
        "name": name,
        "algorithm": statistics.mode(algorithms) if algorithms else None,
        "seconds": [run.seconds for run in measured],
        "median_s": statistics.median(run.seconds for run in measured),
        "peak_bytes": max(run.peak_bytes for run in measured),
        "parts_s": {
            part: statistics.median(run.parts_s.get(part, 0.0) for run in measured)
            for part in sorted(parts)
        },
    }


def paired_ratios(entries: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Medians of paired ratios: run i of one contestant over run i of the other."""
    by_key = {(run["tokens"], run["name"]): run["seconds"] for run in entries}
    return [
        {
            "tokens": tokens,
            "of": first,
            "over": second,
            "median": statistics.median(
                a / b for a, b in zip(by_key[tokens, first], by_key[tokens, second], strict=True)
            ),
        }
        for tokens in dict.fromkeys(run["tokens"] for run in entries)
        for first, second in pairs
    ]


def heading(report: dict[str, Any]) -> str:
    """Return what was measured, of which model if of any, where."""
    new = f", {report['new_tokens']} new tokens" if "new_tokens" in report else ""
    model = f", model {report['model']}" if "model" in report else ""
    return f"{report['benchmark']}{new}{model}, {report['machine']['cpu']}"


def ratio_table(report: dict[str, Any]) -> str:
    """Return a report of contestants and their ratios as text."""
    lines = [heading(report), ""]
    lines.append(f"{'tokens':>8}  {'':26}{'median s':>10}{'peak MiB':>10}  where (ms)")
    for run in report["runs"]:
        parts = [f"{part} {s * 1e3:.1f}" for part, s in run["parts_s"].items()]
        how = [run["algorithm"]] if run["algorithm"] else []
        lines.append(
            f"{run['tokens']:>8}  {run['name']:26}{run['median_s']:>10.4f}"
            f"{run['peak_bytes'] / 2**20:>10.0f}  {' '.join(how + parts)}"
        )
    lines += ["", "medians of paired ratios:"]
    lines += [
        f"{r['tokens']:>8}  ({r['of']}) / ({r['over']}) = {r['median']:.3f}"
        for r in report["ratios"]
    ]
    return "\n".join(lines)


def reset_peak_rss(pid: int) -> None:
    """Begin to count a process's peak memory anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_rss_bytes(pid: int) -> int:
    """Return the most memory that a process held since the last reset."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM in /proc/{pid}/status")
