"""One request's way from prompt to answer: which plan comes next. No Ray, no tensors, no clock."""

from typing import Literal

from actors.detokenizer import AnswerText
from actors.draws import BadWords, make_draw
from actors.messages import DecodePlan, Plan, PrefillPlan, TokenIds
from attention import Zigzag
from models.sampling import SamplingParams


class Generation:
    """Tokens so far, where their KV lies, and the next plan.

    Call `next_plan`, have all ranks execute it, and hand the sampled tokens to
    `advance`, until `next_plan` returns None.
    """

    def __init__(
        self,
        *,
        sequence_id: int,
        prompt: TokenIds,
        params: SamplingParams,
        seed: int,
        eos_ids: tuple[int, ...],
        num_ranks: int,
        max_model_len: int,
        decode_block_tokens: int,
        burst_steps: int,
        bad_words: BadWords = (),
        text: AnswerText | None = None,
        wants_prompt_logprobs: bool = True,
    ) -> None:
        """Take a prompt that fits; the answer is cut at ``max_model_len`` tokens in all.

        ``text`` takes the answer's tokens, and ends it at a stop text.
        """
        self.sequence_id = sequence_id
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.stop_reason: int | str | None = None
        self._prompt = prompt
        self._max_tokens = min(params.max_tokens, max_model_len - len(prompt))
        self._draw = make_draw(params, seed, eos_ids, bad_words)
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._prompt_logprobs = params.prompt_logprobs if wants_prompt_logprobs else None
        self._text = text
        self._text_has_stop_token = params.include_stop_str_in_output
        self._num_ranks = num_ranks
        self._decode_block_tokens = decode_block_tokens
        self._burst_steps = burst_steps
        self._rows = [0] * num_ranks  # of this sequence, on each rank
        self._owner = 0

    def next_plan(self, number: int, release: tuple[int, ...] = ()) -> Plan | None:
        """Return the plan to execute next, or None when the answer is complete."""
        if self.finish_reason is not None:
            return None
        if not self.token_ids:
            zigzag = Zigzag(num_tokens=len(self._prompt), num_ranks=self._num_ranks)
            self._rows = [zigzag.count(rank) for rank in range(self._num_ranks)]
            return PrefillPlan(
                number=number,
                sequence_id=self.sequence_id,
                token_ids=self._prompt,
                algorithm="pass_kv",
                draw=self._draw,
                sampling_rank=zigzag.last_token_rank,
                prompt_logprobs=self._prompt_logprobs,
                release=release,
            )
        steps = min(self._burst_steps, self._max_tokens - len(self.token_ids))
        return DecodePlan(
            number=number,
            sequence_id=self.sequence_id,
            token_id=self.token_ids[-1],
            position=self.cached_tokens,
            index=len(self.token_ids),
            owners=tuple(self._take_owner(step) for step in range(steps)),
            draw=self._draw,
            sampling_rank=0,
            release=release,
        )

    def advance(self, token_ids: tuple[int, ...]) -> None:
        """Take the tokens that a plan sampled; those beyond a stop text are dropped."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            self._check_end(token_id)
            if self.finish_reason is not None:
                return

    @property
    def cached_tokens(self) -> int:
        """Tokens whose KV the ranks hold: all but the last one sampled."""
        return len(self._prompt) + len(self.token_ids) - 1 if self.token_ids else 0

    def _check_end(self, token_id: int) -> None:
        is_stop = token_id in self._draw.stop_ids
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

    def _take_owner(self, step: int) -> int:
        """The rank that keeps the KV of a burst's step.

        Decode blocks go round the ranks, each to the one with the fewest rows, so
        that the shares stay even over any number of turns.
        """
        decoded = len(self.token_ids) - 1 + step
        if decoded % self._decode_block_tokens == 0:
            self._owner = self._rows.index(min(self._rows))
        self._rows[self._owner] += 1
        return self._owner
