"""Attention by its definition, in float64: what every kernel, merge and ring is compared with."""

from typing import Any

import torch
from torch import Tensor

# Of an output against float64. In 16 bit the kernel rounds its weights and its output; a ring
# rounds once more for each part, and merges in float32.
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def softmax_attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    mask_TS: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out_THD, lse_TH)`` in float64, one query and head at a time.

    Query head h attends to KV head ``h // (H / K)``. ``mask_TS`` is True where a
    query sees a key, None where it sees all. A query that sees no key gives
    ``out = 0, lse = -inf``.
    """
    T, H, D = q_THD.shape
    group = H // k_SKD.shape[1]
    out_THD = torch.zeros(T, H, D, dtype=torch.float64)
    lse_TH = torch.full((T, H), -torch.inf, dtype=torch.float64)
    q_THD, k_SKD, v_SKD = (x.detach().cpu().double() for x in (q_THD, k_SKD, v_SKD))
    for t in range(T):
        seen = slice(None) if mask_TS is None else mask_TS[t].nonzero().flatten()
        for h in range(H):
            keys_SD, values_SD = k_SKD[seen, h // group], v_SKD[seen, h // group]
            if len(keys_SD) == 0:
                continue
            scores_S = keys_SD @ q_THD[t, h] * (D**-0.5 if scale is None else scale)
            peak = scores_S.max()
            weights_S = (scores_S - peak).exp()
            lse_TH[t, h] = peak + weights_S.sum().log()
            out_THD[t, h] = weights_S @ values_SD / weights_S.sum()
    return out_THD, lse_TH


def causal_mask(num_tokens: int) -> Tensor:
    """Return the mask ``[T, T]`` with which token i sees tokens 0..i."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()


def random_qkv(
    num_queries: int,
    num_keys: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return standard normal ``(q_THD, k_SKD, v_SKD)``."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)
    q, k, v = (torch.randn(*shape, head_dim, generator=rng).to(dtype) for shape in shapes)
    return q, k, v
