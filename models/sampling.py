"""What a caller asks of the answer: names, defaults and meanings are vLLM's."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import SamplingError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, when the answer ends, and what is told about it.

    Lists may be given as lists, tuples or (of strings) one string, and are kept as
    tuples. What differs from vLLM: a temperature below 0.01 is not raised to it,
    any integer is a seed (-1 too), ``max_tokens=None`` is refused, and a checkpoint's
    every EOS ends an answer without a stop_reason. The n answers of a prompt are
    made one after another, and each computes the prompt anew.
    """

    n: int = 1  # answers of one prompt; answer i has random numbers of its own, whatever n is
    presence_penalty: float = 0.0  # -2 to 2: off the logit of each token in the answer
    frequency_penalty: float = 0.0  # -2 to 2: the same, times how often it is there
    repetition_penalty: float = 1.0  # > 1 makes tokens of prompt and answer less likely
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # only the most likely tokens that make up this probability
    top_k: int = 0  # only the k most likely tokens; 0 or -1: all
    min_p: float = 0.0  # only tokens with this share of the most likely token's probability
    seed: int | None = None  # None: drawn for each request
    stop: str | Sequence[str] | None = None  # texts that end the answer
    stop_token_ids: Sequence[int] | None = None  # tokens that end the answer
    include_stop_str_in_output: bool = False  # else the text ends before what ended it
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0  # before them no EOS, no stop token, and no stop text counts
    logprobs: int | None = None  # of the k likeliest tokens and the chosen one; -1: of all
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these tokens
    bad_words: Sequence[str] | None = None  # never completed, at a text's begin or after a space
    skip_special_tokens: bool = True  # in the text

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _READ[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name, (is_right, wanted) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_right(value):
                raise SamplingError(f"{name} must be {wanted}, got {value}")
        if self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} and"
                f" {self.max_tokens}"
            )
        if self.n > 1 and self.temperature == 0.0:
            raise SamplingError(
                f"n must be 1 with temperature 0, got {self.n}: greedy answers would all be the"
                " same"
            )


# What a value must be beyond its type, and how that is said.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda n: n >= 1, ">= 1"),
    "presence_penalty": (lambda penalty: -2.0 <= penalty <= 2.0, "in [-2, 2]"),
    "frequency_penalty": (lambda penalty: -2.0 <= penalty <= 2.0, "in [-2, 2]"),
    "repetition_penalty": (
        lambda penalty: 0.0 < penalty <= sys.float_info.max,
        "a number > 0 (1 is none)",
    ),
    "temperature": (
        lambda temperature: 0.0 <= temperature <= sys.float_info.max,
        "a number >= 0 (0 is greedy)",
    ),
    "top_p": (lambda top_p: 0.0 < top_p <= 1.0, "in (0, 1]"),
    "top_k": (lambda top_k: top_k >= -1, ">= 1, or 0 or -1 for all tokens"),
    "min_p": (lambda min_p: 0.0 <= min_p <= 1.0, "in [0, 1]"),
    "max_tokens": (lambda tokens: tokens >= 1, ">= 1"),
    "min_tokens": (lambda tokens: tokens >= 0, ">= 0"),
    "logprobs": (lambda count: count >= -1, ">= 0, or -1 for the whole vocabulary"),
    "prompt_logprobs": (lambda count: count >= -1, ">= 0, or -1 for the whole vocabulary"),
}


def _typed(wanted: str, *kinds: type) -> Callable[[str, object], Any]:
    """Refuse what a JSON body or a typing slip may bring: true for 1, '0.5' for 0.5."""

    def read(name: str, value: object) -> object:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _wrong(name, wanted, value)
        return value

    return read


def _read_strings(name: str, value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else _elements(value)
    if strings is None or not all(isinstance(string, str) and string for string in strings):
        raise _wrong(name, "a text or a list of texts, none of them empty", value)
    return tuple(dict.fromkeys(strings))


def _read_ids(name: str, value: object) -> tuple[int, ...]:
    ids = _elements(value)
    if ids is None or not all(type(token_id) is int for token_id in ids):
        raise _wrong(name, "a list of integers", value)
    return tuple(dict.fromkeys(ids))


def _read_bias(name: str, value: object) -> dict[int, float]:
    """JSON spells the ids as strings."""
    wanted = "a mapping of token ids to finite numbers"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, wanted, value)
    bias: dict[int, float] = {}
    for token_id, number in value.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        is_id = type(token_id) is int or (isinstance(token_id, str) and token_id.isdecimal())
        if not is_id or not is_number or not math.isfinite(number):
            raise _wrong(name, wanted, {token_id: number})
        bias[int(token_id)] = float(number)
    return bias


def _elements(value: object) -> list[Any] | None:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else None


def _wrong(name: str, wanted: str, value: object) -> SamplingError:
    return SamplingError(f"{name} must be {wanted}, got {value!r}")


_integer = _typed("an integer", int)
_integer_or_none = _typed("an integer or None", int, type(None))
_number = _typed("a number", int, float)
_flag = _typed("true or false", bool)

_READ: dict[str, Callable[[str, object], Any]] = {
    "n": _integer,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repetition_penalty": _number,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "min_p": _number,
    "seed": _integer_or_none,
    "stop": _read_strings,
    "stop_token_ids": _read_ids,
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "max_tokens": _integer,
    "min_tokens": _integer,
    "logprobs": _integer_or_none,
    "prompt_logprobs": _integer_or_none,
    "logit_bias": _read_bias,
    "bad_words": _read_strings,
    "skip_special_tokens": _flag,
}
