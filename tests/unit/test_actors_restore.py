"""How a stored prefix comes back, by prices alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.choice import Chooser
from actors.generation import Generation
from actors.kv.finder import Block, Source, StoredBlocks
from actors.kv.messages import (
    Lease,
    RestoreChoice,
    RestorePart,
    RestoreTimes,
    StoredPrefix,
    Tier,
)
from actors.kv.pieces import ACTIVATIONS, RAW, PieceId
from actors.offload import Lookup
from actors.restore import RestorePlanner, RestoreRules
from actors.running import Entry
from models.rates import Affine, Curve, ModelShape
from models.restore_plan import plan_restore
from models.restore_rates import RestoreRates
from models.sampling import SamplingParams
from tests.rates import FREE_RING

BLOCK = 256
# One layer of well-known models, in bfloat16.
LLAMA_3_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    linear_flops_per_token=4.4e8,
    linear_weight_bytes=4.4e8,
    kv_element_bytes=2.0,
)
QWEN3_06B = replace(LLAMA_3_8B, num_layers=28, hidden_size=1024, num_heads=16)
OPT_6_7B = replace(LLAMA_3_8B, num_kv_heads=32)
# 700 TFLOP/s of projection and 55 GB/s of a link, as the digest assumes for an H200.
RATES = RestoreRates(
    load=Affine(5e-6, 55e9),
    save=Affine(5e-6, 55e9),
    project=Curve.proportional(1.0),  # see `make_planner`
    disk_read=Affine(1e-4, 7e9),
    disk_write=Affine(1e-4, 5e9),
    remote=Affine(1e-4, 1.1e9),
)


def make_planner(
    model: ModelShape = OPT_6_7B,
    rates: RestoreRates | None = RATES,
    num_ranks: int = 1,
    **rules: Any,
) -> RestorePlanner:
    linear_s = model.linear_flops_per_token / 525e12
    ring = replace(FREE_RING, linear=Curve.proportional(linear_s), dispatch_s=1e-3)
    if rates is RATES:
        projection_s = 4 * model.hidden_size * model.num_kv_heads * model.head_dim / 700e12
        rates = replace(rates, project=Curve.proportional(projection_s))
    return RestorePlanner(
        model,
        Chooser("auto", model, ring, num_ranks),
        rates,
        RestoreRules(
            **{
                "method": "auto",
                "objective": "pipelined",
                "activations": "auto",
                "block_tokens": BLOCK,
                "max_chunk_tokens": 8192,
                "rank_hosts": tuple(f"host-{rank}" for rank in range(num_ranks)),
                "copies_compute": False,
                **rules,
            }
        ),
    )


def source(model: ModelShape, encoding: str, tier: Tier = "host") -> Source:
    width = model.hidden_size if encoding == ACTIVATIONS else 2 * model.num_kv_heads * 128
    size_bytes = model.num_layers * BLOCK * width * 2
    piece = PieceId(bytes(32), 0, BLOCK, encoding)
    return Source(piece, 0, BLOCK, "host-0", tier, size_bytes)


def stored(
    model: ModelShape,
    num_blocks: int,
    *,
    encodings: tuple[str, str] = (RAW, RAW),
    tier: Tier = "host",
    new_tokens: int = 64,
) -> StoredBlocks:
    """Return blocks as the stores have them, in their first and second form."""
    tokens = num_blocks * BLOCK
    generation = Generation(
        sequence_id=1,
        prompt=np.zeros(tokens + new_tokens, dtype=np.int32),
        params=SamplingParams(max_tokens=1),
        seed=0,
        eos_ids=(),
        max_model_len=10**7,
    )
    first, second = ((source(model, encoding, tier),) for encoding in encodings)
    return StoredBlocks(
        Lookup(
            entry=Entry(0, 0, generation),
            tokens=tokens,
            start=0,
            home=None,
            keys=(bytes(32),) * num_blocks,
            tenant=b"",
        ),
        tuple(Block(n * BLOCK, 0, "host-0", first, second) for n in range(num_blocks)),
        0.0,
    )


def test_without_rates_all_is_loaded() -> None:
    """A store may have had no room to measure anything."""
    choice = make_planner(rates=None).choose(stored(OPT_6_7B, 4))

    assert choice == RestoreChoice(recompute_to=0)


@pytest.mark.parametrize("link_bytes_per_s", [1e8, 1e10])
def test_what_is_solved_counts_the_device(link_bytes_per_s: float) -> None:
    """Else recomputing all is free in the program, and only the search around it finds a plan."""
    planner = make_planner(link_bytes_per_s=link_bytes_per_s)
    problem = planner.problem(stored(OPT_6_7B, 32, encodings=(RAW, ACTIVATIONS)))

    assert problem is not None
    plan = plan_restore(*problem)
    assert 0.7 * plan.predicted_s < plan.bound_s <= plan.predicted_s


def test_the_method_may_be_forced() -> None:
    """Each alone, to measure what the plan is worth."""
    slow: dict[str, Any] = {"link_bytes_per_s": 1e8}
    found = stored(OPT_6_7B, 8)
    solved = make_planner(**slow).choose(found)
    loaded = make_planner(method="load", **slow).choose(found)

    assert make_planner(method="recompute", **slow).choose(found) is None
    assert loaded is not None
    assert loaded.recompute_to == 0
    assert loaded.predicted_s == loaded.alternatives_s["kv"]
    if solved is not None:
        assert solved.predicted_s is not None
        assert solved.predicted_s < loaded.alternatives_s["kv"]


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [(LLAMA_3_8B, 0.0, 0.0), (QWEN3_06B, 0.5, 1.0), (OPT_6_7B, 0.5, 1.0)],
)
def test_activations_are_stored_where_bytes_ask_for_them(
    model: ModelShape, least: float, most: float
) -> None:
    """Llama 3's are twice as wide as its KV, those of Qwen3-0.6B half as wide."""
    share = make_planner(model).activation_share

    assert least <= share <= most
    assert make_planner(model, activations="never").activation_share == 0.0
    assert make_planner(model, activations="always").activation_share == 1.0


