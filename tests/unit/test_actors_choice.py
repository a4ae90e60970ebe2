"""A step is computed the cheapest way the rule allows, and its price is told."""

import dataclasses
from typing import Literal

import pytest

from actors.choice import Chooser, Rule
from models.cost import SequenceShape, price_decode
from models.rates import Affine
from tests.unit.test_models_prices import CPU, TINY

RULES: tuple[Rule, ...] = (
    "auto",
    "pass_kv",
    "pass_q",
    "algorithm_1",
    "algorithm_5",
    "empirical",
)


def shape(new_tokens: int, *cached_rows: int) -> SequenceShape:
    """Return one sequence's shape."""
    return SequenceShape(new_tokens=new_tokens, cached_rows=cached_rows)


def test_auto_passes_what_is_cheaper_to_pass() -> None:
    """Few new tokens behind many cached ones send queries, a whole prompt sends keys."""
    chooser = Chooser("auto", TINY, CPU, 2)

    behind, first = (
        chooser.prefill([shape(256, 16384, 16384)]),
        chooser.prefill([shape(8192, 0, 0)]),
    )

    assert (behind.algorithm, behind.whole) == ("pass_q", False)
    assert behind.predicted_s == behind.prices_s["pass_q"] < behind.prices_s["pass_kv"]
    assert (first.algorithm, first.whole) == ("pass_kv", False)
    assert first.predicted_s == first.prices_s["pass_kv"] < first.prices_s["pass_q"]


def test_a_tie_goes_to_pass_kv() -> None:
    """Where nothing travels for free, both cost the same but for the returns."""
    free = Affine(0.0, 1e30)
    rates = dataclasses.replace(CPU, hop=free, returns=free, gather=free, overlap=0.0)

    choice = Chooser("auto", TINY, rates, 2).prefill([shape(64, 9000, 9000)])

    assert choice.prices_s["pass_q"] == pytest.approx(choice.prices_s["pass_kv"], rel=0.1)
    cheaper_q = dataclasses.replace(rates, paged_key=rates.dense_key)
    choice = Chooser("auto", TINY, cheaper_q, 2).prefill([shape(64, 9000, 9000)])
    assert choice.algorithm == "pass_kv"


@pytest.mark.parametrize("forced", ["pass_kv", "pass_q"])
def test_a_forced_algorithm_is_priced_too(forced: Literal["pass_kv", "pass_q"]) -> None:
    """A step record tells what was expected of any step; short sequences ring as well."""
    choice = Chooser(forced, TINY, CPU, 2).prefill([shape(16, 0, 0)])

    assert (choice.algorithm, choice.whole) == (forced, False)
    assert choice.predicted_s == choice.prices_s[forced]


@pytest.mark.parametrize("rule", ["pass_kv", "pass_q", "empirical"])
def test_without_rates_nothing_is_predicted(rule: Rule) -> None:
    """A forced algorithm needs no profile."""
    chooser = Chooser(rule, TINY, None, 2)

    choice = chooser.prefill([shape(256, 16384, 16384)])

    assert choice.predicted_s is None
    assert choice.prices_s == {}
    assert chooser.decode([(10, 10)]) is None


@pytest.mark.parametrize("rule", ["auto", "algorithm_1", "algorithm_5"])
def test_a_rule_that_needs_rates_asks_for_them(rule: Rule) -> None:
    """C and BW, or a price, of nothing would be a guess."""
    with pytest.raises(ValueError, match="needs measured rates"):
        Chooser(rule, TINY, None, 2)


def test_short_prompts_stay_whole() -> None:
    """Four tokens on the rank that is free; 8K tokens on all."""
    chooser = Chooser("auto", TINY, CPU, 3)

    assert chooser.home(shape(4, 0, 0, 0), free_rank=2) == 2
    assert chooser.home(shape(8192, 0, 0, 0), free_rank=2) is None


def test_a_whole_sequence_stays_where_it_is() -> None:
    """Cached rows never move; where they lie on several ranks the sequence is sharded."""
    chooser = Chooser("auto", TINY, CPU, 2)

    assert chooser.home(shape(4, 0, 30), free_rank=0) == 1
    assert chooser.home(shape(4, 15, 15), free_rank=0) is None


def test_only_prices_keep_a_sequence_whole() -> None:
    """Whoever forces an algorithm wants to see it at work."""
    assert Chooser("pass_q", TINY, CPU, 2).home(shape(4, 0, 0)) is None


def test_expected_answers_count() -> None:
    """At a length where prefill is cheaper on the ring, a long answer may be worth more."""
    chooser = Chooser("auto", TINY, CPU, 2)

    turn = next(n for n in range(16, 8192, 16) if chooser.home(shape(n, 0, 0)) is None)

    assert chooser.home(shape(turn, 0, 0), answer_tokens=200) == 0


@pytest.mark.parametrize("rule", RULES)
def test_one_rank_passes_nothing_on(rule: Rule) -> None:
    """Whatever the rule, the price has no exchange and nothing is marked whole."""
    choice = Chooser(rule, TINY, CPU, 1).prefill([shape(256, 4096)])

    assert not choice.whole
    assert choice.prices_s["pass_kv"] == choice.prices_s["pass_q"] == choice.predicted_s


def test_the_rules_of_the_paper_take_the_measured_rates() -> None:
    """C and BW are achieved ones: a faster link turns algorithm 1 to pass-KV."""
    slow, fast = (
        Chooser("algorithm_1", TINY, dataclasses.replace(CPU, hop=Affine(0.0, rate)), 2)
        for rate in (1e7, 1e12)
    )
    sequences = [shape(256, 16384, 16384)]

    assert slow.prefill(sequences).algorithm == "pass_q"
    assert fast.prefill(sequences).algorithm == "pass_kv"


def test_decode_is_predicted() -> None:
    """Per step, by the same prices."""
    predicted_s = Chooser("auto", TINY, CPU, 2).decode([(500, 480)])

    assert predicted_s == price_decode([(500, 480)], TINY, CPU).total_s


def test_predictions_follow_what_is_measured_and_choices_do_not() -> None:
    """The median of the last ratios scales a prediction; one stall changes nothing."""
    chooser = Chooser("auto", TINY, CPU, 2)
    sequences = [shape(8192, 0, 0)]
    first = chooser.prefill(sequences)
    price_s = first.prices_s["pass_kv"]

    for ratio in (1.2, 1.2, 3.0, 1.2, 100.0):
        chooser.observe(first, ratio * price_s)
    later = chooser.prefill(sequences)

    assert later.predicted_s == pytest.approx(1.2 * price_s)
    assert (later.algorithm, later.prices_s) == (first.algorithm, first.prices_s)
    other = chooser.prefill([shape(256, 16384, 16384)])
    assert other.predicted_s == other.prices_s["pass_q"]
