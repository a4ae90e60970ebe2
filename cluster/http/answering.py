"""From a body that was read to the response: what completions and chats have in common."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from actors import messages
from cluster.api_keys import ApiKeys
from cluster.backend import Backend
from cluster.http.answers import Answers, Whole
from cluster.http.bodies import AnswerMetrics, PromptLogprob, Usage
from cluster.http.errors import ApiError, invalid, json_response
from cluster.http.limits import Gate
from cluster.http.protocol import Asked, Body
from cluster.http.settings import Settings
from cluster.http.sse import Chunks, EventStream, events, unless_gone
from models.errors import PromptError
from models.sampling import SamplingParams

GONE = 499  # nginx's: the client went, nobody reads this


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every chunk of an answer begins with."""

    id: str
    created: int  # Unix time, s
    model: str

    def fields(self) -> dict[str, Any]:
        """Return it as fields of a body."""
        return {"id": self.id, "created": self.created, "model": self.model}


class Kind(Chunks, Protocol):
    """One kind of answer, whole and in chunks."""

    async def whole(
        self, wholes: Sequence[Whole], usage: Usage, metrics: AnswerMetrics | None
    ) -> BaseModel:
        """Return the body of all answers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Server:
    """What answers requests: a cluster, and what this server allows."""

    backend: Backend
    settings: Settings
    gate: Gate
    keys: ApiKeys
    # By the id that its chunks tell: whose it is, and what is under way.
    open: dict[str, tuple[str, Answers]] = field(default_factory=dict)

    def model_name(self, asked: str | None) -> str:
        """Return the name that the model was asked by.

        Raises:
            ApiError: 404, there is no model of this name.
        """
        names = self.settings.names
        if asked is not None and asked not in names:
            raise ApiError(
                404,
                f"there is no model {asked!r} here: it is served as {', '.join(names)}",
                code="model_not_found",
                param="model",
            )
        return asked or names[0]

    def head(self, prefix: str, asked: Body) -> Head:
        """Return an answer's head."""
        return Head(
            id=f"{prefix}-{secrets.token_hex(16)}",
            created=int(time.time()),
            model=self.model_name(asked.model),
        )

    def salt(self, request: Request, asked: Asked) -> str:
        """Return the tenant that a request is of.

        Raises:
            ApiError: 400, it names one although its key is one.
        """
        if not self.keys.are_needed:
            return asked.cache_salt or ""
        if asked.cache_salt is not None:
            raise invalid("cache_salt is the API key's own here: leave it out", "cache_salt")
        salt: str = request.state.salt
        return salt

    def requests(
        self,
        prompts: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        head: Head,
        salt: str,
        asked: Asked,
    ) -> list[messages.Request]:
        """Return one request for each prompt.

        Raises:
            ApiError: 400, more answers are asked for than one call may.
        """
        answers = len(prompts) * params.n
        if answers > self.settings.max_answers:
            raise invalid(
                f"{len(prompts)} prompts with n {params.n} are {answers} answers, but at most"
                f" {self.settings.max_answers} are given at once",
                "n",
            )
        reports = params.prompt_logprobs is not None or (
            asked.return_token_ids and not asked.stream
        )
        return [
            messages.Request(
                request_id=f"{head.id}-{index}",
                params=params,
                cache_salt=salt,
                priority=asked.priority,
                deadline_s=asked.deadline_s,
                reports=reports,
                **prompt,
            )
            for index, prompt in enumerate(prompts)
        ]

    def token_ids(self, ids: Sequence[int]) -> messages.TokenIds:
        """Return a prompt's ids as the cluster takes them; too many are refused here already."""
        if len(ids) >= self.backend.facts.max_model_len:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, but max_model_len is"
                f" {self.backend.facts.max_model_len} with at least one token of answer: shorten"
                " the prompt"
            )
        return np.asarray(ids, dtype=np.int32)

    async def answer(
        self,
        request: Request,
        asked: Asked,
        requests: Sequence[messages.Request],
        head: Head,
        kind: Kind,
    ) -> Response:
        """Return all answers, whole or as a stream."""
        answers = Answers(self.backend, requests, self.gate)
        self.open[head.id] = key_salt(request), answers

        async def close() -> None:
            self.open.pop(head.id, None)
            await answers.close()

        try:
            if not asked.stream:
                wholes = await unless_gone(answers.collect(), request.receive)
                await close()
                if wholes is None:
                    return Response(status_code=GONE)
                metrics = answers.metrics if asked.include_metrics else None
                told = await kind.whole(wholes, answers.usage, metrics)
                return json_response(told.model_dump())
            beginning = answers.begin(self.settings.first_wait_s)
            if not await unless_gone(beginning, request.receive):
                await close()
                return Response(status_code=GONE)
        except BaseException:
            await close()
            raise
        options = asked.stream_options
        return EventStream(
            events(
                answers,
                kind,
                self.settings,
                include_usage=options is not None and options.include_usage,
                include_metrics=asked.include_metrics,
                return_progress=asked.return_progress,
            ),
            self.settings.send_timeout_s,
            close,
        )

    async def cancel(self, request: Request, answer_id: str) -> None:
        """End an answer with what it has.

        Raises:
            ApiError: 404, nothing of this id is under way, or it is another key's.
        """
        salt, answers = self.open.get(answer_id, (None, None))
        if answers is None or salt != key_salt(request):
            raise ApiError(
                404,
                f"no answer {answer_id!r} is under way: it has ended, or never was",
                code="not_found",
                param="id",
            )
        await answers.cancel()


def key_salt(request: Request) -> str:
    """Return what stands for the API key that a request came with; all are one without keys."""
    salt: str = request.state.salt
    return salt


def prompt_fields(prompt: messages.PromptReport | None, asked: Asked) -> dict[str, Any]:
    """Return what is told of a prompt, as fields of a body."""
    if prompt is None:
        return {}
    told: dict[str, Any] = {}
    if asked.return_token_ids:
        told["prompt_token_ids"] = prompt.token_ids.tolist()
    if asked.prompt_logprobs is not None and prompt.logprobs is not None:
        count = asked.prompt_logprobs
        told["prompt_logprobs"] = [
            None
            if place is None
            else {
                token_id: PromptLogprob(**vars(each))
                for token_id, each in first_of(place, count).items()
            }
            for place in prompt.logprobs
        ]
    return told


def first_of(place: messages.Logprobs, count: int) -> messages.Logprobs:
    """Return of a place its own token and ``count`` of the likeliest (-1: all)."""
    own = next(iter(place))
    return {
        token_id: each
        for token_id, each in place.items()
        if token_id == own or count < 0 or each.rank <= count
    }


def spelled(token_id: int, logprob: messages.Logprob) -> str:
    """Return a token's text, or its id where the checkpoint has no tokenizer."""
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token
