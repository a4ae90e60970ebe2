"""Merge attention computed over disjoint sets of keys.

A partial result always travels as a pair ``(out, lse)``: both are float32, the
output is normalised over its own keys, and the LSE is natural-log. Appendix B,
equation 4 of arXiv 2411.01783.
"""

import torch
from torch import Tensor


def merge_into(out_THD: Tensor, lse_TH: Tensor, part_THD: Tensor, part_lse_TH: Tensor) -> None:
    """Merge a partial over further keys into ``(out_THD, lse_TH)``, in place.

    An empty key set is ``out = 0, lse = -inf`` on either side.

    Raises:
        TypeError: A side is not float32. Cast once, after the last merge: the
            rounding of N bf16 merges adds up.
    """
    _require_float32(out=out_THD, lse=lse_TH, part=part_THD, part_lse=part_lse_TH)
    merged_TH = torch.logaddexp(lse_TH, part_lse_TH)
    base_TH = _finite_base(merged_TH)
    out_THD.mul_((lse_TH - base_TH).exp_().unsqueeze(-1))
    out_THD.addcmul_(part_THD, (part_lse_TH - base_TH).exp_().unsqueeze(-1))
    lse_TH.copy_(merged_TH)


def merge_stacked(out_NTHD: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(out_THD, lse_TH)`` over the N disjoint key sets of a stack of partials.

    Raises:
        TypeError: A side is not float32.
    """
    _require_float32(out=out_NTHD, lse=lse_NTH)
    lse_TH = lse_NTH.logsumexp(0)
    weight_NTH = (lse_NTH - _finite_base(lse_TH)).exp_()
    return (out_NTHD * weight_NTH.unsqueeze(-1)).sum(0), lse_TH


def _finite_base(lse_TH: Tensor) -> Tensor:
    """What to subtract before `exp`: -inf minus -inf is nan, and no key must weigh 0."""
    return lse_TH.masked_fill(lse_TH.isneginf(), 0.0)


def _require_float32(**sides: Tensor) -> None:
    for name, side in sides.items():
        if side.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {side.dtype}")
