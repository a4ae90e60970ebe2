"""POST /v1/completions: prompts as texts or token ids, their answers as text."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from actors.messages import Logprobs
from cluster.http.answering import Head, Server, spelled
from cluster.http.answers import Piece, Whole
from cluster.http.errors import invalid
from cluster.http.protocol import (
    AnswerMetrics,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptProgress,
    Usage,
)
from models.sampling import SamplingParams


async def complete(server: Server, request: Request, asked: CompletionRequest) -> Response:
    """Answer one body."""
    head = server.head("cmpl", asked)
    salt = server.salt(request, asked)
    params = SamplingParams(
        max_tokens=asked.max_tokens, logprobs=asked.logprobs, **asked.sampling()
    )
    requests = server.requests(_prompts(server, asked), params, head, salt, asked)
    kind = Completions(head, asked.return_token_ids)
    return await server.answer(request, asked, requests, head, kind)


def _prompts(server: Server, asked: CompletionRequest) -> list[dict[str, Any]]:
    """Return each prompt as the fields of a request."""
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if not prompt:
        raise invalid("prompt is empty: give at least one token", "prompt")
    if isinstance(prompt[0], int):
        return [{"token_ids": server.token_ids(prompt)}]
    return [
        {"text": each} if isinstance(each, str) else {"token_ids": server.token_ids(each)}
        for each in prompt
    ]


class Completions:
    """The bodies of one call's answers."""

    def __init__(self, head: Head, with_token_ids: bool) -> None:
        """Begin all answers' texts."""
        self._head = head
        self._with_token_ids = with_token_ids
        self._offsets: dict[int, int] = defaultdict(int)  # of each answer's next token

    def first(self) -> Iterable[Completion]:
        """Return nothing: a completion has no head."""
        return ()

    def piece(self, piece: Piece) -> Completion | None:
        """Return a piece's chunk."""
        delta = piece.delta
        has_tokens = delta.logprobs or (self._with_token_ids and delta.token_ids)
        if not (delta.text or has_tokens or delta.finish_reason):
            return None
        choice = CompletionChoice(
            index=piece.choice,
            text=delta.text,
            logprobs=self._logprobs(piece.choice, delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=list(delta.token_ids) if self._with_token_ids else None,
        )
        return Completion(**self._head.fields(), choices=[choice])

    def progress(self, progress: PromptProgress) -> Completion:
        """Return a chunk without answers."""
        return Completion(**self._head.fields(), choices=[], prompt_progress=progress)

    def usage(self, usage: Usage | None, metrics: AnswerMetrics | None) -> Completion:
        """Return the last chunk."""
        return Completion(**self._head.fields(), choices=[], usage=usage, metrics=metrics)

    def whole(
        self, wholes: Sequence[Whole], usage: Usage, metrics: AnswerMetrics | None
    ) -> Completion:
        """Return the body of all answers."""
        choices = [
            CompletionChoice(
                index=index,
                text=whole.text,
                logprobs=self._logprobs(index, whole.logprobs),
                finish_reason=whole.finish_reason,
                stop_reason=whole.stop_reason,
                token_ids=whole.token_ids if self._with_token_ids else None,
            )
            for index, whole in enumerate(wholes)
        ]
        return Completion(**self._head.fields(), choices=choices, usage=usage, metrics=metrics)

    def _logprobs(
        self, choice: int, logprobs: Sequence[Logprobs] | None
    ) -> CompletionLogprobs | None:
        if logprobs is None:
            return None
        told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for place in logprobs:
            token_id, own = next(iter(place.items()))
            token = spelled(token_id, own)
            told.tokens.append(token)
            told.token_logprobs.append(own.logprob)
            told.top_logprobs.append({spelled(i, each): each.logprob for i, each in place.items()})
            told.text_offset.append(self._offsets[choice])
            self._offsets[choice] += len(token)
        return told
