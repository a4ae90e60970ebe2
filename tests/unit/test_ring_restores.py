"""Whatever is loaded, projected or recomputed: tokens are those of a run that never offloaded."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.choice import Chooser
from actors.generation import Generation
from actors.kv.finder import StoredBlocks
from actors.kv.link import Link
from actors.kv.messages import RestoreChoice
from actors.kv.pieces import ACTIVATIONS
from actors.restore import RestorePlanner, RestoreRules
from models.config import read_model_config
from models.rates import Affine, Curve, model_shape
from models.restore_rates import RestoreRates
from models.sampling import SamplingParams
from tests.checkpoints import write_checkpoint, write_llama_checkpoint
from tests.faulty_links import (
    CorruptingLink,
    DelayedLink,
    FaultyLink,
    LosingLink,
    ReorderingLink,
)
from tests.oracle import assert_greedy
from tests.rates import FREE_RING
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores

BLOCK, BLOCKS = 16, 12
GREEDY_8 = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 2},
    "opt": {},
    "gpt2": {},
    "gpt_neox": {},
}
Faults = Callable[[Link], Link]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"), num_key_value_heads=4)


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, count).tolist()


def forced(recomputed_blocks: int, projected: frozenset[int] = frozenset()) -> Any:
    """Return a choice of so many blocks to recompute, and of some to come as activations."""

    def choose(found: StoredBlocks) -> RestoreChoice:
        start = found.lookup.start
        blocks = min(recomputed_blocks, len(found.blocks) - 1)
        return RestoreChoice(recompute_to=start + blocks * BLOCK, takes_activations=projected)

    return choose


def come_back(
    checkpoint: Path,
    ranks: tuple[int, int],
    choose: Any,
    *,
    stores: dict[str, Any] | None = None,
    faults: Faults | None = None,
    staging_steps: int = 0,
    beside: int = 0,
    **settings: Any,
) -> Generation:
    """Store a conversation, and go on with it on another ring; assert that all is right."""
    prompt = tokens(1, BLOCKS * BLOCK + 3)
    with ThreadStores(checkpoint, **(stores or {})) as kv:
        with ThreadCluster(checkpoint, ranks[0], stores=kv, page_tokens=32, shares=True) as ring:
            prompt += ring.generate(prompt, GREEDY_8)
            ring.flush()
        prompt += tokens(2, 30)
        with ThreadCluster(
            checkpoint, ranks[1], stores=kv, page_tokens=32, shares=True, **settings
        ) as ring:
            ring.choose = choose
            ring.staging_steps = staging_steps
            for worker in ring.workers:
                assert worker._executor.store is not None
                if faults is not None:
                    worker._executor.store.loader.link = faults(worker._executor.store.link)
            others = [ring.add(tokens(9 + each, 40), GREEDY_8) for each in range(beside)]
            ring.run(2 if beside else 0)
            generation = ring.add(prompt, GREEDY_8)
            ring.run()
            ring.check_invariants()
            ring.flush()
        kv.check_all_returned()
    assert_greedy(checkpoint, prompt, generation.token_ids)
    for each, other in enumerate(others):
        assert_greedy(checkpoint, tokens(9 + each, 40), other.token_ids)
    return generation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_family_comes_back_by_any_mix(tmp_path: Path, family: str, num_ranks: int) -> None:
    """Some blocks from ids in several chunks, some projected, some loaded, of one prompt."""
    model = write_checkpoint(tmp_path, family, **FAMILIES[family])
    generation = come_back(
        model,
        (3 - num_ranks // 2, num_ranks),
        forced(5, frozenset(range(6, 13, 2))),
        stores={"activation_share": 1.0, "keeps_both": True},
        max_num_batched_tokens=50,
    )

    ((stored, restored_tokens),) = generation.restored
    assert (stored.start, restored_tokens) == (5 * BLOCK, (BLOCKS - 5) * BLOCK)
    encodings = [part.lease.piece.encoding for part in stored.parts]
    assert {ACTIVATIONS, "raw"} == set(encodings)


def solved(checkpoint: Path, num_ranks: int, link_bytes_per_s: float, project_s: float) -> Any:
    """Return what the product's planner chooses by made-up rates."""
    model = model_shape(read_model_config(checkpoint), 4)
    ring = replace(FREE_RING, linear=Curve.proportional(4e-5))
    rates = RestoreRates(
        load=Affine(1e-6, link_bytes_per_s),
        save=Affine(0.0, 1e9),
        project=Curve.proportional(project_s),
    )
    rules = RestoreRules(
        method="auto",
        objective="pipelined",
        activations="both",
        block_tokens=BLOCK,
        max_chunk_tokens=8192,
        rank_hosts=("host-0",) * num_ranks,
        copies_compute=False,
    )
    return RestorePlanner(model, Chooser("auto", model, ring, num_ranks), rates, rules).choose


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_family_comes_back_by_solved_plans(
    tmp_path: Path, family: str, num_ranks: int
) -> None:
    """Over links from slow to fast the program chooses other mixes; tokens are the same."""
    model = write_checkpoint(tmp_path, family, **FAMILIES[family])
    kinds = set()
    for link_bytes_per_s in (1e6, 1e7, 1e9):
        generation = come_back(
            model,
            (2, num_ranks),
            solved(model, num_ranks, link_bytes_per_s, project_s=2e-6),
            stores={"activation_share": 1.0, "keeps_both": True},
        )
        for stored, _ in generation.restored:
            encodings = {part.lease.piece.encoding for part in stored.parts}
            kinds.add((stored.start, *sorted(encodings)))
    assert len(kinds) > 1


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("recomputed", [0, 1, 11, 99])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_any_part_is_recomputed(
    checkpoint: Path, ranks: tuple[int, int], recomputed: int, share: float
) -> None:
    """None, one block, all but one; what lies behind comes as it was stored."""
    come_back(checkpoint, ranks, forced(recomputed), stores={"activation_share": share})


