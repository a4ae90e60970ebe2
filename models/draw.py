"""How the next token is chosen from the logits; the order of work is that of vLLM v1.

1. Log-probabilities that a caller asked for are taken from the raw logits
   (`models.logprobs`): no parameter below changes them.
2. Bad words, min_tokens, logit_bias and penalties change the logits, in this
   order (`models.logits`). Greedy sampling takes the best of what results.
3. The logits are divided by the temperature; then min_p, top_k and top_p leave
   tokens out, in this order, each over what the one before left in.
4. One token is drawn.

The noise of a draw depends on the seed and the token's index in the answer
alone: not on the device, the ring, the filters, or what else runs.

V = vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which tokens may be drawn; see `models.sampling.SamplingParams`."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def sample(
    logits_V: Tensor, *, temperature: float, seed: int, index: int, filters: Filters | None = None
) -> int:
    """Return the next token's id: greedy at temperature 0, else drawn from the softmax."""
    if temperature == 0.0:
        return int(logits_V.argmax())
    # The best logit becomes 0, so that a tiny temperature tends to greedy instead of overflowing.
    scaled_V = (logits_V.double() - logits_V.max()) / temperature
    if filters is not None:
        scaled_V = apply_filters(scaled_V, filters)
    # argmax of p / e with e ~ Exp(1) draws from p: one pass, no sum of p needed.
    return int(
        (scaled_V - draw_noise(len(logits_V), seed, index).log().to(scaled_V.device)).argmax()
    )


def apply_filters(scaled_V: Tensor, filters: Filters) -> Tensor:
    """Return the logits with -inf for what may not be drawn; the best of ``scaled_V`` is 0.

    Tokens that are as likely as the k-th are all kept, as in vLLM; the most likely
    token always is.
    """
    if filters.min_p > 0.0:
        scaled_V = scaled_V.masked_fill(scaled_V < math.log(filters.min_p), -torch.inf)
    if 0 < filters.top_k < len(scaled_V):
        kth = scaled_V.topk(filters.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < kth, -torch.inf)
    if filters.top_p < 1.0:
        ascending_V, ids_V = scaled_V.sort(stable=True)
        tail_V = ascending_V.softmax(-1).cumsum(-1) <= 1.0 - filters.top_p
        tail_V[-1] = False
        scaled_V = scaled_V.masked_fill(
            torch.zeros_like(tail_V).scatter(0, ids_V, tail_V), -torch.inf
        )
    return scaled_V


def draw_noise(size: int, seed: int, index: int) -> Tensor:
    """Return the ``size`` exponential random numbers of one draw, float64 on CPU."""
    generator = torch.Generator().manual_seed(_mix(f"{seed}:{index}"))
    return torch.empty(size, dtype=torch.float64).exponential_(generator=generator)


def answer_seed(seed: int, answer: int) -> int:
    """Return the seed of one of a prompt's answers; the first has the request's own."""
    return seed if answer == 0 else _mix(f"answer {answer} of {seed}")


def _mix(words: str) -> int:
    """A generator's seed; neighbouring numbers in the words have nothing in common."""
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
