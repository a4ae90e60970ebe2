"""transformers on the same weights: what every answer of ours is compared with."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TIE = 1e-5  # a smaller float64 gap between the best two logits is a tie


@lru_cache(maxsize=4)
def oracle_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model of a checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


@torch.inference_mode()
def oracle_logits(
    checkpoint: Path, ids: Sequence[int], last: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the logits ``[last, V]`` that follow each of the last tokens of ``ids``."""
    model = oracle_model(checkpoint, dtype)
    logits: Tensor = model(torch.tensor([ids]), logits_to_keep=last, use_cache=False).logits[0]
    return logits


def assert_greedy(checkpoint: Path, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Assert that every token of a greedy answer is the oracle's own, given those before it.

    As long as all tokens before it are the oracle's, its own continuation is what
    it says here; after a tie this compares teacher-forced.
    """
    ids = [*prompt, *answer]
    logits = oracle_logits(checkpoint, ids[:-1], len(answer))
    wrong = (logits.argmax(-1) != torch.tensor(answer)).nonzero().flatten().tolist()
    if not wrong:
        return
    exact = oracle_logits(checkpoint, ids[:-1], len(answer), torch.float64)
    for step in wrong:
        top = exact[step].topk(2)
        gap = float(top.values[0] - exact[step, answer[step]])
        assert gap < TIE, (
            f"token {step} of the answer is {answer[step]}, transformers says"
            f" {top.indices[0]}; their float64 logits differ by {gap:.3g}"
        )
