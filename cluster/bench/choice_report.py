"""What is made of the runs of ``ringspan bench choice``: regret, crossover, errors, a table.

Pure functions of rows; a row is one miss rate, with the runs of each algorithm.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.bench.runs import Measured, entry, heading

Row = dict[str, Any]
ALGORITHMS = ("pass_kv", "pass_q")


def row(new_tokens: int, cached_tokens: int, measured: Mapping[str, Sequence[Measured]]) -> Row:
    """Return one row of the report, of runs with either algorithm and with ``auto``."""
    made: Row = {
        "miss_percent": 100 * new_tokens / (new_tokens + cached_tokens),
        "new_tokens": new_tokens,
        "cached_tokens": cached_tokens,
    }
    for rule, done in measured.items():
        made[rule] = entry(rule, done)
        made[rule]["predicted_s"] = [run.steps[0].predicted_s for run in done]
        made[rule]["prices_s"] = done[-1].steps[0].prices_s
    for algorithm in ALGORITHMS:
        runs = made[algorithm]
        price_s = runs["prices_s"][algorithm]
        runs["error"] = median_error(runs["predicted_s"], runs["seconds"])
        runs["price_error"] = median_error([price_s] * len(runs["seconds"]), runs["seconds"])
    made["regret"] = row_regret(made)
    return made


def median_error(predicted_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """Return the median of ``|predicted / measured - 1|``, run by run."""
    return statistics.median(relative_errors(predicted_s, measured_s))


def relative_errors(predicted_s: Sequence[float], measured_s: Sequence[float]) -> list[float]:
    """Return ``|predicted / measured - 1|`` of each run."""
    return [abs(p / m - 1) for p, m in zip(predicted_s, measured_s, strict=True)]


def best_s(of_row: Row) -> float:
    """Return the median of the faster algorithm."""
    return float(min(of_row[algorithm]["median_s"] for algorithm in ALGORITHMS))


def row_regret(of_row: Row) -> float | None:
    """Return by what share the forced runs of what auto chose are slower than the best.

    None where no forced run did the same: auto computed the sequence whole on one rank,
    or another price tells that its cached tokens lay otherwise on the ranks.
    """
    chosen = of_row["auto"]["algorithm"]
    if chosen not in ALGORITHMS:
        return None
    price_s, forced_price_s = (of_row[rule]["prices_s"][chosen] for rule in ("auto", chosen))
    if not math.isclose(price_s, forced_price_s, rel_tol=1e-6):
        return None
    return float(of_row[chosen]["median_s"]) / best_s(of_row) - 1


def regret(rows: Sequence[Row]) -> dict[str, Any]:
    """Return auto's regret over all rows.

    ``of_choice`` compares forced runs with forced runs, so that it tells the choice
    and no noise of auto's own runs, over those ``rows`` in which they did the same;
    None where there are none. ``direct`` compares auto's own runs, in all rows.
    """
    around = [each for each in rows if row_regret(each) is not None]
    chosen_s = sum(each[each["auto"]["algorithm"]]["median_s"] for each in around)
    direct_s = sum(each["auto"]["median_s"] for each in rows)
    return {
        "of_choice": chosen_s / sum(map(best_s, around)) - 1 if around else None,
        "rows": len(around),
        "direct": direct_s / sum(map(best_s, rows)) - 1,
    }


def crossovers(points: Sequence[tuple[float, float, float]]) -> list[float]:
    """Return the miss rates at which pass-KV and pass-Q take the same time.

    ``points`` are miss rate, seconds with pass-KV, and with pass-Q. Between two of
    them the logarithm of the ratio is a straight line over that of the miss rate.
    """
    logs = [(math.log(miss), math.log(kv_s / q_s)) for miss, kv_s, q_s in sorted(points)]
    return [
        math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
        for (x0, y0), (x1, y1) in itertools.pairwise(logs)
        if (y0 > 0) != (y1 > 0)
    ]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what all rows come to."""
    priced = [(each["miss_percent"], each["auto"]["prices_s"]) for each in rows]
    return {
        "regret": regret(rows),
        "crossovers_percent": crossovers(
            [(each["miss_percent"], *(each[a]["median_s"] for a in ALGORITHMS)) for each in rows]
        ),
        "predicted_crossovers_percent": crossovers(
            [(miss, *(prices_s[a] for a in ALGORITHMS)) for miss, prices_s in priced]
        ),
        "errors": {
            algorithm: {
                key: {
                    "median": statistics.median(each[algorithm][key] for each in rows),
                    "max": max(each[algorithm][key] for each in rows),
                }
                for key in ("error", "price_error")
            }
            for algorithm in ALGORITHMS
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [heading(report), ""]
    lines.append(
        f"{'miss %':>7}{'new':>8}{'cached':>8}{'pass-KV s':>11}{'pass-Q s':>11}{'auto s':>11}"
        f"  {'auto chose':11}{'regret %':>9}   predicted s: pass-KV (error), pass-Q (error)"
    )
    lines += [_line(each) for each in report["rows"]]
    regrets = report["regret"]
    chosen = "none" if regrets["of_choice"] is None else f"{regrets['of_choice']:.2%}"
    lines += [
        "",
        f"regret of auto over rows: {chosen} by the forced runs of what it chose"
        f" ({regrets['rows']} of {len(report['rows'])} rows), {regrets['direct']:.2%} by its own"
        " runs",
        f"pass-KV and pass-Q take the same time at a miss rate of"
        f" {_percents(report['crossovers_percent'])}; by prices at"
        f" {_percents(report['predicted_crossovers_percent'])}",
    ]
    for algorithm, errors in report["errors"].items():
        of, bare = errors["error"], errors["price_error"]
        lines.append(
            f"prediction error of {algorithm}: median {of['median']:.1%}, max {of['max']:.1%}"
            f" (before correction by earlier steps {bare['median']:.1%}, {bare['max']:.1%})"
        )
    return "\n".join(lines)


def _line(of_row: Row) -> str:
    kv, q, auto = (of_row[rule] for rule in (*ALGORITHMS, "auto"))
    regret_text = "" if of_row["regret"] is None else f"{of_row['regret']:.1%}"
    predicted = "   ".join(
        f"{statistics.median(runs['predicted_s']):.4f} ({runs['error']:.1%})" for runs in (kv, q)
    )
    return (
        f"{of_row['miss_percent']:>7.2f}{of_row['new_tokens']:>8}{of_row['cached_tokens']:>8}"
        f"{kv['median_s']:>11.4f}{q['median_s']:>11.4f}{auto['median_s']:>11.4f}"
        f"  {auto['algorithm']:11}{regret_text:>9}   {predicted}"
    )


def _percents(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g} %" for value in values) or "none in this range"
