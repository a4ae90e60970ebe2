"""What the ranks are told of a request's parameters, and what a model cannot do is refused."""

import pickle
from typing import Any

import pytest

from actors.draws import bad_word_ids, check_params, make_draw
from models.draw import Filters
from models.errors import SamplingError
from models.logits import LogitRules
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer

EOS = (2, 3)


class Words:
    """Stands for a tokenizer of transformers: one token for each word, spaces as in Llama."""

    chat_template = None

    def __init__(self, ids: dict[str, list[int]]) -> None:
        self.ids = ids

    def __call__(self, text: str, *, add_special_tokens: bool, **rest: Any) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self.ids[text]}


def words(ids: dict[str, list[int]], *bad_words: str, vocab_size: int = 100) -> Any:
    return bad_word_ids(SamplingParams(bad_words=bad_words), Tokenizer(Words(ids)), vocab_size)


def test_plain_greedy_draw_is_small() -> None:
    """It travels with every burst; filters have no say in greedy sampling."""
    params = SamplingParams(temperature=0.0, top_p=0.5, top_k=3, min_p=0.1)

    draw = make_draw(params, 7, EOS)

    assert (draw.temperature, draw.seed, draw.stop_ids) == (0.0, 7, EOS)
    assert (draw.filters, draw.rules, draw.logprobs) == (None, None, None)
    assert len(pickle.dumps(draw)) < 250


def test_what_is_asked_is_told() -> None:
    draw = make_draw(
        SamplingParams(
            top_k=-1,
            top_p=0.5,
            min_p=0.1,
            stop_token_ids=[9, 2],
            min_tokens=4,
            logit_bias={5: 1.0},
            presence_penalty=0.5,
            logprobs=0,
        ),
        7,
        EOS,
        ((1, 2),),
    )

    assert draw.filters == Filters(top_k=0, top_p=0.5, min_p=0.1)
    assert draw.stop_ids == (2, 3, 9)
    assert draw.logprobs == 0
    assert draw.rules == LogitRules(
        bad_words=((1, 2),),
        min_tokens=4,
        ending_ids=(2, 3, 9, 2),
        logit_bias=((5, 1.0),),
        presence_penalty=0.5,
    )


def test_ignored_eos_still_waits_for_min_tokens() -> None:
    """As in vLLM; it does not end the answer then."""
    draw = make_draw(SamplingParams(ignore_eos=True, min_tokens=4, stop_token_ids=[3]), 7, EOS)

    assert draw.stop_ids == (3,)
    assert draw.rules is not None
    assert set(draw.rules.ending_ids) == {2, 3}


def test_bad_word_is_barred_at_the_begin_and_after_a_space() -> None:
    """Where the space makes other tokens, just as many; a bare space before is no new word."""
    ids = {"cat": [5], " cat": [6], "catfish": [5, 7], " catfish": [6, 7]}
    assert words(ids, "cat", "catfish") == ((5,), (6,), (5, 7), (6, 7))
    assert words({"cat": [5], " cat": [32, 5]}, "cat") == ((5,),)
    assert words({"cat": [5], " cat": [5]}, "cat") == ((5,),)
    assert words(ids, " cat", "cat") == ((5,), (6,))


@pytest.mark.parametrize("ids", [[], [5, 100]])
def test_bad_word_without_tokens_is_refused(ids: list[int]) -> None:
    """A tokenizer may have more tokens than its model."""
    with pytest.raises(SamplingError, match=r"^bad_words must be words that .* got 'cat'$"):
        words({"cat": ids, " cat": ids}, "cat")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"stop_token_ids": [3, 100]},
            "stop_token_ids must hold ids of the vocabulary of 100 .*100",
        ),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold ids .* got -1"),
        ({"logit_bias": {500: 1.0}}, "logit_bias must hold ids .* got 500"),
        ({"logprobs": 21}, "logprobs must be at most 20 here, got 21: raise max_logprobs"),
        ({"logprobs": -1}, "logprobs must be at most 20 here, got -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be at most 20 here, got 21"),
        ({"stop": "x"}, r"stop must be left out with this checkpoint, got \('x',\)"),
        ({"bad_words": ["x"]}, "bad_words must be left out with this checkpoint"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_refused(asked: dict[str, Any], message: str) -> None:
    """Before it reaches a rank."""
    with pytest.raises(SamplingError, match=f"^{message}"):
        check_params(SamplingParams(**asked), vocab_size=100, max_logprobs=20, has_tokenizer=False)


@pytest.mark.parametrize(
    "asked",
    [{"logprobs": 20}, {"logprobs": 0}, {"stop_token_ids": [0, 99]}, {"stop": "x"}, {}],
    ids=str,
)
def test_what_the_model_can_do_is_not_refused(asked: dict[str, Any]) -> None:
    check_params(SamplingParams(**asked), vocab_size=100, max_logprobs=20, has_tokenizer=True)


def test_whole_vocabulary_where_the_cluster_allows_it() -> None:
    for limit in (-1, 100):
        check_params(
            SamplingParams(logprobs=-1, prompt_logprobs=-1),
            vocab_size=100,
            max_logprobs=limit,
            has_tokenizer=False,
        )