@pytest.mark.parametrize("rule", ["pass_kv", "pass_q"])
@pytest.mark.parametrize("staging_steps", [0, 1, 4, 20])
@pytest.mark.parametrize("beside", [0, 3])
def test_prompts_begin_while_the_rest_is_staged(
    checkpoint: Path, beside: int, staging_steps: int, rule: str
) -> None:
    """What is far comes early, late or after all else; others are computed beside it."""
    generation = come_back(
        checkpoint,
        (1, 2),
        forced(7),
        stores={"activation_share": 0.4},
        staging_steps=staging_steps,
        beside=beside,
        rule=rule,
        max_num_batched_tokens=30,
    )

    assert len(generation.restored) == 1


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [DelayedLink, CorruptingLink, ReorderingLink, LosingLink])
def test_faults_of_a_link_give_no_wrong_token(
    checkpoint: Path, kind: Any, share: float, num_ranks: int
) -> None:
    """Late, damaged, in another order or lost: it is loaded rightly or computed."""
    links: list[Any] = []

    def faults(link: Link) -> Link:
        links.append(kind(link, seed=len(links), share=0.3))
        return links[-1]

    generation = come_back(
        checkpoint,
        (1, num_ranks),
        forced(3),
        stores={"activation_share": share},
        faults=faults,
        beside=1,
        max_num_batched_tokens=60,
    )

    assert sum(link.num_faults for link in links) > 0
    if kind is DelayedLink:
        assert generation.num_cached_tokens == (BLOCKS - 3) * BLOCK


def test_a_link_held_to_a_rate_brings_the_same(checkpoint: Path) -> None:
    """Through a second process and landing memory, of which each range is overwritten."""
    generation = come_back(
        checkpoint,
        (1, 2),
        forced(2, frozenset({5, 6})),
        stores={"activation_share": 1.0, "keeps_both": True, "link_bytes_per_s": 2e6},
    )

    assert generation.num_cached_tokens == (BLOCKS - 2) * BLOCK


class _HeldLink(FaultyLink):
    """Gives nothing before it is told to."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.may_go = threading.Event()

    def _harm(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        assert self.may_go.wait(30.0)
        yield from super()._harm(ranges, patience_s)


def test_others_do_not_wait_for_what_comes_back(checkpoint: Path) -> None:
    """Over a slow link a restore takes longer than a step may: whoever comes goes on beside it."""
    prompt = tokens(1, BLOCKS * BLOCK + 3)
    with (
        ThreadStores(checkpoint) as kv,
        ThreadCluster(checkpoint, 2, stores=kv, shares=True, step_target_s=0.1) as ring,
    ):
        prompt += ring.generate(prompt, GREEDY_8) + tokens(2, 30)
        ring.flush()
        ring.cache.clear()
        links = []
        for worker in ring.workers:
            assert worker._executor.store is not None
            links.append(_HeldLink(worker._executor.store.link))
            worker._executor.store.loader.link = links[-1]
        ring.choose = lambda found: RestoreChoice(recompute_to=found.lookup.start, load_s=60.0)
        restored = ring.add(prompt, GREEDY_8)
        ring.run(1)
        other = ring.add(tokens(3, 40), GREEDY_8)
        while other.finish_reason is None:
            assert ring.run(1)

        assert restored.token_ids == []
        for link in links:
            link.may_go.set()
        ring.run()
        ring.flush()  # what was computed is being written, under leases
        kv.check_all_returned()
    assert restored.num_cached_tokens == BLOCKS * BLOCK
    assert_greedy(checkpoint, prompt, restored.token_ids)
    assert_greedy(checkpoint, tokens(3, 40), other.token_ids)


def check_seed(checkpoint: Path, seed: int) -> None:
    """Let chance say who restores what how, and what happens meanwhile."""
    rng = np.random.default_rng(seed)
    kinds: list[Any] = [None, DelayedLink, CorruptingLink, ReorderingLink, LosingLink]
    kind = kinds[int(rng.integers(0, len(kinds)))]
    come_back(
        checkpoint,
        (int(rng.integers(1, 4)), int(rng.integers(1, 4))),
        forced(int(rng.integers(0, 12)), frozenset(rng.integers(0, 12, 4).tolist())),
        stores={
            "activation_share": float(rng.choice([0.0, 0.3, 0.7, 1.0])),
            "keeps_both": bool(rng.integers(0, 2)),
            "num_hosts": int(rng.integers(1, 3)),
        },
        faults=None if kind is None else lambda link: kind(link, seed=seed, share=0.1),
        staging_steps=int(rng.choice([0, 0, 1, 3])),
        beside=int(rng.integers(0, 3)),
        rule=str(rng.choice(["pass_kv", "pass_q"])),
        follows=bool(rng.integers(0, 2)),
        num_pages=int(rng.choice([12, 20, 256])),
        max_num_batched_tokens=int(rng.choice([40, 8192])),
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_restore_equals_a_run_without_stores(checkpoint: Path, seed: int) -> None:
    """Mixes, faults, neighbours and a pool that is too small, all at once."""
    check_seed(checkpoint, seed)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_many_restores_equal_runs_without_stores(checkpoint: Path, seed: int) -> None:
    """The same, many times."""
    check_seed(checkpoint, seed)
