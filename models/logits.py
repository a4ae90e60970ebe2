"""What changes the logits before a token is chosen; see `models.draw` for the order.

All of it follows from the tokens of the sequence, so a sequence that was
interrupted goes on as if it never had been: build its `History` again.

V = vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """See `models.sampling.SamplingParams`; words are token ids here."""

    bad_words: tuple[tuple[int, ...], ...] = ()  # each: the last id is barred after those before
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = ()  # barred until there are min_tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, number to add
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens came before."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


class History:
    """The tokens of one sequence, counted."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """Count the prompt and what there is of the answer."""
        self.answer_ids: list[int] = []
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)  # in the answer
        self.seen_V[torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        for token_id in answer_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Take the answer's next token."""
        self.answer_ids.append(token_id)
        self.seen_V[token_id] = True
        self.counts_V[token_id] += 1.0


def apply_rules(logits_V: Tensor, rules: LogitRules, history: History) -> Tensor:
    """Return changed logits, float64; ``logits_V`` stays as it is."""
    logits_V = logits_V.to(torch.float64, copy=True)
    barred = [word[-1] for word in rules.bad_words if _is_next(word, history.answer_ids)]
    if len(history.answer_ids) < rules.min_tokens:
        barred += rules.ending_ids
    if barred:
        logits_V[barred] = -torch.inf
    if rules.logit_bias:
        ids, numbers = zip(*rules.logit_bias, strict=True)
        logits_V[list(ids)] += torch.tensor(numbers, dtype=torch.float64, device=logits_V.device)
    if rules.has_penalties:
        _penalise_(logits_V, rules, history)
    return logits_V


def _is_next(word: tuple[int, ...], answer_ids: list[int]) -> bool:
    """Whether the answer ends in all of a word but its last token."""
    begin = len(answer_ids) - (len(word) - 1)
    return begin >= 0 and tuple(answer_ids[begin:]) == word[:-1]


def _penalise_(logits_V: Tensor, rules: LogitRules, history: History) -> None:
    factor = rules.repetition_penalty
    repeated_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
    logits_V.copy_(torch.where(history.seen_V, repeated_V, logits_V))
    logits_V -= rules.frequency_penalty * history.counts_V
    logits_V -= rules.presence_penalty * (history.counts_V > 0)
