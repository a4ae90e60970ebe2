"""What a cluster's status says, as Prometheus families under ``ringspan:``; pure.

Hosts are numbered as in the status: whoever scrapes need not learn their addresses.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

PREFIX = "ringspan:"
Numbers = Mapping[str, Any]
Sample = tuple[tuple[object, ...], float]  # values of the labels, and the number

# What each tier of a store calls them: (metric, text, keys by tier).
STORE_GAUGES = (
    ("kv_store_used_bytes", "Bytes held.", {"host": "used_bytes", "disk": "bytes"}),
    (
        "kv_store_capacity_bytes",
        "Bytes that may be held.",
        {"host": "capacity_bytes", "disk": "capacity_bytes"},
    ),
)
STORE_TOTALS = (
    ("kv_store_hits", "Pieces found.", {"host": "hits", "disk": "hits", "remote": "staged"}),
    (
        "kv_store_misses",
        "Pieces not found.",
        {"host": "misses", "disk": "misses", "remote": "missing"},
    ),
    ("kv_store_evictions", "Pieces that made way.", {"host": "evicted", "disk": "evicted"}),
    (
        "kv_verify_failures",
        "Pieces found damaged, and dropped.",
        {"host": "dropped", "disk": "bad", "remote": "damaged"},
    ),
)


class StatusFamilies:
    """Makes families of one model's cluster."""

    def __init__(self, model_name: str) -> None:
        """Take the name that every number is labelled with."""
        self._model_name = model_name

    def of(self, status: Numbers | None) -> Iterator[Metric]:
        """Yield all families; without a status only that the cluster is down."""
        up = status is not None and status.get("failure") is None
        yield self._gauge("up", "1 where the coordinator answers and no rank is lost.", up)
        if status is None:
            return
        yield from self._engine(status)
        if "counts" in status:
            yield from self._counts(status["counts"])
        ages_s = status.get("heartbeat_ages_s") or ()
        yield self._gauges(
            "rank_heartbeat_age_seconds",
            "Since each rank gave a sign of life.",
            ["rank"],
            [((rank,), age_s) for rank, age_s in enumerate(ages_s)],
        )
        restore = status.get("restore")
        if restore is not None:
            yield self._total("kv_restores", "Prefixes brought back.", restore["restores"])
        yield from self._stores(status.get("kv_store") or {})

    def _engine(self, status: Numbers) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Answers that run.", status["running"])
        yield self._gauge("num_requests_waiting", "Answers that wait.", status["waiting"])
        total = sum(each["total"] for each in status["pages"])
        used = sum(each["running"] for each in status["pages"])
        yield self._gauge(
            "kv_cache_usage_perc", "Share of KV pages that answers hold.", used / max(1, total)
        )
        yield self._total("num_preemptions", "Answers put back.", status["preemptions"])
        yield self._total("steps", "Steps of the ranks.", status["steps"])

    def _counts(self, counts: Numbers) -> Iterator[Metric]:
        steps = counts["steps"]
        chosen: dict[str, int] = {}
        for step in steps:
            taken = sum(step["seconds"]["counts"])
            chosen[step["algorithm"]] = chosen.get(step["algorithm"], 0) + taken
        yield self._by("cp_choice", "Steps by what went round.", "algorithm", chosen)
        yield self._histograms(
            "cp_ring_step_seconds",
            "Of the ranks' steps.",
            ["phase", "algorithm"],
            [((step["phase"], step["algorithm"]), step["seconds"]) for step in steps],
        )
        yield self._histograms(
            "iteration_tokens_total", "Tokens of a step.", [], [((), counts["step_tokens"])]
        )
        yield self._totals(
            "rank_part_seconds",
            "What each rank did in its steps; wait and exchange are the ring's.",
            ["rank", "part"],
            [
                ((rank, part), seconds)
                for rank, parts_s in enumerate(counts["rank_parts_s"])
                for part, seconds in parts_s.items()
            ],
        )
        yield from self._tokens(counts)

    def _tokens(self, counts: Numbers) -> Iterator[Metric]:
        cached = counts["cached_tokens"]
        yield self._total(
            "prefix_cache_queries", "Tokens of answers' prompts.", counts["prompt_tokens"]
        )
        yield self._total("prefix_cache_hits", "Of these, not computed.", sum(cached.values()))
        yield self._by("cached_tokens", "The same, by where they were.", "cache_source", cached)
        yield self._by(
            "kv_restore_tokens", "Tokens brought back.", "tier", counts["restored_tokens"]
        )
        yield self._by(
            "kv_restore_bytes", "Bytes of these, to all ranks.", "tier", counts["restored_bytes"]
        )
        yield self._total(
            "kv_restore_recomputed_tokens",
            "Tokens computed anew meanwhile.",
            counts["recomputed_tokens"],
        )
        yield self._by(
            "kv_restore_decision", "Prefixes in the stores.", "decision", counts["decisions"]
        )

    def _stores(self, stores: Mapping[str, Numbers | None]) -> Iterator[Metric]:
        for make, families in ((self._gauges, STORE_GAUGES), (self._totals, STORE_TOTALS)):
            for name, text, keys in families:
                samples: list[Sample] = [
                    ((host, tier), told[tier][key])
                    for host, told in enumerate(stores.values())
                    for tier, key in keys.items()
                    if told is not None and key in told.get(tier, {})
                ]
                if samples:
                    yield make(name, text, ["host", "tier"], samples)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return self._gauges(name, text, [], [((), value)])

    def _total(self, name: str, text: str, value: float) -> Metric:
        return self._totals(name, text, [], [((), value)])

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        return self._totals(name, text, [label], [((key,), each) for key, each in values.items()])

    def _gauges(self, name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
        for values, number in samples:
            family.add_metric(self._labels(values), number)
        return family

    def _totals(self, name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
        for values, number in samples:
            family.add_metric(self._labels(values), number)
        return family

    def _histograms(
        self,
        name: str,
        text: str,
        labels: list[str],
        samples: Iterable[tuple[tuple[object, ...], Numbers]],
    ) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
        for values, told in samples:
            ends = [*(f"{end:g}" for end in told["ends"]), "+Inf"]
            below = itertools.accumulate(told["counts"])
            family.add_metric(
                self._labels(values), list(zip(ends, below, strict=True)), told["sum"]
            )
        return family

    def _labels(self, values: Iterable[object]) -> list[str]:
        return [self._model_name, *map(str, values)]
