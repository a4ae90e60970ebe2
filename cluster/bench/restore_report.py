"""What is made of the runs of ``ringspan bench restore``: medians, ratios, targets, a table.

Pure functions of runs and of what the planner solves.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.bench.restore_rank import FirstToken
from cluster.bench.restore_splits import Problem, Split
from cluster.bench.runs import Measured, entry, heading
from models.restore_plan import plan_restore
from models.restore_ways import ACTIVATIONS, IDS

STRONG, JOINT = "load-only", "joint LP"
BEST_GOAL, CUT_GOAL, ERROR_GOAL = 1.15, 0.4, 0.15
CUT_RHO = 0.42  # at which MHA shall take so much less than loading
Report = dict[str, Any]


def case_report(
    facts: Mapping[str, Any],
    contestants: Mapping[str, Sequence[FirstToken]],
    splits: Mapping[Split, Sequence[FirstToken]],
    problem: Problem,
    fraction: float,
) -> Report:
    """Return one case: every contestant's runs, the splits that were tried, and the best one.

    ``fraction`` is that of layer inputs in splits that recompute something.
    """
    runs = [_contestant(name, tokens, contestants) for name, tokens in contestants.items()]
    tried = [_split(split, tokens, problem) for split, tokens in splits.items()]
    found = min(tried, key=lambda each: each["median_s"])
    for run in runs:
        run["of_found"] = run["median_s"] / found["median_s"]
    plan = plan_restore(*problem)
    return {
        **facts,
        "runs": runs,
        "splits": tried,
        "found": found,
        "plan": {
            "recomputed": plan.tokens().get((IDS, ""), 0),
            "projected": sum(n for (way, _), n in plan.tokens().items() if way == ACTIVATIONS),
            "predicted_s": plan.predicted_s,
            "bound_s": plan.bound_s,
        },
        "lines": _lines(problem, fraction),
    }


def summary(cases: Sequence[Report]) -> list[dict[str, Any]]:
    """Return each target, and what was reached."""
    targets = []
    for case in cases:
        joint = _run(case, JOINT)
        targets.append(
            _target(f"{case['name']}: joint over best found", joint["of_found"], BEST_GOAL)
        )
    for case in cases:
        if case["rho"] == CUT_RHO and case["has_narrow_activations"]:
            cut = 1 - _run(case, JOINT)["of_strong"]
            targets.append(
                _target(f"{case['name']}: less than load-only", cut, CUT_GOAL, at_least=True)
            )
    for case in cases:
        if not case["has_narrow_activations"]:
            projected = max(_run(case, JOINT)["projected"], default=0)
            targets.append(_target(f"{case['name']}: tokens projected", projected, 0))
    errors = [error for case in cases for error in _run(case, JOINT)["errors"]]
    if errors:
        targets.append(
            _target("prediction error of joint, median", statistics.median(errors), ERROR_GOAL)
        )
    return targets


def table(report: Report) -> str:
    """Return a report as text."""
    lines = [heading(report)]
    for case in report["cases"]:
        lines += ["", *_case_lines(case)]
    lines += ["", "targets:"]
    for target in report["summary"]:
        sign, met = (">=" if target["at_least"] else "<="), "met" if target["met"] else "missed"
        lines.append(f"  {target['what']}: {target['value']:.3g} {sign} {target['goal']:g}  {met}")
    return "\n".join(lines)


def _contestant(
    name: str, tokens: Sequence[FirstToken], contestants: Mapping[str, Sequence[FirstToken]]
) -> Report:
    """Return runs of one contestant; a ratio to load-only is the median of paired ones."""
    restored = [token.restored for token in tokens if token.restored is not None]
    predicted = [
        (token.seconds, token.choice.predicted_s)
        for token in tokens
        if token.choice is not None and token.choice.predicted_s is not None
    ]
    pairs = zip(tokens, contestants[STRONG], strict=True)
    reference = [token.token_id for token in next(iter(contestants.values()))]
    return {
        **entry(name, [Measured(token.seconds) for token in tokens]),
        "of_strong": statistics.median(own.seconds / strong.seconds for own, strong in pairs),
        "predicted_s": [seconds for _, seconds in predicted],
        "errors": [abs(seconds / measured_s - 1) for measured_s, seconds in predicted],
        "recomputed": [each.recomputed_tokens for each in restored],
        "projected": [each.projected_tokens for each in restored],
        "loaded": [each.tokens - each.projected_tokens for each in restored],
        "link_idle": statistics.median(each.link_idle for each in restored) if restored else None,
        "device_idle": (
            statistics.median(each.device_idle for each in restored) if restored else None
        ),
        "link_bytes": restored[-1].link_bytes if restored else 0,
        "same_tokens": sum(a.token_id == b for a, b in zip(tokens, reference, strict=True)),
    }


def _split(split: Split, tokens: Sequence[FirstToken], problem: Problem) -> Report:
    block_tokens = problem[1].block_tokens
    return {
        "recomputed": split.recomputed * block_tokens,
        "projected": split.projected * block_tokens,
        "seconds": [token.seconds for token in tokens],
        "median_s": statistics.median(token.seconds for token in tokens),
        "predicted_s": split.plan(*problem).predicted_s,
    }


def _lines(problem: Problem, fraction: float) -> dict[str, list[tuple[int, float]]]:
    """Return predicted seconds over tokens: by those projected, and by those recomputed."""
    num_blocks, tokens = len(problem[0]), problem[1].block_tokens
    step = -(-num_blocks // 32)
    ends = [*range(0, num_blocks, step), num_blocks]
    splits = {
        "projected": [(end, Split(0, end)) for end in ends],
        "recomputed": [(end, Split(end, round(fraction * (num_blocks - end)))) for end in ends],
    }
    return {
        name: [(end * tokens, split.plan(*problem).predicted_s) for end, split in line]
        for name, line in splits.items()
    }


def _run(case: Report, name: str) -> Report:
    return next(run for run in case["runs"] if run["name"] == name)


def _target(what: str, value: float, goal: float, *, at_least: bool = False) -> dict[str, Any]:
    met = value >= goal if at_least else value <= goal
    return {"what": what, "value": value, "goal": goal, "at_least": at_least, "met": met}


def link_text(case: Report) -> str:
    """Say which link it was."""
    if not case["link_is_simulated"]:
        return "this machine's own link"
    of = "a slow network" if case["rho"] is None else f"rho {case['rho']:g}"
    return f"simulated link, {case['link_bytes_per_s'] / 1e6:.1f} MB/s ({of})"


def _case_lines(case: Report) -> list[str]:
    lines = [
        f"{case['name']}: {case['tokens']} tokens, {case['num_layers']} layers of"
        f" {case['hidden_size']}, {case['num_kv_heads']} KV heads of {case['head_dim']};"
        f" {link_text(case)}; {case['placing']}",
        f"  {'':22}{'median s':>9}{'of load':>9}{'of best':>9}{'predicted':>11}{'error':>7}"
        f"{'ids':>7}{'inputs':>8}{'KV':>7}  idle: link, device",
    ]
    for run in case["runs"]:
        predicted = f"{statistics.median(run['predicted_s']):.4f}" if run["predicted_s"] else ""
        error = f"{statistics.median(run['errors']):.0%}" if run["errors"] else ""
        split = ("recomputed", "projected", "loaded")
        counts = [f"{statistics.median(run[key]):.0f}" if run[key] else "" for key in split]
        idle = (
            f"  {run['link_idle']:.0%}, {run['device_idle']:.0%}"
            if run["link_idle"] is not None
            else ""
        )
        lines.append(
            f"  {run['name']:22}{run['median_s']:>9.4f}{run['of_strong']:>9.2f}"
            f"{run['of_found']:>9.2f}{predicted:>11}{error:>7}"
            f"{counts[0]:>7}{counts[1]:>8}{counts[2]:>7}{idle}"
        )
    lines.append("  splits tried (ids, inputs): measured s, predicted s")
    lines += [
        f"    {each['recomputed']:>6},{each['projected']:>6}: {each['median_s']:.4f},"
        f" {each['predicted_s']:.4f}" + ("  best" if each is case["found"] else "")
        for each in case["splits"]
    ]
    plan = case["plan"]
    lines.append(
        f"  planned: {plan['recomputed']} recomputed, {plan['projected']} projected in"
        f" {plan['predicted_s']:.4f} s (bound {plan['bound_s']:.4f}); `auto` would store"
        f" {case['activation_share']:.0%} of the blocks as layer inputs"
    )
    return lines
