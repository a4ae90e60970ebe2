"""Turns, forks, shared prefixes, evictions: every answer is what transformers says it alone is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.choice import Rule
from actors.generation import Generation
from models.rates import Rates
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy
from tests.rates import FREE_RING, NARROW_HOPS, SLOW_RING
from tests.thread_cluster import ThreadCluster

PAGE = 16
RULES: list[tuple[Rule, Rates | None]] = [
    ("pass_kv", None),
    ("pass_q", None),
    ("empirical", None),
    ("algorithm_1", FREE_RING),
    ("algorithm_5", NARROW_HOPS),
    ("auto", SLOW_RING),
    ("auto", FREE_RING),
    ("auto", NARROW_HOPS),
]


@dataclass(frozen=True)
class Ask:
    """One request: it begins like an earlier answer, or like a document, or like nothing."""

    begins_like: int | None  # an earlier request
    share: float  # of its tokens
    new_tokens: int
    max_tokens: int
    salt: str
    stop: bool  # at any of many tokens: bursts are cut


asks = st.builds(
    Ask,
    begins_like=st.none() | st.integers(0, 20),
    share=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    new_tokens=st.integers(1, 45),
    max_tokens=st.integers(1, 24),
    salt=st.sampled_from(["", "", "other"]),
    stop=st.booleans(),
)


@pytest.fixture(scope="module", params=["gqa", "mha"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"gqa": 2, "mha": 4}[request.param]
    return write_llama_checkpoint(tmp_path_factory.mktemp(request.param), num_key_value_heads=heads)


def check_mix(
    checkpoint: Path,
    num_ranks: int,
    rule: tuple[Rule, Rates | None],
    batches: list[list[Ask]],
    num_pages: int,
    clear_before: int,
) -> None:
    """Answer batches of requests after each other in a small pool, and compare each alone."""
    rng = np.random.default_rng(0)
    known: list[tuple[str, list[int]]] = []
    with ThreadCluster(
        checkpoint,
        num_ranks,
        rule=rule[0],
        rates=rule[1],
        num_pages=num_pages,
        page_tokens=PAGE,
        shares=True,
        piece_bytes=2048,
        burst_steps=5,
        decode_block_tokens=4,
    ) as cluster:
        for number, batch in enumerate(batches):
            if number == clear_before:
                cluster.cache.clear()
            begun: list[tuple[list[int], Generation]] = []
            for ask in batch:
                prompt: list[int] = []
                if ask.begins_like is not None and known:
                    _, earlier = known[ask.begins_like % len(known)]
                    prompt = earlier[: max(1, int(ask.share * len(earlier)))]
                prompt = [*prompt, *rng.integers(0, 500, ask.new_tokens).tolist()][-150:]
                params = SamplingParams(
                    max_tokens=ask.max_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    stop_token_ids=list(range(0, 500, 9)) if ask.stop else None,
                )
                begun.append((prompt, cluster.add(prompt, params, salt=ask.salt)))
            while cluster.run(max_steps=1):
                cluster.check_invariants()
            known += [
                (ask.salt, [*prompt, *generation.token_ids])
                for ask, (prompt, generation) in zip(batch, begun, strict=True)
            ]
            for prompt, generation in begun:
                assert generation.finish_reason is not None
                assert_greedy(checkpoint, prompt, generation.token_ids)
        cluster.cache.clear()
        cluster.check_invariants()
        for worker in cluster.workers:
            assert worker._pool.table.num_free_pages == num_pages


mixes = given(
    num_ranks=st.integers(1, 4),
    rule=st.sampled_from(RULES),
    batches=st.lists(st.lists(asks, min_size=1, max_size=4), min_size=1, max_size=5),
    num_pages=st.sampled_from([14, 40]),
    clear_before=st.integers(0, 8),
)
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
@mixes
def test_any_mix_of_requests_equals_each_alone(
    checkpoint: Path,
    num_ranks: int,
    rule: tuple[Rule, Rates | None],
    batches: list[list[Ask]],
    num_pages: int,
    clear_before: int,
) -> None:
    """Whatever is shared, cut, evicted, batched and chosen; no page is lost."""
    check_mix(checkpoint, num_ranks, rule, batches, num_pages, clear_before)


@pytest.mark.campaign
@settings(max_examples=600, deadline=None, suppress_health_check=SLOW)
@mixes
def test_many_mixes_of_requests_equal_each_alone(
    checkpoint: Path,
    num_ranks: int,
    rule: tuple[Rule, Rates | None],
    batches: list[list[Ask]],
    num_pages: int,
    clear_before: int,
) -> None:
    """The same, more often."""
    check_mix(checkpoint, num_ranks, rule, batches, num_pages, clear_before)


@pytest.fixture(scope="module", params=[("pass_kv", 2), ("pass_q", 2), ("pass_q", 3)])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ThreadCluster]:
    rule, num_ranks = request.param
    with ThreadCluster(checkpoint, num_ranks, rule=rule, shares=True) as cluster:
        yield cluster


def test_ten_turns_equal_transformers_and_cost_their_new_tokens(
    cluster: ThreadCluster, checkpoint: Path
) -> None:
    """Every turn over pages of 256 tokens, longer than a page in all."""
    rng, context = np.random.default_rng(1), list[int]()
    for turn in range(10):
        context += rng.integers(0, 500, 90).tolist()
        generation = cluster.add(
            context, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        )
        (step, _), *_ = cluster.run()
        assert step.new_tokens == (91 if turn else 90)
        assert_greedy(checkpoint, context, generation.token_ids)
        context += generation.token_ids
        rows = cluster.cache.rows(generation.sequence_id, len(context))
        assert max(rows) - min(rows) <= 16
    cluster.check_invariants()
