"""What quantised KV costs a model: its predictions over a text, beside those of exact KV.

Logits matter up to a constant, so they are compared as log-probabilities: at every position
those of the likeliest tokens, in which answers differ.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.kv.keys import exactness_class
from actors.messages import Logprobs
from cluster.llm import LLM
from cluster.prompt import Prompt
from models.errors import PromptError
from models.sampling import SamplingParams

TOP = 20  # tokens compared at every position


@dataclass(frozen=True)
class Loss:
    """How far predictions with one exactness class are from the lossless ones."""

    exactness: str
    positions: int
    max_logit_error: float
    rms_logit_error: float
    top1_agreement: float  # share of positions that have the same likeliest token


def measure_loss(
    model: str, options: Mapping[str, Any], prompt: Prompt, kv_cache_dtype: str
) -> Loss:
    """Run a prompt on one rank with exact KV and with quantised KV; ``options`` are LLM's."""
    exact = _predictions(model, options, prompt, "auto")
    lossy = _predictions(model, options, prompt, kv_cache_dtype)
    return compare_predictions(exactness_class(device=kv_cache_dtype), exact, lossy)


def compare_predictions(
    exactness: str, exact: Sequence[Logprobs | None], lossy: Sequence[Logprobs | None]
) -> Loss:
    """Compare the log-probabilities at each position of a prompt; the first has none."""
    errors: list[float] = []
    agreed = positions = 0
    for one, other in zip(exact, lossy, strict=True):
        if one is None or other is None:
            continue
        positions += 1
        agreed += _likeliest(one) == _likeliest(other)
        errors += _errors(one, other)
    return Loss(
        exactness=exactness,
        positions=positions,
        max_logit_error=max(errors),
        rms_logit_error=math.sqrt(sum(error * error for error in errors) / len(errors)),
        top1_agreement=agreed / positions,
    )


def text_prompt(path: Path) -> Prompt:
    """Return the prompt of a text file.

    Raises:
        PromptError: It cannot be read.
    """
    try:
        return {"prompt": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the text {path}: {error}") from None


def describe(loss: Loss) -> str:
    """Return one line for people."""
    return (
        f"{loss.exactness}: over {loss.positions} positions logits are off by"
        f" {loss.rms_logit_error:.2g} (RMS), {loss.max_logit_error:.2g} at most;"
        f" {loss.top1_agreement:.2%} have the same likeliest token"
    )


def as_json(loss: Loss | None) -> dict[str, Any] | None:
    """Return the same for programs."""
    return None if loss is None else dataclasses.asdict(loss)


def _predictions(
    model: str, options: Mapping[str, Any], prompt: Prompt, kv_cache_dtype: str
) -> Sequence[Logprobs | None]:
    own = [f"kv_cache_dtype={kv_cache_dtype}", f"max_logprobs={TOP}", "context_parallel_size=1"]
    given = {**options, "overrides": [*options["overrides"], *own]}
    with LLM(model, **given) as llm:
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            room = llm.info.max_model_len - 1
            prompt = {"prompt_token_ids": list(prompt["prompt_token_ids"])[:room]}
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
        predictions = llm.generate(prompt, params)[0].prompt_logprobs
    if predictions is None or len(predictions) < 2:
        raise PromptError("the loss of quantised KV needs a text of at least 2 tokens")
    return predictions


def _likeliest(listed: Logprobs) -> int:
    return min(listed, key=lambda token_id: listed[token_id].rank)


def _errors(one: Logprobs, other: Logprobs) -> list[float]:
    """Return the differences of what exact KV lists; of what the other does not, a lower bound."""
    # The prompt's own token is listed however unlikely it is; it bounds nothing.
    least = min(entry.logprob for entry in other.values() if entry.rank <= TOP)
    errors = []
    for token_id, entry in one.items():
        if token_id in other:
            errors.append(abs(entry.logprob - other[token_id].logprob))
        else:
            errors.append(max(0.0, entry.logprob - least))
    return errors
