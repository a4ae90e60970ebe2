"""One answer's tokens: what was sampled, and when it ends. No Ray, no tensors, no clock."""

from collections.abc import Sequence

import numpy as np

from actors.detokenizer import AnswerText
from actors.draws import BadWords, make_draw
from actors.kv.messages import StoredPrefix
from actors.messages import FinishReason, TokenIds
from models.errors import PromptError
from models.sampling import SamplingParams


class Generation:
    """A prompt and its answer so far; `actors.scheduler` says what is computed when."""

    def __init__(
        self,
        *,
        sequence_id: int,
        prompt: TokenIds,
        params: SamplingParams,
        seed: int,
        eos_ids: tuple[int, ...],
        max_model_len: int,
        cache_salt: str = "",
        priority: int = 0,
        bad_words: BadWords = (),
        text: AnswerText | None = None,
        wants_prompt_logprobs: bool = True,
        answer_ids: Sequence[int] = (),
    ) -> None:
        """Take a prompt that fits; the answer is cut at ``max_model_len`` tokens in all.

        ``text`` takes the answer's tokens, and ends it at a stop text. The answer goes
        on behind ``answer_ids``, which an earlier generation made: what was preempted
        comes back in the same way.

        Raises:
            PromptError: With ``answer_ids`` the answer is complete.
        """
        self.sequence_id = sequence_id
        self.prompt = prompt
        self.cache_salt = cache_salt
        self.priority = priority
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_cached_tokens = 0  # of the prompt, found on the ranks when it began
        self.restored: list[tuple[StoredPrefix, int]] = []  # what came back, and how many tokens
        self.draw = make_draw(params, seed, eos_ids, bad_words)
        self.prompt_logprobs = params.prompt_logprobs if wants_prompt_logprobs else None
        self._max_tokens = min(params.max_tokens, max_model_len - len(prompt))
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._text = text
        self._text_has_stop_token = params.include_stop_str_in_output
        self._given_tokens = len(answer_ids)
        for count, token_id in enumerate(answer_ids, start=1):
            self.advance((token_id,))
            if self.finish_reason is not None:
                raise PromptError(
                    f"nothing may follow the {self._given_tokens} tokens of answer_ids: the answer"
                    f" ends with the first {count} of them ({self.finish_reason})"
                )

    @property
    def made_tokens(self) -> int:
        """How many tokens were made here."""
        return len(self.token_ids) - self._given_tokens

    @property
    def tokens_to_come(self) -> int:
        """How many more tokens the answer may get."""
        return self._max_tokens - len(self.token_ids)

    def take_restored(self, stored: StoredPrefix, tokens: int) -> None:
        """Note that so many tokens came back from the KV stores."""
        if not self.made_tokens:
            self.num_cached_tokens += max(0, tokens)
        self.restored.append((stored, max(0, tokens)))

    def context(self) -> TokenIds:
        """Return prompt and answer so far."""
        return np.concatenate([self.prompt, np.asarray(self.token_ids, dtype=np.int32)])

    def advance(self, token_ids: tuple[int, ...]) -> None:
        """Take the tokens that a plan sampled; those beyond a stop text are dropped."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            self._check_end(token_id)
            if self.finish_reason is not None:
                return

    def end(self, reason: FinishReason) -> None:
        """End the answer with what it has."""
        self.finish_reason = reason
        if self._text is not None:
            self._text.finish()

    def _check_end(self, token_id: int) -> None:
        is_stop = token_id in self.draw.stop_ids
        found = None
        if self._text is not None and (not is_stop or self._text_has_stop_token):
            found = self._text.push(token_id)
        if is_stop or found is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_tokens:
            self.finish_reason = "length"
        if found is not None:
            self.stop_reason = found
            return
        if is_stop and token_id not in self._eos_ids:
            self.stop_reason = token_id
        if self.finish_reason is not None and self._text is not None:
            self._text.finish()
