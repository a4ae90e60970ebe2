"""Prices of any ring: more work never costs less, and rates survive a file."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cost import Price, SequenceShape, price_decode, price_prefill, price_whole
from models.rates import Affine, Curve, ModelShape, Rates
from models.ring_rules import Algorithm

TINY = ModelShape(
    num_layers=4,
    hidden_size=768,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    linear_flops_per_token=12.6e6,
    linear_weight_bytes=25e6,
    kv_element_bytes=4,
)
CPU = Rates(
    linear=Curve(((1, 4e-3), (16, 5e-3), (64, 12e-3), (256, 40e-3))),
    causal_key=Curve(((16, 2e-6), (256, 8e-6), (1024, 28e-6))),
    dense_key=Curve(((1, 3e-7), (64, 2e-6), (1024, 40e-6))),
    paged_key=Curve(((1, 2e-7), (64, 2.2e-6), (1024, 42e-6))),
    call_s=2e-5,
    merge=Curve(((1, 2e-5), (1024, 1e-3))),
    store=Affine(1e-5, 4e9),
    gather=Affine(1e-5, 3e9),
    hop=Affine(2e-4, 1.5e9),
    returns=Affine(2e-4, 1.5e9),
    collective=Affine(2e-4, 1.5e9),
    overlap=0.3,
    step_s=1e-3,
)
EITHER = st.sampled_from(["pass_kv", "pass_q"])
TOKENS = st.integers(1, 5000)
RANKS = st.integers(1, 6)


def cpu_price(algorithm: Algorithm, new_tokens: int, cached_rows: tuple[int, ...]) -> Price:
    """Return the price of one sequence on a slow ring."""
    sequence = SequenceShape(new_tokens=new_tokens, cached_rows=cached_rows)
    return price_prefill(algorithm, [sequence], TINY, CPU, len(cached_rows))


@settings(max_examples=60, deadline=None)
@given(EITHER, TOKENS, st.lists(st.integers(0, 20000), min_size=1, max_size=6), TOKENS)
def test_more_tokens_never_cost_less(
    algorithm: Algorithm, new_tokens: int, cached: list[int], more: int
) -> None:
    """Neither new tokens nor cached ones, whichever rank holds them."""
    price = cpu_price(algorithm, new_tokens, tuple(cached)).total_s

    assert cpu_price(algorithm, new_tokens + more, tuple(cached)).total_s >= price
    for rank in range(len(cached)):
        rows = tuple(count + more * (i == rank) for i, count in enumerate(cached))
        assert cpu_price(algorithm, new_tokens, rows).total_s >= price * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(EITHER, TOKENS, RANKS, st.integers(0, 5000), st.data())
def test_equal_shares_are_the_cheapest(
    algorithm: Algorithm, new_tokens: int, ranks: int, rows: int, data: st.DataObject
) -> None:
    """The same cached tokens, some of them moved; ranks differ in their merges by less than 1 %."""
    moved = data.draw(st.integers(0, max(0, rows - 1)))
    ragged = [rows] * ranks
    ragged[0] -= moved
    ragged[-1] += moved
    equal = cpu_price(algorithm, new_tokens, (rows,) * ranks).total_s

    assert cpu_price(algorithm, new_tokens, tuple(ragged)).total_s >= equal * 0.99


@given(EITHER, TOKENS, st.integers(0, 20000))
def test_one_rank_exchanges_nothing(algorithm: Algorithm, new_tokens: int, cached: int) -> None:
    """And it costs what the same sequence costs whole on one rank of many."""
    price = cpu_price(algorithm, new_tokens, (cached,))
    sequence = SequenceShape(new_tokens=new_tokens, cached_rows=(0, cached, 0))

    assert price.parts_s.get("exchange", 0.0) == 0.0
    assert price == price_whole(sequence, TINY, CPU)


@given(EITHER, TOKENS, st.integers(2, 6))
def test_a_whole_sequence_costs_its_rank_alone(
    algorithm: Algorithm, new_tokens: int, ranks: int
) -> None:
    """In a step of whole sequences on different ranks the longest one counts."""
    steps = [
        [
            SequenceShape(new_tokens=n, cached_rows=(0,) * ranks, whole_rank=rank)
            for rank, n in enumerate(lengths)
        ]
        for lengths in ([new_tokens], [new_tokens, 1])
    ]
    alone, both = (price_prefill(algorithm, step, TINY, CPU, ranks).total_s for step in steps)

    assert alone == pytest.approx(price_whole(steps[0][0], TINY, CPU).total_s)
    # The last layer's rows of both are priced as one batch.
    assert alone <= both <= alone * 1.2


def test_two_sequences_of_one_shape_are_two() -> None:
    """A batch is a list, not a set."""
    sequence = SequenceShape(new_tokens=640, cached_rows=(100, 100))
    one, two = (price_prefill("pass_kv", [sequence] * n, TINY, CPU, 2) for n in (1, 2))

    assert two.parts_s["attention"] == pytest.approx(2 * one.parts_s["attention"])
    assert two.parts_s["gemm"] > 1.9 * one.parts_s["gemm"]


def test_decode_on_one_rank_exchanges_nothing() -> None:
    """Short contexts are cheaper whole, long ones sharded."""
    for rows, whole_is_cheaper in ((64, True), (2_000_000, False)):
        whole, sharded = (
            price_decode([shares], TINY, CPU) for shares in ((rows,), (rows // 2, rows // 2))
        )
        assert "exchange" not in whole.parts_s
        assert (whole.total_s < sharded.total_s) == whole_is_cheaper
    handed_out = replace(CPU, dispatch_s=7e-3)
    assert price_decode([(64,)], TINY, handed_out, steps=5).total_s == pytest.approx(
        7e-3 + 5 * price_decode([(64,)], TINY, CPU).total_s
    )


def test_ranks_that_are_late_by_chance_delay_pass_q() -> None:
    """It waits for all of them at the end of a layer; pass-KV has its own keys to compute."""
    uneven = replace(CPU, jitter=0.05)
    sequence = SequenceShape(new_tokens=2000, cached_rows=(1000, 1000))
    delayed: dict[Algorithm, bool] = {"pass_kv": False, "pass_q": True}
    for algorithm, is_delayed in delayed.items():
        even, late = (
            price_prefill(algorithm, [sequence], TINY, rates, 2).parts_s["exchange"]
            for rates in (CPU, uneven)
        )
        assert (late > even) == is_delayed


def test_last_layer_is_cheaper_unless_all_rows_are_wanted() -> None:
    """`Decoder.forward` leaves out of the last layer what the last token does not need."""
    sequence = SequenceShape(new_tokens=4096, cached_rows=(0, 0))
    some, every = (
        price_prefill("pass_kv", [sequence], TINY, CPU, 2, all_rows=all_rows)
        for all_rows in (False, True)
    )

    assert 0.74 < some.total_s / every.total_s < 0.80


def test_rates_survive_json() -> None:
    """The profile file holds them."""
    text = json.dumps(CPU.to_json())

    assert Rates.from_json(json.loads(text)) == CPU


@pytest.mark.parametrize(
    "change",
    [
        {"hop": None},
        {"hop": {"latency_s": 0.0, "bytes_per_s": 0.0}},
        {"linear": {"points": [[1, 2.0], [2, 1.0]]}},
        {"linear": {"points": []}},
        {"linear": {"points": [[1]]}},
        {"overlap": "0.1"},
        {"overlap": float("nan")},
        {"call_s": float("inf")},
        {"unknown": 1.0},
    ],
)
def test_damaged_rates_are_refused(change: dict[str, object]) -> None:
    """What a truncated or foreign file holds must not become a price."""
    with pytest.raises(ValueError, match=r".+"):
        Rates.from_json(CPU.to_json() | change)
