"""One answer while it is made: its tokens, its text, its log-probabilities, its steps."""

import time
from collections.abc import Sequence

from actors.detokenizer import AnswerText
from actors.generation import Generation
from actors.logprobs import Spell, read_logprobs, read_prompt_logprobs
from actors.messages import CompletionOutput, Logprobs, StepRecord, StepResult
from models.logprobs import TokenLogprobs, join_logprobs


class Answer:
    """What the ranks' results add up to."""

    def __init__(self, generation: Generation, text: AnswerText | None) -> None:
        """Begin; ``text`` is the generation's own, None without a tokenizer."""
        self.generation = generation
        self.records: list[StepRecord] = []
        self.first_token_s = 0.0  # by time.perf_counter
        self._text = text
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []  # of each rank

    def take(self, record: StepRecord, results: Sequence[StepResult], sampling_rank: int) -> None:
        """Take what all ranks made of the generation's plan."""
        sampled = results[sampling_rank]
        self.generation.advance(sampled.token_ids)
        self.records.append(record)
        self.first_token_s = self.first_token_s or time.perf_counter()
        if sampled.logprobs is not None:
            self._logprobs.append(sampled.logprobs)
        of_ranks = [result.prompt_logprobs for result in results]
        self._prompt_logprobs += [rows for rows in of_ranks if rows is not None]

    def completion(self, index: int, spell: Spell) -> CompletionOutput:
        """Return the answer, which is complete."""
        generation = self.generation
        assert generation.finish_reason is not None
        # Those of tokens beyond a stop text are left out, as the tokens are.
        logprobs = (
            tuple(read_logprobs(join_logprobs(self._logprobs), spell)[: len(generation.token_ids)])
            if self._logprobs
            else None
        )
        return CompletionOutput(
            index=index,
            text="" if self._text is None else self._text.text,
            token_ids=tuple(generation.token_ids),
            finish_reason=generation.finish_reason,
            stop_reason=generation.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=(
                None
                if logprobs is None
                else sum(
                    place[token_id].logprob
                    for place, token_id in zip(logprobs, generation.token_ids, strict=True)
                )
            ),
        )

    def prompt_logprobs(
        self, prompt_tokens: int, spell: Spell
    ) -> tuple[Logprobs | None, ...] | None:
        """Return those of the prompt's tokens, where they were asked for."""
        if not self._prompt_logprobs:
            return None
        return read_prompt_logprobs(self._prompt_logprobs, prompt_tokens, spell)
