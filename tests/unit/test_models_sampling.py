"""Tokens are drawn from the softmax, reproducibly; parameters outside their range are refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.draw import Filters, apply_filters, sample
from models.errors import RingspanError, SamplingError
from models.sampling import SamplingParams

LOGITS_V = torch.tensor([0.0, 1.0, -2.0, 3.0, 2.5, 0.5, -30.0, 2.0])
DRAWS = 4000


def chi_square(tokens: list[int], probabilities_V: Tensor) -> float:
    """Return Pearson's statistic of the tokens that are expected at least five times."""
    expected_V = probabilities_V * len(tokens)
    counted_V = torch.bincount(torch.tensor(tokens), minlength=len(expected_V)).double()
    frequent_V = expected_V >= 5
    return float(((counted_V - expected_V) ** 2 / expected_V)[frequent_V].sum())


def draws(temperature: float, seeds: range, indices: range) -> list[int]:
    return [
        sample(LOGITS_V, temperature=temperature, seed=seed, index=index)
        for seed in seeds
        for index in indices
    ]


@pytest.mark.parametrize("seed", [0, 1, 123])
def test_temperature_zero_is_greedy(seed: int) -> None:
    """The seed has no say."""
    assert sample(LOGITS_V, temperature=0.0, seed=seed, index=seed) == 3


def test_greedy_takes_the_first_of_equals() -> None:
    """All ranks and all runs must break a tie alike."""
    assert sample(torch.tensor([1.0, 5.0, 5.0]), temperature=0.0, seed=0, index=0) == 1


@pytest.mark.parametrize(
    ("seeds", "indices"),
    [(range(1), range(DRAWS)), (range(DRAWS), range(1))],
    ids=["index", "seed"],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float, seeds: range, indices: range) -> None:
    """Along one answer and across requests; the draws are fixed, so the test cannot flicker.

    With at most seven degrees of freedom 30 is passed once in ten thousand.
    """
    probabilities_V = (LOGITS_V.double() / temperature).softmax(-1)

    assert chi_square(draws(temperature, seeds, indices), probabilities_V) < 30


def test_consecutive_draws_are_independent() -> None:
    """Pairs of neighbouring tokens follow the product of their probabilities."""
    probabilities_V = LOGITS_V.double().softmax(-1)
    tokens = draws(1.0, range(1), range(2 * DRAWS))
    pairs = [a * 8 + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]

    pairs_V = torch.outer(probabilities_V, probabilities_V).flatten()

    # 25 or so pairs are frequent; 70 is far out.
    assert chi_square(pairs, pairs_V) < 70


def test_same_seed_and_index_draw_the_same_token() -> None:
    """An answer can be asked for again, and a lost step can be repeated."""
    torch.manual_seed(1)
    first = draws(1.0, range(3), range(50))
    torch.manual_seed(2)
    torch.rand(7)

    assert draws(1.0, range(3), range(50)) == first


def test_sampling_leaves_the_global_generator_alone() -> None:
    """What else runs in the process must not depend on how many tokens were drawn."""
    before = torch.get_rng_state()

    draws(1.0, range(1), range(3))

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shift", ["seed", "index"])
def test_neighbouring_seeds_and_indices_differ(shift: str) -> None:
    """Seed 1 at index 0 must not be seed 0 at index 1, or two answers would be one, shifted."""
    first = draws(3.0, range(1), range(100))
    other = draws(3.0, range(1, 2), range(100))
    pairs = (
        zip(first, other, strict=True) if shift == "seed" else zip(first[1:], other, strict=False)
    )

    assert sum(a == b for a, b in pairs) < 40


@pytest.mark.parametrize("seed", [-1, -(2**80), 2**63, 2**64 + 5, 10**40])
def test_any_integer_is_a_seed(seed: int) -> None:
    """Torch's own seeds end at 64 bit; a caller's need not."""
    params = SamplingParams(seed=seed)
    assert params.seed == seed

    tokens = [sample(LOGITS_V, temperature=1.0, seed=seed, index=i) for i in range(60)]
    other = [sample(LOGITS_V, temperature=1.0, seed=seed + 1, index=i) for i in range(60)]

    assert tokens != other
    assert set(tokens) <= set(range(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_any_dtype(dtype: torch.dtype) -> None:
    """The draw is made in float32: these logits are exact in all dtypes, so the tokens agree."""
    tokens = [
        sample(LOGITS_V.to(dtype), temperature=1.0, seed=0, index=index) for index in range(50)
    ]

    assert tokens == draws(1.0, range(1), range(50))


def test_token_of_no_probability_is_never_drawn() -> None:
    """Logits of -inf forbid tokens."""
    logits_V = torch.full((100,), -torch.inf)
    logits_V[[7, 42]] = 0.0

    tokens = {sample(logits_V, temperature=1.0, seed=0, index=index) for index in range(50)}

    assert tokens == {7, 42}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-40, 1e-300, 5e-324])
