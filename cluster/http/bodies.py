"""Bodies of answers, as OpenAI and vLLM define them."""

from typing import Literal

from pydantic import BaseModel


class Tokenized(BaseModel):
    """The answer to `TokenizeRequest`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The answer to `DetokenizeRequest`."""

    prompt: str


class Version(BaseModel):
    """The answer of GET /version."""

    version: str


class Cancelled(BaseModel):
    """The answer of POST /v1/cancel/{id}."""

    id: str
    cancelled: Literal[True] = True


class CachedTokens(BaseModel):
    """Of the prompt's tokens, those that were not computed for it."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and answers of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMetrics(BaseModel):
    """Times of a call, vLLM's; null where there is no token, or only one, to measure between.

    Of several answers: from the first token of all to the last, and the mean of their gaps.
    """

    time_to_first_token_ms: float
    queue_time_ms: float
    generation_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float | None


class CompletionLogprobs(BaseModel):
    """Of each token of an answer, or of a piece of it."""

    tokens: list[str]
    token_logprobs: list[float | None]  # null for a prompt's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # of the token in the answer's text


class PromptLogprob(BaseModel):
    """A token that could have been in a prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


# By token id; null for the first token.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionChoice(BaseModel):
    """One answer to a prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class PromptProgress(BaseModel):
    """How far a prefill is, in tokens; ``processed`` has the cached ones too."""

    total: int
    cache: int
    processed: int
    time_ms: int


class Completion(BaseModel):
    """An answer to `CompletionRequest`, or a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # Unix time, s
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: AnswerMetrics | None = None
    prompt_progress: PromptProgress | None = None


class TopLogprob(BaseModel):
    """A token that could have been, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None  # null where the token is no whole character


class TokenLogprob(TopLogprob):
    """A token of an answer, with the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of an answer, or of a piece of it."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] | None = "assistant"
    content: str | None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """An answer to `ChatRequest`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # Unix time, s
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: AnswerMetrics | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer to a conversation."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """A chunk of an answer to `ChatRequest`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int  # Unix time, s
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: AnswerMetrics | None = None
    prompt_progress: PromptProgress | None = None


class ModelCard(BaseModel):
    """A name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ringspan"
    max_model_len: int


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail
