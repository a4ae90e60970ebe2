"""How the sampling rank chooses tokens, and what it keeps of each sequence to do so."""

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.messages import Draw, PrefillChunk
from models.draw import sample
from models.logits import History, apply_rules
from models.logprobs import TokenLogprobs, join_logprobs, token_logprobs


class Sampler:
    """Chooses the next tokens of sequences.

    A sequence whose logits are changed by what came before has a `History`. It is
    made from the tokens of its prefill, so a sequence that begins again has it too.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Keep nothing yet."""
        self._vocab_size = vocab_size
        self._device = device
        self._histories: dict[int, History] = {}
        self._logprobs: dict[int, list[TokenLogprobs]] = {}

    def begin(self, chunk: PrefillChunk) -> None:
        """Take the tokens of a sequence that begins, or begins again."""
        self.forget(chunk.sequence_id)
        if chunk.context_ids is not None:
            ids = chunk.context_ids.tolist()
            prompt_tokens = len(ids) - chunk.answer_tokens
            self._histories[chunk.sequence_id] = History(
                ids[:prompt_tokens], ids[prompt_tokens:], self._vocab_size, self._device
            )

    def forget(self, sequence_id: int) -> None:
        """Forget a sequence; one that is not known is no error."""
        self._histories.pop(sequence_id, None)

    @torch.inference_mode()
    def choose(
        self, logits_V: Tensor, sequence_id: int, draw: Draw, index: int
    ) -> tuple[int, bool]:
        """Return the token at ``index`` of an answer, and whether it ends the answer."""
        raw_V = logits_V
        history = self._histories.get(sequence_id)
        if draw.rules is not None:
            assert history is not None, "the prefill of this sequence had no rules"
            logits_V = apply_rules(logits_V, draw.rules, history)
        token_id = sample(
            logits_V,
            temperature=draw.temperature,
            seed=draw.seed,
            index=index,
            filters=draw.filters,
        )
        if history is not None:
            history.append(token_id)
        if draw.logprobs is not None:
            ids_1 = torch.tensor([token_id], device=raw_V.device)
            found = token_logprobs(raw_V.unsqueeze(0), ids_1, draw.logprobs)
            self._logprobs.setdefault(sequence_id, []).append(found)
        return token_id, token_id in draw.stop_ids

    @torch.inference_mode()
    def choose_each(
        self, logits_RV: Tensor, asked: Sequence[tuple[int, Draw, int]]
    ) -> list[tuple[int, bool]]:
        """Return `choose` of every row; what is asked is ``(sequence_id, draw, index)``."""
        greedy_ids = [0] * len(asked)
        if any(_is_plain_greedy(draw) for _, draw, _ in asked):
            greedy_ids = logits_RV.argmax(-1).tolist()
        return [
            (token_id, token_id in draw.stop_ids)
            if _is_plain_greedy(draw) and sequence_id not in self._histories
            else self.choose(logits_V, sequence_id, draw, index)
            for logits_V, token_id, (sequence_id, draw, index) in zip(
                logits_RV, greedy_ids, asked, strict=True
            )
        ]

    def take_logprobs(self, sequence_id: int) -> TokenLogprobs | None:
        """Return those of the tokens chosen since the last call, where they were asked for."""
        taken = self._logprobs.pop(sequence_id, None)
        return None if taken is None else join_logprobs(taken)


def _is_plain_greedy(draw: Draw) -> bool:
    return draw.temperature == 0.0 and draw.rules is None and draw.logprobs is None
