"""A served model under load through its three doors, what the doors cost, and many at once."""

import argparse
import asyncio
import contextlib
import math
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.bench.contestants import VOCABULARY, Ask
from cluster.bench.serve_doors import MODEL, FrontEnds, HandleDoor, HttpDoor, RpcDoor
from cluster.bench.serve_load import MIXES, Door, Sample, Shape, arrivals_s, make_asks, play
from cluster.bench.serve_report import cost_entry, load_entry, read_goodput
from cluster.llm import LLM
from models.config import read_model_config
from models.errors import PromptError, RingspanError

START_S = 120.0
COSTS = (1, 64)  # tokens of the answers by which doors are compared at idle
WARM_UPS = 3
# Where no goal is given: so many times what an idle cluster takes for the longest prompt.
TTFT_TIMES, ITL_TIMES = 5.0, 3.0
AUTO_RATES = (0.25, 0.5, 0.75, 1.0)  # of what a burst of all requests comes to
CONCURRENT_PROMPT, CONCURRENT_ANSWER, COMPARED = 32, 16, 16


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    add = parser.add_argument
    add("-cp", "--context-parallel-size", dest="ranks", type=int, default=1, help="ranks (1)")
    add("--url", help="HTTP server that runs already, without /v1; instead of an own one")
    add("--target", metavar="HOST:PORT", help="gRPC server that runs already, or beside --url")
    add("--api-key", help="of the servers that run already")
    add("--mix", choices=sorted(MIXES), default="chat", help="lengths of requests (chat)")
    add("--random-input-len", metavar="LEAST,MOST", help="tokens of prompts, instead of --mix")
    add("--random-output-len", metavar="LEAST,MOST", help="tokens of answers, instead of --mix")
    add("--shared-prefix", type=float, default=0.0, help="share common to all prompts (0)")
    add("--request-rate", help="1,2,inf: requests per s (shares of what a burst comes to, inf)")
    add("--num-prompts", type=int, default=64, help="requests of each load (64)")
    add("--goodput", help="ttft:MS,itl:MS and tpot, e2el (5 and 3 times an idle request's)")
    add("--seed", type=int, default=0, help="of lengths, tokens and arrivals (0)")
    add("--repeats", type=int, default=30, help="paired idle requests of each length (30)")
    add("--streams", type=int, default=256, help="requests at once at the end (256)")


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return all three parts; every door is measured before the next load."""
    options.model = options.url or options.target or options.model  # as the report names it
    shapes = _shapes(options)
    rates = None if options.request_rate is None else read_rates(options.request_rate)
    goals = None if options.goodput is None else read_goodput(options.goodput)
    if not 0 <= options.shared_prefix <= 1:
        raise PromptError(f"--shared-prefix must be 0 to 1, got {options.shared_prefix:g}")

    async def run() -> dict[str, Any]:
        async with _doors(options, checkpoint, profile, shapes) as (doors, vocabulary):
            return await _Bench(options, shapes, doors, vocabulary).run(rates, goals)

    return asyncio.run(run())


def read_rates(text: str) -> list[float]:
    """Return requests per second, in their order, each once.

    Raises:
        PromptError: One is no number > 0.
    """
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate > 0 for rate in rates):
        raise PromptError(f"--request-rate must be numbers > 0 (or inf) with commas, got {text!r}")
    return list(dict.fromkeys(rates))


def _shapes(options: argparse.Namespace) -> Sequence[Shape]:
    from cluster.bench.command import read_range

    given = {
        name: None if (text := getattr(options, name)) is None else read_range(name, text)
        for name in ("random_input_len", "random_output_len")
    }
    return [
        (given["random_input_len"] or prompt, given["random_output_len"] or answer, weight)
        for prompt, answer, weight in MIXES[options.mix]
    ]


@contextlib.asynccontextmanager
async def _doors(
    options: argparse.Namespace, checkpoint: Path, profile: Path, shapes: Sequence[Shape]
) -> AsyncIterator[tuple[dict[str, Any], int]]:
    """Open all doors there are, of an own cluster or of servers that run; close them behind."""
    async with contextlib.AsyncExitStack() as stack:
        doors: dict[str, Any] = {}
        vocabulary = VOCABULARY
        url, target, model = options.url, options.target, None
        if url is None and target is None:
            # Prompts are of the first ids only: the demo model's others are commands.
            vocabulary = min(VOCABULARY, read_model_config(checkpoint).vocab_size)
            longest = max(prompt[1] + answer[1] for prompt, answer, _ in shapes)
            llm = stack.enter_context(
                LLM(
                    checkpoint,
                    profile={"directory": str(profile)},
                    context_parallel_size=options.ranks,
                    max_model_len=max(longest, CONCURRENT_PROMPT + max(COSTS)) + 1,
                )
            )
            servers: Any = ray.remote(num_cpus=0)(FrontEnds).remote()
            stack.callback(ray.kill, servers)
            http_port, rpc_port = ray.get(servers.start.remote(llm._cluster), timeout=START_S)
            url, target = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{rpc_port}"
            model = MODEL
            doors["handle"] = HandleDoor(llm._cluster)
        if target is not None:
            doors["grpc"] = RpcDoor(target, options.api_key)
        if url is not None:
            doors["http"] = HttpDoor(url, options.api_key, model)
        for door in doors.values():
            stack.push_async_callback(door.close)
        yield doors, vocabulary


class _Bench:
    """The loads of one call. ``salt`` makes the tokens of each load others."""

    def __init__(
        self,
        options: argparse.Namespace,
        shapes: Sequence[Shape],
        doors: dict[str, Door],
        vocabulary: int,
    ) -> None:
        self._options, self._shapes, self._doors = options, shapes, doors
        self._vocabulary = vocabulary
        self._salt = 0

    async def run(
        self, rates: list[float] | None, goals: dict[str, float] | None
    ) -> dict[str, Any]:
        idle = [await self._cost(tokens) for tokens in COSTS]
        goals = goals or await self._goals()
        loads = await self._loads(rates or await self._rates(), goals)
        concurrent = await self._concurrent()
        flags = ("ranks", "mix", "shared_prefix", "num_prompts", "seed")
        return {
            **{name: getattr(self._options, name) for name in flags},
            "lengths": self._shapes,
            "latency_from": "planned arrival",
            "goodput": goals,
            "idle": idle,
            "loads": loads,
            "concurrent": concurrent,
        }

    def _asks(self, count: int, shapes: Sequence[Shape] | None = None) -> list[Ask]:
        self._salt += 1
        options = self._options
        return make_asks(
            shapes or self._shapes,
            count,
            self._vocabulary,
            shared=options.shared_prefix,
            seed=options.seed,
            salt=self._salt,
        )

    async def _alone(self, door: Door, ask: Ask) -> Sample:
        sample = (await play(door, [ask], [0.0]))[0]
        if sample.error is not None:
            raise RingspanError(f"a request to an idle server failed: {sample.error}")
        return sample

    async def _cost(self, tokens: int) -> dict[str, Any]:
        """Time one request after another, the doors in turn."""
        _tell(f"idle, {tokens} tokens")
        shape: Shape = ((CONCURRENT_PROMPT,) * 2, (tokens, tokens), 1.0)
        seconds: dict[str, list[float]] = {name: [] for name in self._doors}
        names = list(self._doors)
        for round_ in range(WARM_UPS + self._options.repeats):
            for name in names:
                sample = await self._alone(self._doors[name], self._asks(1, [shape])[0])
                if round_ >= WARM_UPS:
                    seconds[name].append(sample.e2el_s)
            names.append(names.pop(0))
        return cost_entry(tokens, seconds)

    async def _goals(self) -> dict[str, float]:
        door = next(iter(self._doors.values()))
        longest = max(prompt[1] for prompt, _, _ in self._shapes)
        shape: Shape = ((longest, longest), (32, 32), 1.0)
        samples = [await self._alone(door, ask) for ask in self._asks(3, [shape])]
        gaps_s = [gap_s for sample in samples for gap_s in sample.gaps_s] or [0.01]
        ttft_s = statistics.median(sample.ttft_s for sample in samples)
        return {"ttft": TTFT_TIMES * ttft_s, "itl": ITL_TIMES * max(gaps_s)}

    async def _rates(self) -> list[float]:
        _tell("a burst, to choose the rates")
        asks = self._asks(self._options.num_prompts)
        samples = await play(next(iter(self._doors.values())), asks, [0.0] * len(asks))
        burst_per_s = load_entry("", math.inf, samples, {})["requests_per_s"]
        if not burst_per_s:
            raise RingspanError(f"every request of a burst failed: {samples[0].error}")
        return [*(float(f"{share * burst_per_s:.2g}") for share in AUTO_RATES), math.inf]

    async def _loads(self, rates: list[float], goals: dict[str, float]) -> list[dict[str, Any]]:
        entries = []
        names = list(self._doors)
        for rate in rates:
            for name in names:
                _tell(f"{rate:g} requests/s through {name}")
                asks = self._asks(self._options.num_prompts)
                moments_s = arrivals_s(rate, len(asks), self._options.seed)
                samples = await play(self._doors[name], asks, moments_s)
                entries.append(load_entry(name, rate, samples, goals))
            names.append(names.pop(0))  # nobody always follows the same one
        return sorted(entries, key=lambda entry: list(self._doors).index(entry["door"]))

    async def _concurrent(self) -> list[dict[str, Any]]:
        """Ask for many answers at once; some of them are compared with what comes alone."""
        shape: Shape = ((CONCURRENT_PROMPT,) * 2, (CONCURRENT_ANSWER,) * 2, 1.0)
        asks = self._asks(self._options.streams, [shape])
        first = next(iter(self._doors.values()))
        alone = [await self._alone(first, ask) for ask in asks[:COMPARED]]
        entries = []
        for name, door in self._doors.items():
            _tell(f"{len(asks)} streams through {name}")
            samples = await play(door, asks, [0.0] * len(asks))
            entry = load_entry(name, math.inf, samples, {})
            pairs = zip(samples, alone, strict=False)
            same = sum(a.token_ids == b.token_ids for a, b in pairs)
            entries.append({**entry, "streams": len(asks), "compared": len(alone), "same": same})
        return entries


def _tell(what: str) -> None:
    print(f"{time.strftime('%X')} serve: {what}", file=sys.stderr)