def test_low_temperature_tends_to_greedy(temperature: float) -> None:
    """Small numbers are allowed; dividing by them in float32 must not give inf - inf."""
    logits_V = 20.0 + LOGITS_V

    assert sample(logits_V, temperature=temperature, seed=0, index=0) == 3


@pytest.mark.parametrize("temperature", [1e10, 1e38, 1e300])
def test_high_temperature_tends_to_uniform(temperature: float) -> None:
    """As above, at the other end."""
    uniform_V = torch.full((8,), 1 / 8, dtype=torch.float64)

    assert chi_square(draws(temperature, range(1), range(800)), uniform_V) < 30


def kept(logits_V: Tensor, **filters: Any) -> list[int]:
    """Return the tokens that a filter leaves in."""
    filtered_V = apply_filters(logits_V.double() - logits_V.max(), Filters(**filters))
    return (~filtered_V.isneginf()).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 2]),  # as likely as the second: kept, as in vLLM
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 1e-300}, [0]),
        ({"top_p": 0.6}, [0, 2]),  # of equals the last ids are taken first
        ({"min_p": 0.49}, [0, 1, 2]),
        ({"min_p": 0.51}, [0]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 1, "top_p": 0.99}, [0]),
        ({"min_p": 0.4, "top_p": 0.8}, [0, 1, 2]),  # of what min_p left in
    ],
    ids=str,
)
def test_filters_at_their_edges(filters: dict[str, Any], expected: list[int]) -> None:
    """Equals, filters that leave in one token or all, and one filter after another."""
    probabilities_V = torch.tensor([0.4, 0.2, 0.2, 0.1], dtype=torch.float64)

    assert kept(probabilities_V.log(), **filters) == expected


