"""What all steps, answers and restores of one cluster add up to, for dashboards.

A plain class without a clock: the engine tells it what has happened. A step costs some
microseconds here.
"""

import bisect
from collections import Counter, defaultdict
from typing import Any

from actors.records import Restored, StepRecord

# Upper ends of the histograms' buckets; above the last one is one more.
STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Buckets:
    """A histogram: how many values lie below each end, and their sum."""

    def __init__(self, ends: tuple[float, ...]) -> None:
        """Begin without values."""
        self._ends = ends
        self._counts = [0] * (len(ends) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._ends, value)] += 1
        self._sum += value

    def told(self) -> dict[str, Any]:
        """Return ends, counts of the values between them (one more than ends), and the sum."""
        return {"ends": list(self._ends), "counts": list(self._counts), "sum": self._sum}


class Counts:
    """Totals since the cluster came up."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._step_s: dict[tuple[str, str], Buckets] = defaultdict(lambda: Buckets(STEP_S))
        self._step_tokens = Buckets(STEP_TOKENS)
        self._parts_s: dict[int, dict[str, float]] = {}  # by rank
        self._prompt_tokens = 0
        self._cached_tokens: Counter[str] = Counter()  # by where they were found
        self._restored_tokens: Counter[str] = Counter()  # by tier
        self._restored_bytes: Counter[str] = Counter()
        self._recomputed_tokens = 0
        self._decisions: Counter[str] = Counter()

    def add_step(self, record: StepRecord) -> None:
        """Count a step: its time, its tokens, and where the time of each rank went."""
        self._step_s[record.phase, record.algorithm].add(record.wall_s)
        self._step_tokens.add(record.new_tokens)
        for rank, parts_s in enumerate(record.ranks_parts_s):
            total_s = self._parts_s.setdefault(rank, {})
            for part, seconds in parts_s.items():
                total_s[part] = total_s.get(part, 0.0) + seconds

    def add_answer(self, prompt_tokens: int, cached_tokens: int, restored: list[Restored]) -> None:
        """Count an answer that is complete: how much of its prompt was there, and where."""
        self._prompt_tokens += prompt_tokens
        for each in restored:
            self._cached_tokens.update(each.tokens_by_tier)
        back = sum(each.tokens for each in restored)
        self._cached_tokens["device"] += max(0, cached_tokens - back)

    def add_restored(self, restored: Restored) -> None:
        """Count what came back; bytes of several tiers are shared out by their tokens."""
        self._recomputed_tokens += restored.recomputed_tokens
        for tier, tokens in restored.tokens_by_tier.items():
            self._restored_tokens[tier] += tokens
            self._restored_bytes[tier] += restored.link_bytes * tokens // max(1, restored.tokens)

    def add_decision(self, decision: str) -> None:
        """Count what was decided about a prefix that the stores have: load, recompute or split."""
        self._decisions[decision] += 1

    def told(self) -> dict[str, Any]:
        """Return all totals, as plain objects."""
        return {
            "steps": [
                {"phase": phase, "algorithm": algorithm, "seconds": buckets.told()}
                for (phase, algorithm), buckets in self._step_s.items()
            ],
            "step_tokens": self._step_tokens.told(),
            "rank_parts_s": [dict(self._parts_s[rank]) for rank in sorted(self._parts_s)],
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": dict(self._cached_tokens),
            "restored_tokens": dict(self._restored_tokens),
            "restored_bytes": dict(self._restored_bytes),
            "recomputed_tokens": self._recomputed_tokens,
            "decisions": dict(self._decisions),
        }
