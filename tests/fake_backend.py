"""A cluster that answers with the prompt's own tokens, for tests of servers in front of one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from actors.errors import UnknownRequest
from actors.messages import (
    Logprob,
    Progress,
    Request,
    RequestDelta,
    RequestMetrics,
)
from cluster.backend import ModelFacts
from models.errors import PromptError

STATUS: dict[str, Any] = {
    "failure": None,
    "running": 3,
    "waiting": 2,
    "pages": [{"total": 8, "free": 2, "running": 4}, {"total": 8, "free": 8, "running": 0}],
    "preemptions": 1,
    "steps": 7,
    "restore": {"restores": 1, "tokens": 512, "recomputed_tokens": 64},
}


class FakeBackend:
    """Answers token i of a prompt with token i + 1, two tokens at a time."""

    def __init__(self) -> None:
        self.facts = ModelFacts(max_model_len=1000, has_tokenizer=True)
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.error: Exception | None = None  # raised instead of an answer
        self.break_after: int | None = None  # deltas, then `error`
        self.hold = asyncio.Event()  # answers wait until it is set
        self.hold.set()
        self.told: dict[str, Any] = dict(STATUS)

    async def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        self.requests.append(request)
        if self.error is not None and self.break_after is None:
            raise self.error
        prompt = self._prompt(request)
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token")
        self.open.add(request.request_id)
        try:
            told = 0
            for index in range(request.params.n):
                answer = [token + 1 + index for token in prompt[: request.params.max_tokens]]
                for start in range(0, len(answer), 2):
                    await self.hold.wait()
                    if self.error is not None and told == self.break_after:
                        raise self.error
                    told += 1
                    ends = start + 2 >= len(answer)
                    last = ends and index == request.params.n - 1
                    yield self._delta(request, index, answer[start : start + 2], ends, last)
        finally:
            self.open.discard(request.request_id)

    async def cancel(self, request_id: str) -> None:
        raise UnknownRequest(request_id)

    async def progress(self, request_id: str | None) -> list[Progress]:
        told = Progress(
            request_id=request_id or "",
            total_tokens=10,
            done_tokens=4,
            cached_tokens=2,
            elapsed_s=1.0,
            tokens_per_s=2.0,
            left_s=3.0,
        )
        return [told]

    async def status(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.told

    def _prompt(self, request: Request) -> list[int]:
        if request.token_ids is not None:
            return [int(token) for token in request.token_ids]
        if request.messages is not None:
            return [ord(c) for message in request.messages for c in str(message["content"])]
        return [ord(character) for character in request.text or ""]

    def _delta(
        self, request: Request, index: int, tokens: list[int], ends: bool, last: bool
    ) -> RequestDelta:
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = tuple(
                {
                    token: Logprob(logprob=-1.5, rank=2, decoded_token=_spell(token)),
                    token + 1: Logprob(logprob=-0.5, rank=1, decoded_token=_spell(token + 1)),
                }
                for token in tokens
            )
        return RequestDelta(
            request_id=request.request_id,
            index=index,
            text="".join(map(_spell, tokens)),
            token_ids=tuple(tokens),
            finish_reason="length" if ends else None,
            logprobs=logprobs,
            prompt_tokens=len(self._prompt(request)),
            num_cached_tokens=1,
            metrics=RequestMetrics(queue_s=0.1, ttft_s=0.2, total_s=0.3) if last else None,
        )


def _spell(token: int) -> str:
    return chr(token) if token < 0xD800 else "?"
