"""A cluster that answers with the prompt's own tokens, for tests of servers in front of one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.counts import Counts
from actors.errors import UnknownRequest
from actors.messages import (
    Logprob,
    Logprobs,
    Progress,
    PromptReport,
    Request,
    RequestDelta,
    RequestMetrics,
)
from actors.records import Restored, StepRecord
from actors.texts import Text, Tokens
from cluster.backend import ModelFacts
from models.errors import PromptError


def _counts() -> dict[str, Any]:
    """What a real cluster would tell of one step, one answer and one restore."""
    counts = Counts()
    counts.add_step(
        StepRecord(
            number=1,
            phase="prefill",
            sequence_ids=(1,),
            prefill_tokens=600,
            decode_tokens=0,
            cached_tokens=0,
            algorithm="pass_kv",
            num_ranks=2,
            predicted_s=None,
            prices_s={},
            plan_s=0.001,
            wall_s=0.3,
            ranks_wall_s=(0.2, 0.3),
            ranks_parts_s=({"wait": 0.1, "gemm": 0.1}, {"exchange": 0.2}),
        )
    )
    back = Restored(
        tokens=512,
        tokens_by_tier={"host": 256, "disk": 256},
        find_s=0.0,
        stage_s=0.0,
        copy_s=0.0,
        recomputed_tokens=64,
        link_bytes=8192,
    )
    counts.add_restored(back)
    counts.add_decision("split")
    counts.add_answer(1000, 600, [back])
    return counts.told()


STATUS: dict[str, Any] = {
    "failure": None,
    "running": 3,
    "waiting": 2,
    "pages": [{"total": 8, "free": 2, "running": 4}, {"total": 8, "free": 8, "running": 0}],
    "preemptions": 1,
    "steps": 7,
    "restore": {"restores": 1, "tokens": 512, "recomputed_tokens": 64},
    "counts": _counts(),
    "heartbeat_ages_s": [0.5, 1.5],
    "kv_store": {
        "10.0.0.7": {
            "host": {"used_bytes": 10, "capacity_bytes": 100, "hits": 5, "misses": 1, "dropped": 2},
            "disk": {"bytes": 7, "capacity_bytes": 70, "hits": 3, "bad": 1, "damaged": 0},
            "remote": {"staged": 4, "missing": 1, "damaged": 0},
        },
        "10.0.0.8": None,
    },
}


class FakeBackend:
    """Answers token i of a prompt with token i + 1, two tokens at a time."""

    def __init__(self) -> None:
        self.facts = ModelFacts(max_model_len=1000, has_tokenizer=True)
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.cancelled: set[str] = set()
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
                    stops = request.request_id in self.cancelled
                    ends = stops or start + 2 >= len(answer)
                    last = ends and index == request.params.n - 1
                    delta = self._delta(request, index, answer[start : start + 2], ends, last)
                    if request.reports and told == 1:
                        delta = replace(delta, prompt=self._report(request))
                    yield replace(delta, finish_reason="abort") if stops else delta
                    if stops:
                        break
        finally:
            self.open.discard(request.request_id)

    async def cancel(self, request_id: str) -> None:
        if request_id not in self.open:
            raise UnknownRequest(request_id)
        self.cancelled.add(request_id)
        self.hold.set()

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

    async def tokenize(self, text: Text) -> Tokens:
        told = text.text
        if text.messages is not None:
            told = "".join(str(message["content"]) for message in text.messages)
        ids = tuple(map(ord, told or ""))
        return Tokens(token_ids=ids, strings=tuple(map(chr, ids)) if text.with_strings else None)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(_spell, token_ids))

    async def close(self) -> None:
        pass

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

    def _report(self, request: Request) -> PromptReport:
        prompt = self._prompt(request)
        logprobs: tuple[Logprobs | None, ...] | None = None
        if request.params.prompt_logprobs is not None:
            logprobs = (None, *map(_place, prompt[1:]))
        return PromptReport(token_ids=np.array(prompt, dtype=np.int32), logprobs=logprobs)

    def _delta(
        self, request: Request, index: int, tokens: list[int], ends: bool, last: bool
    ) -> RequestDelta:
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = tuple(map(_place, tokens))
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


def _place(token: int) -> Logprobs:
    return {
        token: Logprob(logprob=-1.5, rank=2, decoded_token=_spell(token)),
        token + 1: Logprob(logprob=-0.5, rank=1, decoded_token=_spell(token + 1)),
    }


def _spell(token: int) -> str:
    return chr(token) if 0 <= token < 0xD800 else "?"
