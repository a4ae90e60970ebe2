"""How the sampling rank chooses tokens, and what it keeps of each sequence to do so."""

import torch
from torch import Tensor

from actors.messages import Plan, PrefillPlan
from models.draw import sample
from models.logits import History, apply_rules
from models.logprobs import TokenLogprobs, join_logprobs, token_logprobs


class Sampler:
    """Chooses the tokens of a plan, one after another.

    A sequence whose logits are changed by what came before has a `History`. It is
    made from the tokens of its prefill, so a sequence that begins again has it too.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Keep nothing yet."""
        self._vocab_size = vocab_size
        self._device = device
        self._histories: dict[int, History] = {}
        self._logprobs: list[TokenLogprobs] = []

    def begin(self, plan: PrefillPlan) -> None:
        """Take the tokens of a sequence that begins, or begins again."""
        self._histories.pop(plan.sequence_id, None)
        if plan.draw.rules is not None:
            ids = plan.token_ids.tolist()
            prompt_tokens = len(ids) - plan.answer_tokens
            self._histories[plan.sequence_id] = History(
                ids[:prompt_tokens], ids[prompt_tokens:], self._vocab_size, self._device
            )

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; one that is not known is no error."""
        self._histories.pop(sequence_id, None)

    @torch.inference_mode()
    def choose(self, logits_V: Tensor, plan: Plan, index: int) -> tuple[int, bool]:
        """Return the token at ``index`` of the answer, and whether it ends the answer."""
        draw, raw_V = plan.draw, logits_V
        history = self._histories.get(plan.sequence_id)
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
            self._logprobs.append(token_logprobs(raw_V.unsqueeze(0), ids_1, draw.logprobs))
        return token_id, token_id in draw.stop_ids

    def take_logprobs(self) -> TokenLogprobs | None:
        """Return those of the tokens chosen since the last call, where they were asked for."""
        if not self._logprobs:
            return None
        taken, self._logprobs = join_logprobs(self._logprobs), []
        return taken
