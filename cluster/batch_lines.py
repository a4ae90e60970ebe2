"""The lines of a batch: one JSON object each, read one at a time.

{"prompt": "text", "max_tokens": 64}
{"id": "b", "prompt_token_ids": [1, 2, 3], "cache_salt": "tenant-a", "priority": 1}
{"id": "c", "messages": [{"role": "user", "content": "Who are you?"}], "deadline_s": 60}

Or they are of OpenAI's form: see `cluster.batch_openai`.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.prompt import OPTIONS
from models.errors import PromptError, RingspanError
from models.sampling import SamplingParams

if TYPE_CHECKING:
    from cluster.batch_openai import OpenAILine

FORMS = ("prompt", "prompt_token_ids", "messages")
PROMPT_OPTIONS = tuple(name for name in OPTIONS if name != "request_id")  # an id is given already
SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
KNOWN = ("id", *FORMS, *PROMPT_OPTIONS, *SAMPLING)
# These change when an answer comes, and whose it is, but not the answer.
NOT_OF_THE_ANSWER = ("priority", "cache_salt")
MAX_INT64 = 2**63
_DEFAULTS = vars(SamplingParams())


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One line as it was read; either what it asks, or why it cannot be answered."""

    number: int  # from 1
    id: str | int  # the line's own, else its number
    has_own_id: bool
    size_bytes: int
    prompt: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    error: RingspanError | None = None
    is_openai: bool = False  # of OpenAI's form
    openai: "OpenAILine | None" = None  # how it is answered then

    @property
    def key(self) -> str:
        """The id as it is compared: 7 and "7" are one."""
        return id_key(self.id)

    def digest(self) -> str:
        """Return 32 characters that differ where another answer may be expected."""
        prompt = {k: v for k, v in self.prompt.items() if k not in NOT_OF_THE_ANSWER}
        # Without defaults: a parameter that a later version adds must not change what was asked.
        params = {k: v for k, v in vars(self.params).items() if v != _DEFAULTS[k]}
        asked = json.dumps([prompt, params], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


def id_key(line_id: object) -> str:
    """Return an id as it is compared, in ASCII."""
    return json.dumps(str(line_id))


def read_lines(
    path: Path, defaults: SamplingParams, cache_salt: str | None = None
) -> Iterator[BatchLine]:
    """Read a file line by line; empty lines are skipped, but counted.

    Args:
        path: A file of JSON lines in UTF-8.
        defaults: What a line asks for where it does not say.
        cache_salt: The tenant of lines that name none.

    Raises:
        PromptError: The file cannot be read. What is wrong with a line is in its ``error``.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield read_line(number, text, defaults, cache_salt)
    except OSError as error:
        raise PromptError(f"cannot read the prompt file {path}: {error.strerror}") from None


def read_line(
    number: int, text: bytes, defaults: SamplingParams, cache_salt: str | None = None
) -> BatchLine:
    """Read one line; whatever is wrong with it is in ``error``, with the line's number."""
    line = BatchLine(number=number, id=number, has_own_id=False, size_bytes=len(text))
    try:
        values = _parse(text)
        if "url" in values or "custom_id" in values:
            return _read_openai(line, values, defaults, cache_salt)
        _refuse_unknown(values)
        if "id" in values:
            line = dataclasses.replace(line, id=_read_id(values.pop("id")), has_own_id=True)
        given = {name: values.pop(name) for name in SAMPLING if values.get(name) is not None}
        values = {name: value for name, value in values.items() if value is not None}
        _check_prompt(values)
        if cache_salt is not None:
            values.setdefault("cache_salt", cache_salt)
        params = dataclasses.replace(defaults, **given) if given else defaults
        return dataclasses.replace(line, prompt=values, params=params)
    except RingspanError as error:
        return dataclasses.replace(line, error=type(error)(f"line {number}: {error}"))


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(f"it is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8; nested without end
        raise PromptError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise PromptError(f"it must be a JSON object, got {type(values).__name__}")
    return values


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in KNOWN and name not in SAMPLING:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(KNOWN)}"
            raise PromptError(f"unknown field {name[:100]!r}; {hint}")


def _read_openai(
    line: BatchLine, values: Mapping[str, Any], defaults: SamplingParams, cache_salt: str | None
) -> BatchLine:
    # Here, for most batches need nothing of HTTP.
    from cluster.batch_openai import read_openai

    line = dataclasses.replace(line, is_openai=True)
    if "custom_id" in values:
        line = dataclasses.replace(line, id=_read_id(values["custom_id"]), has_own_id=True)
    try:
        openai = read_openai(values)
        prompt = openai.prompt()
        if cache_salt is not None:
            prompt.setdefault("cache_salt", cache_salt)
        params = openai.params(defaults.max_tokens)
        return dataclasses.replace(line, prompt=prompt, params=params, openai=openai)
    except RingspanError as error:
        return dataclasses.replace(line, error=type(error)(f"line {line.number}: {error}"))


def _read_id(value: object) -> str | int:
    if isinstance(value, str) and value:
        return value
    if type(value) is int and abs(value) < MAX_INT64:
        return value
    raise PromptError(f"id must be a text of at least one character or an integer, got {value!r}")


def _check_prompt(values: Mapping[str, Any]) -> None:
    """Refuse what only a file can bring: a handle's callers have types."""
    given = [name for name in FORMS if name in values]
    if len(given) != 1:
        raise PromptError(
            f"it needs exactly one of {', '.join(FORMS)}, got {', '.join(given) or 'none'}"
        )
    name, value = given[0], values[given[0]]
    if name == "prompt" and not isinstance(value, str):
        raise PromptError(f"prompt must be a text, got {type(value).__name__}")
    if name == "prompt_token_ids" and not (
        isinstance(value, list) and all(type(token_id) is int for token_id in value)
    ):
        raise PromptError("prompt_token_ids must be a flat list of integers")
    if name == "messages" and not (
        isinstance(value, list) and all(isinstance(message, dict) for message in value)
    ):
        raise PromptError("messages must be a list of objects with role and content")
    for option in PROMPT_OPTIONS:
        is_right, expected = OPTIONS[option]
        if option in values and not is_right(values[option]):
            raise PromptError(f"{option} must be {expected}, got {values[option]!r}")