def test_defaults_are_those_of_vllm() -> None:
    """A caller who moves here gets what they had."""
    params = SamplingParams()

    assert params.max_tokens == 16
    assert params.temperature == 1.0
    assert params.seed is None
    assert params.ignore_eos is False
    assert (params.n, params.top_k, params.top_p, params.min_p) == (1, 0, 1.0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert params.logit_bias == {}
    assert params.include_stop_str_in_output is False
    assert params.skip_special_tokens is True
    assert params.min_tokens == 0
    assert params.logprobs is params.prompt_logprobs is None


@pytest.mark.parametrize(
    "right",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 2},
        {"seed": None},
        {"n": 3},
        {"n": 1, "temperature": 0},
        {"top_k": -1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-3},
        {"min_tokens": 16},
        {"logprobs": 0, "prompt_logprobs": -1},
        {"logit_bias": None, "stop": None, "stop_token_ids": None, "bad_words": None},
    ],
    ids=str,
)
def test_edges_of_the_ranges_are_allowed(right: dict[str, Any]) -> None:
    """An integer is a number too: JSON has 0 for 0.0."""
    SamplingParams(**right)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be >= 1, got 0"),
        ("max_tokens", -1, "max_tokens must be >= 1, got -1"),
        ("max_tokens", 1.0, r"max_tokens must be an integer, got 1\.0"),
        ("max_tokens", "16", "max_tokens must be an integer, got '16'"),
        ("max_tokens", True, "max_tokens must be an integer, got True"),
        ("max_tokens", None, "max_tokens must be an integer, got None"),
        ("temperature", -0.1, r"temperature must be a number >= 0 \(0 is greedy\), got -0\.1"),
        ("temperature", math.nan, "temperature must be a number >= 0 .* got nan"),
        ("temperature", math.inf, "temperature must be a number >= 0 .* got inf"),
        ("temperature", "0.5", r"temperature must be a number, got '0\.5'"),
        ("temperature", True, "temperature must be a number, got True"),
        ("temperature", None, "temperature must be a number, got None"),
        ("temperature", 10**400, "temperature must be "),
        ("seed", 1.5, r"seed must be an integer or None, got 1\.5"),
        ("seed", "1", "seed must be an integer or None, got '1'"),
        ("seed", False, "seed must be an integer or None, got False"),
        ("ignore_eos", 1, "ignore_eos must be true or false, got 1"),
        ("ignore_eos", "true", "ignore_eos must be true or false, got 'true'"),
        ("ignore_eos", None, "ignore_eos must be true or false, got None"),
        ("n", 0, "n must be >= 1, got 0"),
        ("n", 1.0, r"n must be an integer, got 1\.0"),
        ("top_k", -2, "top_k must be >= 1, or 0 or -1 for all tokens, got -2"),
        ("top_k", 1.5, r"top_k must be an integer, got 1\.5"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0\.0"),
        ("top_p", 1.01, r"top_p must be in \(0, 1\], got 1\.01"),
        ("top_p", math.nan, r"top_p must be in \(0, 1\], got nan"),
        ("min_p", -0.1, r"min_p must be in \[0, 1\], got -0\.1"),
        ("presence_penalty", 2.1, r"presence_penalty must be in \[-2, 2\], got 2\.1"),
        ("frequency_penalty", -3, r"frequency_penalty must be in \[-2, 2\], got -3"),
        ("repetition_penalty", 0, r"repetition_penalty must be a number > 0 \(1 is none\), got 0"),
        ("repetition_penalty", math.inf, "repetition_penalty must be a number > 0 .* got inf"),
        ("min_tokens", -1, "min_tokens must be >= 0, got -1"),
        ("min_tokens", 17, "min_tokens must be at most max_tokens, got 17 and 16"),
        ("logprobs", -2, "logprobs must be >= 0, or -1 for the whole vocabulary, got -2"),
        ("logprobs", True, "logprobs must be an integer or None, got True"),
        ("prompt_logprobs", "1", "prompt_logprobs must be an integer or None, got '1'"),
        ("stop", "", "stop must be a text or a list of texts, none of them empty, got ''"),
        ("stop", ["a", ""], r"stop must be a text or .* got \['a', ''\]"),
        ("stop", 5, "stop must be a text or a list of texts, none of them empty, got 5"),
        ("bad_words", [5], r"bad_words must be a text or .* got \[5\]"),
        ("stop_token_ids", 5, "stop_token_ids must be a list of integers, got 5"),
        ("stop_token_ids", [1, "2"], "stop_token_ids must be a list of integers, got "),
        ("stop_token_ids", [True], r"stop_token_ids must be a list of integers, got \[True\]"),
        ("logit_bias", [1], "logit_bias must be a mapping of token ids to finite numbers, got "),
        ("logit_bias", {"a": 1}, "logit_bias must be a mapping .* got {'a': 1}"),
        ("logit_bias", {1: "2"}, "logit_bias must be a mapping .* got {1: '2'}"),
        ("logit_bias", {1: math.inf}, "logit_bias must be a mapping .* got {1: inf}"),
        ("skip_special_tokens", 0, "skip_special_tokens must be true or false, got 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_parameters_are_refused(name: str, value: object, message: str) -> None:
    """At the caller, by name, with what came; a rank that meets them would fail the cluster."""
    with pytest.raises(SamplingError, match=f"^{message}") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_greedy_answers_would_be_the_same() -> None:
    """As in vLLM; who asks for several by mistake should know."""
    with pytest.raises(SamplingError, match=r"^n must be 1 with temperature 0, got 2: "):
        SamplingParams(n=2, temperature=0)


def test_lists_are_kept_as_tuples_without_doubles() -> None:
    """One text is a list of one; ids of a JSON object are strings."""
    bias: dict[Any, float] = {"7": 1, 8: -2}
    params = SamplingParams(
        stop="end", bad_words=["a", "b", "a"], stop_token_ids=(3, 1, 3), logit_bias=bias
    )

    assert params.stop == ("end",)
    assert params.bad_words == ("a", "b")
    assert params.stop_token_ids == (3, 1)
    assert params.logit_bias == {7: 1.0, 8: -2.0}


def test_unknown_parameter_is_refused() -> None:
    """A parameter that we do not have must not be ignored."""
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_sampling_error_is_a_value_error_and_one_of_ours() -> None:
    """Callers catch either."""
    assert issubclass(SamplingError, ValueError)
    assert issubclass(SamplingError, RingspanError)


def test_result_is_a_plain_int() -> None:
    """It goes through Ray and JSON."""
    token = sample(LOGITS_V, temperature=1.0, seed=0, index=0)

    assert type(token) is int
