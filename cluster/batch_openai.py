"""OpenAI's form of a batch, as vLLM's run-batch takes it: its lines, and their answers' bodies.

{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "..."}}
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from actors.messages import PromptReport, RequestOutput
from cluster.http.answering import Head, Kind
from cluster.http.answers import Whole
from cluster.http.bodies import CachedTokens, Usage
from cluster.http.chat import Chats, chat_params
from cluster.http.completions import Completions, completion_params
from cluster.http.errors import validation_error
from cluster.http.protocol import ChatRequest, CompletionRequest
from models.errors import PromptError
from models.sampling import SamplingParams

FIELDS = {"custom_id", "method", "url", "body"}
POST_ONLY = ("stream", "echo", "include_metrics")
KINDS: dict[Any, Any] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


@dataclass(frozen=True)
class OpenAILine:
    """The body of one line."""

    asked: CompletionRequest | ChatRequest

    def prompt(self) -> dict[str, Any]:
        """Return it as `LLM` takes it.

        Raises:
            PromptError: It has more than one prompt.
        """
        options = {
            name: getattr(self.asked, name)
            for name in ("cache_salt", "priority", "deadline_s")
            if getattr(self.asked, name)
        }
        if isinstance(self.asked, ChatRequest):
            messages = [message.for_template() for message in self.asked.messages]
            return {"messages": messages, **options}
        prompt: Any = self.asked.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise PromptError(f"prompt has {len(prompt)} prompts: give each a line of its own")
            (prompt,) = prompt
        return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **options}

    def params(self, max_tokens: int) -> SamplingParams:
        """Return what is asked of the answer; ``max_tokens`` is for a chat that does not say."""
        if isinstance(self.asked, ChatRequest):
            return chat_params(self.asked, max_tokens)
        return completion_params(self.asked)

    async def body(self, output: RequestOutput, model: str) -> dict[str, Any]:
        """Return the answer as POST would."""
        head = Head(id=output.request_id, created=int(time.time()), model=self.asked.model or model)
        wholes = [
            Whole(
                text=each.text,
                token_ids=list(each.token_ids),
                logprobs=None if each.logprobs is None else list(each.logprobs),
                finish_reason=each.finish_reason,
                stop_reason=each.stop_reason,
                prompt=PromptReport(
                    token_ids=np.asarray(output.prompt_token_ids, np.int32),
                    logprobs=output.prompt_logprobs,
                ),
            )
            for each in output.outputs
        ]
        prompt_tokens = len(output.prompt_token_ids)
        completion_tokens = sum(len(whole.token_ids) for whole in wholes)
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=output.num_cached_tokens),
        )
        asked = self.asked
        kind: Kind = (
            Chats(head, asked) if isinstance(asked, ChatRequest) else Completions(head, asked)
        )
        return (await kind.whole(wholes, usage, None)).model_dump()


def read_openai(values: Mapping[str, Any]) -> OpenAILine:
    """Read a line of OpenAI's form.

    Raises:
        PromptError: It is not, or its body is not.
    """
    unknown = values.keys() - FIELDS
    if unknown:
        raise PromptError(f"unknown field {min(unknown)[:100]!r} beside url and body")
    method, url = values.get("method", "POST"), str(values.get("url"))
    if method != "POST" or url not in KINDS:
        wanted = " or ".join(KINDS)
        raise PromptError(f"it must POST to {wanted}, got {f'{method} to {url}'[:100]!r}")
    try:
        asked = KINDS[url].model_validate(values.get("body"))
    except ValidationError as error:
        raise PromptError(f"body: {validation_error(error).message}") from None
    for name in POST_ONLY:
        if getattr(asked, name, False):
            raise PromptError(f"body: {name} must be left out: a batch has whole answers alone")
    return OpenAILine(asked)