def test_where_both_are_stored_bytes_and_rates_choose() -> None:
    """Never for Llama 3; of Qwen3-0.6B most comes as activations."""
    both = (RAW, ACTIVATIONS)
    llama = make_planner(LLAMA_3_8B).choose(stored(LLAMA_3_8B, 32, encodings=both))
    qwen = make_planner(QWEN3_06B).choose(stored(QWEN3_06B, 32, encodings=both))

    assert llama is not None
    assert llama.takes_activations == frozenset()
    assert qwen is not None
    assert len(qwen.takes_activations) >= 16
    assert qwen.predicted_s is not None
    assert qwen.predicted_s < qwen.alternatives_s["kv"]


def test_a_slow_link_has_the_first_tokens_recomputed() -> None:
    """As far as device and link end together; on a fast one all is loaded."""
    found = stored(LLAMA_3_8B, 64)
    fast = make_planner(LLAMA_3_8B).choose(found)
    slow = make_planner(LLAMA_3_8B, link_bytes_per_s=2e9).choose(found)

    assert fast is not None
    assert fast.recompute_to <= 8 * BLOCK
    assert slow is not None
    assert 16 * BLOCK < slow.recompute_to < 64 * BLOCK
    assert slow.recompute_to % BLOCK == 0
    assert slow.link_bytes_per_s == 2e9
    assert slow.predicted_s is not None
    assert slow.predicted_s < min(slow.alternatives_s.values())


def test_what_is_far_costs_its_way() -> None:
    """Another host's blocks come over 1.1 GB/s: more is recomputed than of this host's."""
    near = make_planner(LLAMA_3_8B).choose(stored(LLAMA_3_8B, 64))
    far = make_planner(LLAMA_3_8B).choose(stored(LLAMA_3_8B, 64, tier="remote"))

    assert near is not None
    recomputed = 64 * BLOCK if far is None else far.recompute_to
    assert recomputed > near.recompute_to


def test_ranks_share_what_is_loaded() -> None:
    """Four links bring four times as much in the same time."""
    found = stored(LLAMA_3_8B, 64)
    one = make_planner(LLAMA_3_8B, method="load").choose(found)
    four = make_planner(LLAMA_3_8B, num_ranks=4, method="load").choose(found)

    assert one is not None
    assert four is not None
    assert four.load_s == pytest.approx(one.load_s / 4)


def observe(planner: RestorePlanner, found: StoredBlocks, link_s: float) -> None:
    parts = tuple(
        RestorePart(
            rank=0,
            start=block.start,
            end=block.start + BLOCK,
            block_start=block.start,
            lease=Lease(
                lease_id=0,
                piece=PieceId(block.start.to_bytes(32), 0, BLOCK, RAW),
                offset_bytes=0,
                size_bytes=block.sources[0].size_bytes,
            ),
            tier="host",
        )
        for block in found.blocks
    )
    planner.observe(
        StoredPrefix(
            start=0,
            end=found.end,
            home=None,
            parts=parts,
            leases={},
            tokens_by_tier={},
            choice=RestoreChoice(recompute_to=0),
            begin_s=0.0,
            find_s=0.0,
            stage_s=0.0,
        ),
        [RestoreTimes(kv_tokens=found.end, link_s=link_s)],
    )


@pytest.mark.parametrize("link_bytes_per_s", [None, 10e9])
def test_a_link_that_is_slower_than_measured_changes_plans(
    link_bytes_per_s: float | None,
) -> None:
    """After some restores, whether the link is slowed down already or not."""
    planner = make_planner(LLAMA_3_8B, link_bytes_per_s=link_bytes_per_s)
    found = stored(LLAMA_3_8B, 64)
    before = planner.choose(found)
    assert before is not None
    for _ in range(5):
        observe(planner, found, 10 * before.load_s)
    after = planner.choose(found)

    assert after is not None
    assert after.load_s > before.load_s
    assert after.recompute_to > before.recompute_to


def test_a_million_tokens_are_planned() -> None:
    """4,096 blocks in two forms: nothing here may grow with their square."""
    choice = make_planner(QWEN3_06B, link_bytes_per_s=5e9).choose(
        stored(QWEN3_06B, 4096, encodings=(RAW, ACTIVATIONS))
    )

    assert choice is not None
    assert choice.recompute_to % BLOCK == 0
