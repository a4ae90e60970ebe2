"""Prometheus metrics of one server: vLLM's names under ``ringspan:``, and what only a ring has.

Counters and histograms are of the requests that came through this server, by HTTP or gRPC; what
the cluster itself counts is read from its status when the page is asked for.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric

from actors.messages import RequestDelta
from cluster.status_metrics import PREFIX, StatusFamilies

# A prompt of a million tokens may take an hour, a token of a small model a millisecond.
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300, 1000, 3000)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)


class Metrics:
    """What one server has seen."""

    def __init__(self, model_name: str) -> None:
        """Begin at zero, with a registry of its own."""
        self._model_name = model_name
        self._families = StatusFamilies(model_name)
        self._registry = CollectorRegistry()
        self._status: Mapping[str, Any] | None = None
        self._registry.register(self)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter(
            "prompt_tokens_cached", "Tokens of prompts that were found or restored."
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._success = Counter(
            PREFIX + "request_success",
            "Answers that ended, by what ended them.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.aborted = self._counter(
            "num_aborted_requests", "Requests left by their client, or ended by an error."
        )
        self.ttft_s = self._histogram("time_to_first_token_seconds", "To the first token.", SECONDS)
        self.itl_s = self._histogram(
            "inter_token_latency_seconds",
            "Between tokens; of tokens that came together, their even share.",
            TOKEN_SECONDS,
        )
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "Of whole requests.", SECONDS)
        self.queue_s = self._histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step.", SECONDS
        )
        self.prefill_s = self._histogram(
            "request_prefill_time_seconds", "From its first step to its first token.", SECONDS
        )
        self.decode_s = self._histogram(
            "request_decode_time_seconds", "From its first token to its last.", SECONDS
        )

    def success(self, reason: str) -> None:
        """Count an answer that ended."""
        self._success.labels(self._model_name, reason).inc()

    def watch(self, begin_s: float, answers: int) -> "Watch":
        """Return what watches one request of so many answers that begins now."""
        return Watch(self, begin_s, answers)

    def page(self, status: Mapping[str, Any] | None) -> bytes:
        """Return the page; without a status it says nothing of the cluster but that it is down."""
        self._status = status
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: what the cluster tells is known only once it is asked."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return what the cluster says of itself."""
        return self._families.of(self._status)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(PREFIX + name, text, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name)


class Watch:
    """The times of one request, as its pieces come."""

    def __init__(self, metrics: Metrics, begin_s: float, answers: int) -> None:
        """Begin the clock."""
        self._metrics = metrics
        self._begin_s = begin_s
        self._told_s: dict[int, float] = {}  # of each answer, its last token
        self._to_end = answers

    def take(self, delta: RequestDelta, now_s: float) -> None:
        """Note a piece."""
        metrics = self._metrics
        tokens = len(delta.token_ids)
        if tokens and not self._told_s:
            metrics.ttft_s.observe(now_s - self._begin_s)
            metrics.prompt_tokens.inc(delta.prompt_tokens)
            metrics.cached_tokens.inc(delta.num_cached_tokens)
        if tokens and delta.index in self._told_s:
            share_s = (now_s - self._told_s[delta.index]) / tokens
            for _ in range(tokens):
                metrics.itl_s.observe(share_s)
        if tokens:
            self._told_s[delta.index] = now_s
            metrics.generation_tokens.inc(tokens)
        if delta.finish_reason is not None:
            metrics.success(delta.finish_reason)
            self._to_end -= 1
            if not self._to_end:
                metrics.e2e_s.observe(now_s - self._begin_s)
        times = delta.metrics
        if times is not None:
            metrics.queue_s.observe(times.queue_s)
            metrics.prefill_s.observe(max(0.0, times.ttft_s - times.queue_s))
            metrics.decode_s.observe(max(0.0, times.total_s - times.ttft_s))

    def close(self) -> None:
        """Count the request as left, where it has not ended."""
        if self._to_end > 0:
            self._metrics.aborted.inc()
