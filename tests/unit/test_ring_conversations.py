"""Turns, forks, evictions, preemptions, cancels: every answer is transformers' own."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.choice import Rule
from actors.generation import Generation
from actors.kv.finder import StoredBlocks
from actors.kv.messages import RestoreChoice
from models.rates import Rates
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy
from tests.rates import FREE_RING, NARROW_HOPS, SLOW_RING
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores

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
    steps_before: int  # that others run before it arrives
    cancel_after: int | None  # so many steps
    priority: int


asks = st.builds(
    Ask,
    begins_like=st.none() | st.integers(0, 20),
    share=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    new_tokens=st.integers(1, 45),
    max_tokens=st.integers(1, 24),
    salt=st.sampled_from(["", "", "other"]),
    stop=st.booleans(),
    steps_before=st.integers(0, 3),
    cancel_after=st.none() | st.none() | st.integers(0, 4),
    priority=st.sampled_from([0, 0, 1, -1]),
)


@pytest.fixture(scope="module", params=["gqa", "mha"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"gqa": 2, "mha": 4}[request.param]
    return write_llama_checkpoint(tmp_path_factory.mktemp(request.param), num_key_value_heads=heads)


class Mix:
    """Requests of one cluster, answered beside and after each other."""

    def __init__(self, checkpoint: Path, cluster: ThreadCluster) -> None:
        self._checkpoint = checkpoint
        self._cluster = cluster
        self._rng = np.random.default_rng(0)
        self._known: list[list[int]] = []  # prompts with their answers
        self._open: list[tuple[Ask, list[int], Generation]] = []
        self._steps = 0

    def ask(self, ask: Ask) -> None:
        """Run some steps, and hand in a request."""
        self.run(ask.steps_before)
        prompt: list[int] = []
        if ask.begins_like is not None and self._known:
            earlier = self._known[ask.begins_like % len(self._known)]
            prompt = earlier[: max(1, int(ask.share * len(earlier)))]
        prompt = [*prompt, *self._rng.integers(0, 500, ask.new_tokens).tolist()][-150:]
        params = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=list(range(0, 500, 9)) if ask.stop else None,
        )
        generation = self._cluster.add(prompt, params, salt=ask.salt, priority=ask.priority)
        self._open.append((ask, prompt, generation))
        self._known.append(prompt)

    def run(self, max_steps: int | None = None) -> None:
        """Run steps, cancel what is to be cancelled, check the tables after each."""
        done = 0
        while max_steps is None or done < max_steps:
            if not self._cluster.run(max_steps=1):
                break
            done += 1
            self._cluster.check_invariants()
            for ask, _, generation in self._open:
                if ask.cancel_after == done:
                    self._cluster.scheduler.cancel(generation)
                    self._cluster.check_invariants()
            assert done < 500, "an answer starves"

    def finish(self) -> None:
        """Run to the end, and compare every answer."""
        self.run()
        for _, prompt, generation in self._open:
            assert generation.finish_reason is not None
            if generation.token_ids:
                assert_greedy(self._checkpoint, prompt, generation.token_ids)
            self._known.append([*prompt, *generation.token_ids])
        self._open.clear()


def any_choice(rng: np.random.Generator, found: StoredBlocks) -> RestoreChoice:
    """Recompute some of a prompt, and load or project the rest."""
    starts = [found.lookup.start, *(block.start for block in found.blocks)]
    blocks = range(len(found.lookup.keys) + found.lookup.start)
    return RestoreChoice(
        recompute_to=int(rng.choice(starts)),
        takes_activations=frozenset(block for block in blocks if rng.random() < 0.5),
    )


def check_mix(
    checkpoint: Path,
    num_ranks: int,
    rule: tuple[Rule, Rates | None],
    batches: list[list[Ask]],
    num_pages: int,
    clear_before: int,
    limits: dict[str, Any],
    stores: ThreadStores | None = None,
    damages: int = 0,
) -> None:
    """Answer batches of requests in a small pool, and compare each with itself alone.

    With stores the device is cleared before each batch, and so many bits of what was stored
    are flipped.
    """
    rng = np.random.default_rng(clear_before)
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
        stores=stores,
        **limits,
    ) as cluster:
        cluster.choose = functools.partial(any_choice, rng)
        cluster.staging_steps = int(rng.integers(0, 3))
        mix = Mix(checkpoint, cluster)
        for number, batch in enumerate(batches):
            if number == clear_before or stores is not None:
                cluster.cache.clear()
            if stores is not None:
                cluster.flush()
                stores.flip_bits(rng, damages)
            for ask in batch:
                mix.ask(ask)
            mix.finish()
        cluster.cache.clear()
        cluster.check_invariants()
        for worker in cluster.workers:
            assert worker._pool.table.num_free_pages == num_pages
        if stores is not None:
            cluster.flush()
            stores.check_all_returned()


MIX: dict[str, st.SearchStrategy[Any]] = {
    "num_ranks": st.integers(1, 4),
    "rule": st.sampled_from(RULES),
    "batches": st.lists(st.lists(asks, min_size=1, max_size=4), min_size=1, max_size=5),
    "num_pages": st.sampled_from([14, 40]),
    "clear_before": st.integers(0, 8),
    "limits": st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([40, 70, 8192]),
            "max_num_seqs": st.sampled_from([2, 100]),
            "long_prefill_token_threshold": st.sampled_from([0, 30]),
            "decode_rides": st.booleans(),
            "follows": st.booleans(),
            "step_target_s": st.sampled_from([math.inf, 1e-6]),
        }
    ),
}
mixes = given(**MIX)
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
    limits: dict[str, Any],
) -> None:
    """Whatever is shared, cut, evicted, preempted, cancelled and chosen; no page is lost."""
    check_mix(checkpoint, num_ranks, rule, batches, num_pages, clear_before, limits)


stored_mixes = given(
    num_hosts=st.integers(1, 2),
    capacity_bytes=st.sampled_from([100_000, 16 * 2**20]),
    block_tokens=st.sampled_from([16, 32]),
    damages=st.sampled_from([0, 0, 1, 8]),
    activation_share=st.sampled_from([0.0, 0.5, 1.0]),
    keeps_both=st.booleans(),
    **MIX,
)


def check_stored_mix(
    checkpoint: Path,
    num_hosts: int,
    capacity_bytes: int,
    block_tokens: int,
    damages: int,
    activation_share: float,
    keeps_both: bool,
    **mix: Any,
) -> None:
    with ThreadStores(
        checkpoint,
        num_hosts=num_hosts,
        capacity_bytes=capacity_bytes,
        block_tokens=block_tokens,
        activation_share=activation_share,
        keeps_both=keeps_both,
    ) as stores:
        check_mix(checkpoint, stores=stores, damages=damages, **mix)


@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@stored_mixes
def test_any_mix_with_kv_stores_equals_each_alone(checkpoint: Path, **mix: Any) -> None:
    """Whatever is stored, found, damaged, evicted from the stores and computed again."""
    check_stored_mix(checkpoint, **mix)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@stored_mixes
def test_many_mixes_with_kv_stores_equal_each_alone(checkpoint: Path, **mix: Any) -> None:
    """The same, more often."""
    check_stored_mix(checkpoint, **mix)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@settings(max_examples=600, deadline=None, suppress_health_check=SLOW)
@mixes
def test_many_mixes_of_requests_equal_each_alone(
    checkpoint: Path,
    num_ranks: int,
    rule: tuple[Rule, Rates | None],
    batches: list[list[Ask]],
    num_pages: int,
    clear_before: int,
    limits: dict[str, Any],
) -> None:
    """The same, more often."""
    check_mix(checkpoint, num_ranks, rule, batches, num_pages, clear_before, limits)


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
