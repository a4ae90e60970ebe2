"""POST /v1/chat/completions: a conversation in the checkpoint's own template."""

from collections.abc import Iterable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from actors.messages import Logprob, Logprobs
from cluster.http.answering import Head, Server, prompt_fields, spelled
from cluster.http.answers import Piece, Whole
from cluster.http.bodies import (
    AnswerMessage,
    AnswerMetrics,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    PromptProgress,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from cluster.http.protocol import ChatRequest
from models.sampling import SamplingParams


async def chat(server: Server, request: Request, asked: ChatRequest) -> Response:
    """Answer one body."""
    head = server.head("chatcmpl", asked)
    salt = server.salt(request, asked)
    params = chat_params(asked, server.backend.facts.max_model_len)
    prompt = {"messages": tuple(message.for_template() for message in asked.messages)}
    requests = server.requests([prompt], params, head, salt, asked)
    return await server.answer(request, asked, requests, head, Chats(head, asked))


def chat_params(asked: ChatRequest, max_tokens: int) -> SamplingParams:
    """Return what a body asks of an answer; ``max_tokens`` is for one that does not say."""
    given = [asked.max_completion_tokens, asked.max_tokens, max_tokens]
    return SamplingParams(
        max_tokens=next(tokens for tokens in given if tokens is not None),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        prompt_logprobs=asked.prompt_logprobs,
        **asked.sampling(),
    )


class Chats:
    """The bodies of one call's answers."""

    def __init__(self, head: Head, asked: ChatRequest) -> None:
        """Take what is asked of them."""
        self._head = head
        self._n = asked.n
        self._top_logprobs = asked.top_logprobs or 0
        self._asked = asked
        self._with_token_ids = asked.return_token_ids

    def first(self) -> Iterable[ChatChunk]:
        """Return who speaks, for each answer."""
        for index in range(self._n):
            choice = ChatChunkChoice(index=index, delta=AnswerMessage(content=""))
            yield ChatChunk(**self._head.fields(), choices=[choice])

    def piece(self, piece: Piece) -> ChatChunk | None:
        """Return a piece's chunk."""
        delta = piece.delta
        has_tokens = delta.logprobs or (self._with_token_ids and delta.token_ids)
        if not (delta.text or has_tokens or delta.finish_reason):
            return None
        choice = ChatChunkChoice(
            index=piece.choice,
            delta=AnswerMessage(role=None, content=delta.text),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=list(delta.token_ids) if self._with_token_ids else None,
        )
        return ChatChunk(**self._head.fields(), choices=[choice])

    def progress(self, progress: PromptProgress) -> ChatChunk:
        """Return a chunk without answers."""
        return ChatChunk(**self._head.fields(), choices=[], prompt_progress=progress)

    def usage(self, usage: Usage | None, metrics: AnswerMetrics | None) -> ChatChunk:
        """Return the last chunk."""
        return ChatChunk(**self._head.fields(), choices=[], usage=usage, metrics=metrics)

    async def whole(
        self, wholes: Sequence[Whole], usage: Usage, metrics: AnswerMetrics | None
    ) -> ChatCompletion:
        """Return the body of all answers."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=whole.text),
                logprobs=self._logprobs(whole.logprobs),
                finish_reason=whole.finish_reason,
                stop_reason=whole.stop_reason,
                token_ids=whole.token_ids if self._with_token_ids else None,
            )
            for index, whole in enumerate(wholes)
        ]
        return ChatCompletion(
            **self._head.fields(),
            choices=choices,
            usage=usage,
            metrics=metrics,
            **prompt_fields(wholes[0].prompt, self._asked),
        )

    def _logprobs(self, logprobs: Sequence[Logprobs] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs(content=[self._place(place) for place in logprobs])

    def _place(self, place: Logprobs) -> TokenLogprob:
        """Return one token; its own entry comes first, and may be none of the likeliest."""
        token_id, own = next(iter(place.items()))
        likeliest = sorted(place.items(), key=lambda item: item[1].rank)
        count = len(place) if self._top_logprobs < 0 else self._top_logprobs
        return TokenLogprob(
            **_told(token_id, own).model_dump(),
            top_logprobs=[_told(*item) for item in likeliest[:count]],
        )


def _told(token_id: int, logprob: Logprob) -> TopLogprob:
    token = spelled(token_id, logprob)
    # A token that is part of a character only has no text from which its bytes could be told.
    is_whole = logprob.decoded_token is not None and "\N{REPLACEMENT CHARACTER}" not in token
    return TopLogprob(
        token=token,
        logprob=logprob.logprob,
        bytes=list(token.encode()) if is_whole else None,
    )
