"""A request becomes token ids, or one sentence on why it cannot."""

from typing import Any

import numpy as np
import pytest

from actors.messages import Request
from actors.prompt import prompt_ids
from models.errors import PromptError
from models.tokenizer import Tokenizer
from tests.letters import LetterBackend

VOCAB = 300
MAX_MODEL_LEN = 8


def encode(tokenizer: Tokenizer | None = None, **prompt: Any) -> list[int]:
    """Return the prompt's token ids as a list."""
    if "token_ids" in prompt:
        prompt["token_ids"] = np.array(prompt["token_ids"], dtype=np.int32)
    token_ids = prompt_ids(Request(request_id="r", **prompt), tokenizer, VOCAB, MAX_MODEL_LEN)
    assert token_ids.dtype == np.int32
    return list(map(int, token_ids))


@pytest.fixture
def letters() -> Tokenizer:
    return Tokenizer(LetterBackend())


@pytest.mark.parametrize("ids", [[0], [VOCAB - 1], list(range(MAX_MODEL_LEN - 1))], ids=str)
def test_token_ids_are_taken_as_they_are(ids: list[int]) -> None:
    """To the edges of vocabulary and context, and without a tokenizer."""
    assert encode(token_ids=ids) == ids


def test_text_is_encoded(letters: Tokenizer) -> None:
    """By the checkpoint's tokenizer."""
    assert encode(letters, text="ab") == [97, 98]


def test_messages_are_encoded(letters: Tokenizer) -> None:
    """Through the chat template."""
    messages = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})

    assert encode(letters, messages=messages) == [97, 62, 98]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"token_ids": []}, "the prompt is empty: give at least one token$"),
        ({"text": ""}, "the prompt is empty: give at least one character$"),
        ({"text": " "}, "the prompt is empty: give at least one token$"),
        ({}, "the prompt is empty"),
        ({"messages": ()}, "A chat needs a list of at least one message$"),
        ({"messages": ({"role": "user"},)}, "Message 0 must have a content that is text"),
        (
            {"messages": ({"role": "user", "content": " "},)},
            "the prompt is empty: give at least one token$",
        ),
        (
            {"token_ids": [1] * MAX_MODEL_LEN},
            "the prompt has 8 tokens, but max_model_len is 8 with at least one token of answer:"
            " shorten the prompt or raise --max-model-len$",
        ),
        ({"text": "a" * 20}, "the prompt has 20 tokens, but max_model_len is 8"),
        ({"token_ids": [5, -1, 6]}, "token id -1 is outside the vocabulary of 300 tokens$"),
        ({"token_ids": [5, VOCAB]}, "token id 300 is outside the vocabulary of 300 tokens$"),
        ({"token_ids": [2**31 - 1]}, "token id 2147483647 is outside the vocabulary"),
        ({"token_ids": [999, -7]}, "token id -7 is outside the vocabulary"),
        ({"text": "\u20ac"}, "token id 8364 is outside the vocabulary"),
        ({"text": "a\ud800"}, "The prompt is not valid Unicode at character 1"),
    ],
    ids=str,
)
def test_what_cannot_be_a_prompt_is_refused(
    letters: Tokenizer, prompt: dict[str, Any], message: str
) -> None:
    """On the coordinator, before any rank starts: a wrong id would be a fault in a kernel."""
    with pytest.raises(PromptError, match=f"^{message}") as caught:
        encode(letters, **prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [{"text": "a"}, {"messages": ({"role": "user"},)}], ids=str)
def test_words_need_a_tokenizer(prompt: dict[str, Any]) -> None:
    """A checkpoint without one still answers token ids, and the error says so."""
    message = "this checkpoint has no tokenizer files: give the prompt as prompt_token_ids$"
    with pytest.raises(PromptError, match=f"^{message}"):
        encode(None, **prompt)


def test_chat_needs_a_template() -> None:
    """A base model has none; guessing one would give worse answers without a word."""
    backend = LetterBackend()
    backend.chat_template = ""
    with pytest.raises(PromptError, match="no chat template"):
        encode(Tokenizer(backend), messages=({"role": "user", "content": "a"},))
