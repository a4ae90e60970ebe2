"""Flags of sampling become `SamplingParams`, or one sentence."""

import argparse
import dataclasses
from typing import Any

import pytest

from cluster.arguments import SAMPLING_FLAGS, add_sampling_flags, sampling_params
from models.errors import SamplingError
from models.sampling import SamplingParams


def read(*words: str) -> SamplingParams:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    return sampling_params(parser.parse_args(words))


def test_every_parameter_has_a_flag() -> None:
    """All but one that only concerns special tokens, which a terminal has no use for."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    flags = {name.removeprefix("--").replace("-", "_") for name in SAMPLING_FLAGS}

    assert fields - flags == {"skip_special_tokens"}
    assert flags <= fields


def test_without_flags_the_answer_is_greedy_and_not_short() -> None:
    """Else the defaults are vLLM's."""
    assert read() == SamplingParams(max_tokens=128, temperature=0.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--logit-bias", "5=2.5,7=-1"], {"logit_bias": {5: 2.5, 7: -1.0}}),
        (["--logit-bias", '{"5": 2.5}'], {"logit_bias": {5: 2.5}}),
        (["--stop", "a", "--stop", " b"], {"stop": ("a", " b")}),
        (["--stop-token-ids", "1,2 3"], {"stop_token_ids": (1, 2, 3)}),
        (["--bad-words", "x"], {"bad_words": ("x",)}),
        (["--include-stop-str-in-output"], {"include_stop_str_in_output": True}),
        (["--presence-penalty", "-1.5"], {"presence_penalty": -1.5}),
        (["--n", "3", "--temperature", "1"], {"n": 3, "temperature": 1.0}),
        (["--logprobs", "0", "--prompt-logprobs", "-1"], {"logprobs": 0, "prompt_logprobs": -1}),
    ],
    ids=str,
)
def test_flags_are_parameters(words: list[str], expected: dict[str, Any]) -> None:
    params = read(*words)

    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--logit-bias", "5"], "--logit-bias must be ID=BIAS,... or a JSON object, got '5'"),
        (["--logit-bias", "a=1"], "--logit-bias must be ID=BIAS,... or a JSON object, got 'a=1'"),
        (["--logit-bias", "{5: 1}"], "--logit-bias is not JSON: "),
        (["--logit-bias", '{"a": 1}'], "logit_bias must be a mapping of token ids"),
        (["--stop-token-ids", "1,b"], "--stop-token-ids must be integers, got '1,b'"),
        (["--stop", ""], "stop must be a text or a list of texts, none of them empty"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(SamplingError) as caught:
        read(*words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
