"""The forms in which a prompt may be given to `LLM` and `Client`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.messages import Request
from models.errors import PromptError
from models.sampling import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


# What a prompt mapping may have beside the prompt: a check, and what is expected.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cache_salt": (_is_name, "a text of at least one character, the name of a tenant"),
    "request_id": (_is_name, "a text of at least one character"),
    "priority": (lambda value: type(value) is int, "an integer, lower ones go first"),
    "deadline_s": (
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
        "a number of seconds greater than 0",
    ),
}


def make_request(request_id: str, prompt: Any, params: SamplingParams) -> Request:
    """Return the request for a prompt's answer; an id in the prompt goes before ``request_id``.

    Raises:
        PromptError: The prompt is of no form there is.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return _request_from_mapping(request_id, prompt, params)
    raise PromptError(
        "a prompt must be a text or a mapping with prompt, prompt_token_ids or messages, got"
        f" {type(prompt).__name__}"
    )


def _request_from_mapping(
    request_id: str, prompt: Mapping[str, Any], params: SamplingParams
) -> Request:
    forms = {"prompt", "prompt_token_ids", "messages"}
    given = prompt.keys() - OPTIONS.keys()
    if len(given) != 1 or not given <= forms:
        raise PromptError(
            f"a prompt mapping needs exactly one of {', '.join(sorted(forms))}, got"
            f" {', '.join(map(str, prompt)) or 'none'}"
        )
    options: dict[str, Any] = {"request_id": request_id}
    for name in OPTIONS.keys() & prompt.keys():
        is_right, expected = OPTIONS[name]
        if not is_right(prompt[name]):
            raise PromptError(f"{name} must be {expected}, got {prompt[name]!r}")
        options[name] = prompt[name]
    # A stream has no other place for them.
    reports = params.prompt_logprobs is not None
    ask = functools.partial(Request, params=params, reports=reports, **options)
    if "prompt" in prompt:
        return ask(text=str(prompt["prompt"]))
    if "messages" in prompt:
        return ask(messages=tuple(dict(message) for message in prompt["messages"]))
    token_ids = np.asarray(prompt["prompt_token_ids"])
    if token_ids.size and (token_ids.ndim != 1 or token_ids.dtype.kind not in "iu"):
        raise PromptError("prompt_token_ids must be a flat list of integers")
    # Out-of-range ids must not wrap into the vocabulary.
    token_ids = token_ids.astype(np.int64).clip(-1, 2**31 - 1).astype(np.int32)
    return ask(token_ids=token_ids)
