"""Texts to tokens and back for callers who only want to count or to look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import PromptError
from models.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is to be cut into tokens: a text, or a conversation in the checkpoint's template."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    add_special_tokens: bool = True  # a BOS, say; a template writes its own
    add_generation_prompt: bool = True  # for messages: up to where the answer begins
    with_strings: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A text's tokens; ``strings`` where they were asked for."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] | None = None


def tokenize(tokenizer: Tokenizer | None, text: Text) -> Tokens:
    """Return a text's tokens.

    Raises:
        PromptError: There is no tokenizer, or no template, or it does not take the text.
    """
    tokenizer = _given(tokenizer)
    if text.messages is not None:
        ids = tokenizer.encode_chat(
            list(text.messages),
            add_generation_prompt=text.add_generation_prompt,
            add_special_tokens=text.add_special_tokens,
        )
    else:
        ids = tokenizer.encode(text.text or "", add_special_tokens=text.add_special_tokens)
    strings = tuple(tokenizer.token_strings(ids)) if text.with_strings else None
    return Tokens(token_ids=tuple(ids), strings=strings)


def detokenize(tokenizer: Tokenizer | None, token_ids: Sequence[int], vocab_size: int) -> str:
    """Return the text of tokens, with that of special ones.

    Raises:
        PromptError: There is no tokenizer, or an id is outside the vocabulary.
    """
    wrong = next((each for each in token_ids if not 0 <= each < vocab_size), None)
    if wrong is not None:
        raise PromptError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")
    return _given(tokenizer).decode(token_ids, skip_special_tokens=False)


def _given(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise PromptError("this checkpoint has no tokenizer files: there are token ids only")
    return tokenizer
