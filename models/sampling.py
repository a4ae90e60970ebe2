"""How the next token is chosen from the logits."""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import SamplingError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a caller asks of the answer; names and meanings are vLLM's."""

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy
    seed: int | None = None  # None: drawn for each request
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        if self.max_tokens < 1:
            raise SamplingError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature <= sys.float_info.max:
            raise SamplingError(
                f"temperature must be a number >= 0 (0 is greedy), got {self.temperature}"
            )


def _check_type(name: str, value: object) -> None:
    """Refuse what a JSON body or a typing slip may bring: true for 1, '0.5' for 0.5."""
    wanted, kinds = {
        "max_tokens": ("an integer", (int,)),
        "temperature": ("a number", (int, float)),
        "seed": ("an integer or None", (int, type(None))),
        "ignore_eos": ("true or false", (bool,)),
    }[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise SamplingError(f"{name} must be {wanted}, got {value!r}")


def sample(logits_V: Tensor, *, temperature: float, seed: int, index: int) -> int:
    """Return the next token's id: greedy at temperature 0, else drawn from the softmax.

    The random numbers depend on ``seed`` and the token's ``index`` in the answer
    alone: not on the device, the ring, or what else runs.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    generator = torch.Generator().manual_seed(_mix(seed, index))
    # argmax of p / e with e ~ Exp(1) draws from p: one pass, no sum of p needed. The best logit
    # becomes 0, so that a tiny temperature tends to greedy instead of overflowing.
    noise_V = torch.empty(logits_V.shape, dtype=torch.float64).exponential_(generator=generator)
    scaled_V = (logits_V.double() - logits_V.max()) / temperature
    return int((scaled_V - noise_V.log().to(scaled_V.device)).argmax())


def _mix(seed: int, index: int) -> int:
    """A generator seed for one draw; neighbouring seeds and indices share nothing."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
