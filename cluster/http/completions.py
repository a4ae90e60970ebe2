"""POST /v1/completions: prompts as texts or token ids, their answers as text."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from actors.messages import Logprobs
from cluster.backend import Backend
from cluster.http.answering import Head, Server, first_of, prompt_fields, spelled
from cluster.http.answers import Piece, Whole
from cluster.http.bodies import (
    AnswerMetrics,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptProgress,
    Usage,
)
from cluster.http.errors import invalid
from cluster.http.protocol import CompletionRequest
from models.sampling import SamplingParams


async def complete(server: Server, request: Request, asked: CompletionRequest) -> Response:
    """Answer one body."""
    head = server.head("cmpl", asked)
    salt = server.salt(request, asked)
    prompts = _prompts(server, asked)
    requests = server.requests(prompts, completion_params(asked), head, salt, asked)
    echoed = [await _text(server, prompt) for prompt in prompts] if asked.echo else None
    kind = Completions(head, asked, server.backend, echoed)
    return await server.answer(request, asked, requests, head, kind)


def _prompt_logprobs(asked: CompletionRequest) -> int | None:
    """Return how many are to be told of each of the prompt's tokens: enough for both that ask."""
    echoed = asked.logprobs if asked.echo else None
    counts = [count for count in (asked.prompt_logprobs, echoed) if count is not None]
    return (-1 if -1 in counts else max(counts)) if counts else None


async def _text(server: Server, prompt: Mapping[str, Any]) -> str:
    if "text" in prompt:
        text: str = prompt["text"]
        return text
    return await server.backend.detokenize(prompt["token_ids"].tolist())


def completion_params(asked: CompletionRequest) -> SamplingParams:
    """Return what a body asks of an answer."""
    return SamplingParams(
        max_tokens=asked.max_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=_prompt_logprobs(asked),
        **asked.sampling(),
    )


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

    def __init__(
        self,
        head: Head,
        asked: CompletionRequest,
        backend: Backend | None = None,
        echoed: list[str] | None = None,
    ) -> None:
        """Begin all answers' texts.

        ``echoed`` are the prompts', where they come before these; a ``backend`` is for them alone.
        """
        self._head = head
        self._asked = asked
        self._backend = backend
        self._with_token_ids = asked.return_token_ids
        self._echoed = echoed
        self._begun: set[int] = set()  # choices
        self._offsets: dict[int, int] = defaultdict(int)  # of each answer's next token

    def first(self) -> Iterable[Completion]:
        """Return nothing: a completion has no head."""
        return ()

    def piece(self, piece: Piece) -> Completion | None:
        """Return a piece's chunk."""
        delta = piece.delta
        text = self._echo(piece.choice) + delta.text
        has_tokens = delta.logprobs or (self._with_token_ids and delta.token_ids)
        if not (text or has_tokens or delta.finish_reason):
            return None
        choice = CompletionChoice(
            index=piece.choice,
            text=text,
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

    async def whole(
        self, wholes: Sequence[Whole], usage: Usage, metrics: AnswerMetrics | None
    ) -> Completion:
        """Return the body of all answers."""
        choices = [
            CompletionChoice(
                index=index,
                text=self._echo(index) + whole.text,
                logprobs=await self._whole_logprobs(index, whole),
                finish_reason=whole.finish_reason,
                stop_reason=whole.stop_reason,
                token_ids=whole.token_ids if self._with_token_ids else None,
                **prompt_fields(whole.prompt, self._asked),
            )
            for index, whole in enumerate(wholes)
        ]
        return Completion(**self._head.fields(), choices=choices, usage=usage, metrics=metrics)

    def _echo(self, choice: int) -> str:
        """Return what comes before an answer's first piece."""
        if self._echoed is None or choice in self._begun:
            return ""
        self._begun.add(choice)
        return self._echoed[choice // self._asked.n]

    async def _whole_logprobs(self, choice: int, whole: Whole) -> CompletionLogprobs | None:
        """Return those of an answer, behind those of its prompt where it is echoed."""
        prompt, count = whole.prompt, self._asked.logprobs
        if self._echoed is None or count is None or prompt is None or prompt.logprobs is None:
            return self._logprobs(choice, whole.logprobs)
        assert self._backend is not None
        first = await self._backend.detokenize([int(prompt.token_ids[0])])
        self._offsets[choice] = len(first)
        places = [first_of(place, count) for place in prompt.logprobs if place is not None]
        told = self._logprobs(choice, [*places, *(whole.logprobs or [])])
        assert told is not None
        return CompletionLogprobs(
            tokens=[first, *told.tokens],
            token_logprobs=[None, *told.token_logprobs],
            top_logprobs=[None, *told.top_logprobs],
            text_offset=[0, *told.text_offset],
        )

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
