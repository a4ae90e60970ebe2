"""Bodies of requests, as OpenAI defines them, with vLLM's extras.

Unlike vLLM, which ignores fields it does not know, a request with such a field is refused: a
misspelt ``temprature`` must not go unnoticed. Fields of OpenAI's that do not change an answer
(``user``, ``metadata``, ``prompt_cache_key``, ...) are taken and ignored; those that would
(``tools``, ``echo``, ``response_format``) are taken at the values that ask for nothing. ``null``
is what it is to OpenAI: the default. Ranges are `models.sampling.SamplingParams`' business.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

MOST_STOPS = 16
MOST_IDS = 1024  # of stop_token_ids, and entries of logit_bias and bad_words
MOST_DEADLINE_S = 1e7
INT64 = 2**63

Integer = Annotated[int, Strict(), Field(ge=-INT64, lt=INT64)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(lambda value: _number(value))]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
# One error tells enough: a list of a million wrong ids must not become a million errors.
TokenIdList = Annotated[list[TokenId], Field(fail_fast=True)]
StopText = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True, max_length=MOST_STOPS)]

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)
# The values that ask for nothing; null does too.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    # A template is a program: the checkpoint's own is taken, and none that a client brings.
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "verbosity": (),
    "moderation": (),
}


def _number(value: object) -> object:
    """Refuse true for 1 and '0.5' for 0.5, and an integer that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    if isinstance(value, int) and abs(value) > INT64:
        raise ValueError("must be a number of sensible size")
    return value


def _at_most(count: int) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"has {len(value)} entries, of which at most {count} are taken")
        return value

    return BeforeValidator(check)


class StreamOptions(BaseModel):
    """What a stream tells beside its pieces."""

    model_config = ConfigDict(extra="ignore")
    include_usage: Flag = False


class Body(BaseModel):
    """A body of which every field is known."""

    model_config = ConfigDict(extra="ignore")  # `_known` has refused what is unknown
    only_neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    model: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: object) -> object:
        """Refuse the first field that would change the answer and is not supported."""
        if not isinstance(body, dict):
            return body
        kept: dict[str, object] = {}
        for name, value in body.items():
            if value is None or name in IGNORED:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.only_neutral:
                raise ValueError(f"unknown field {name[:100]!r}")
            elif not any(type(value) is type(ok) and value == ok for ok in NEUTRAL[name]):
                raise ValueError(f"{name} is not supported: leave it out")
        return kept


class Asked(Body):
    """What completions and chats have in common."""

    n: Integer = 1
    stream: Flag = False
    stream_options: StreamOptions | None = None
    seed: Integer | None = None
    stop: StopText | StopTexts | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    # Read by SamplingParams, which names the first entry that is wrong.
    logit_bias: Annotated[
        Any,
        _at_most(MOST_IDS),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
    ] = None
    # vLLM's extras.
    top_k: Integer = 0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    min_tokens: Integer = 0
    stop_token_ids: Annotated[TokenIdList, _at_most(MOST_IDS)] | None = None
    include_stop_str_in_output: Flag = False
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    bad_words: StopTexts | None = None
    return_token_ids: Flag = False
    prompt_logprobs: Integer | None = None
    cache_salt: Annotated[str, Strict(), StringConstraints(min_length=1, max_length=256)] | None = (
        None
    )
    priority: Integer = 0  # a lower one goes first
    include_metrics: Flag = False
    # llama.cpp's: chunks with how far the prefill is.
    return_progress: Flag = False
    # Our own: from the arrival; then the answer ends with what it has.
    deadline_s: Annotated[Number, Field(gt=0, le=MOST_DEADLINE_S)] | None = None

    @model_validator(mode="after")
    def _stream_fields(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true only")
        if self.return_progress and not self.stream:
            raise ValueError("return_progress is for stream: true only")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is for stream: false only")
        return self

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `SamplingParams` that both kinds have."""
        names = (
            "n seed stop temperature top_p presence_penalty frequency_penalty logit_bias top_k"
            " min_p repetition_penalty min_tokens stop_token_ids include_stop_str_in_output"
            " ignore_eos skip_special_tokens bad_words"
        )
        return {name: getattr(self, name) for name in names.split()}


Prompts = Text | TokenIdList | Annotated[list[Text], Field(fail_fast=True)]
Prompts |= Annotated[list[TokenIdList], Field(fail_fast=True)]


class CompletionRequest(Asked):
    """The body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: Integer = 16
    logprobs: Integer | None = None
    echo: Flag = False  # the prompt comes before its answer, with logprobs of its tokens too

    @model_validator(mode="after")
    def _echo_fields(self) -> "CompletionRequest":
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs is for stream: false only")
        return self


class TextPart(BaseModel):
    """A piece of a message; only text is read."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[str, Strict(), StringConstraints(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Annotated[str, Strict(), StringConstraints(max_length=256)] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return it as the checkpoint's template takes it, with parts joined by newlines."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **name}


class ChatRequest(Asked):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Integer | None = None  # OpenAI's older name of the next
    max_completion_tokens: Integer | None = None  # None: as many as the model's length has room for
    logprobs: Flag = False
    top_logprobs: Integer | None = None

    @model_validator(mode="after")
    def _logprob_fields(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true only")
        return self


class TokenizeRequest(Body):
    """The body of POST /tokenize, vLLM's: a text, or a conversation in the model's template."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: Flag | None = None  # None: those of a text; a template writes its own
    add_generation_prompt: Flag = True
    return_token_strs: Flag = False

    @model_validator(mode="after")
    def _one_form(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of POST /detokenize, vLLM's."""

    tokens: TokenIdList
