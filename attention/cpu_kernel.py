"""Torch's flash kernel on CPU, with the query heads of one KV head packed into rows.

A KV head's group of query heads becomes the rows of one matrix, so that its keys
are read once for the whole group and the kernel's blocks of queries are full: at
few queries that is several times faster than heads as they are, at many never
slower. Only a causal mask needs the heads as they are.

Letters as in `attention`, and R = rows of one KV head: T times the heads of its group.
"""

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_cpu(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend on CPU; see `attention.kernel.attend`, which checks the call."""
    if causal:
        q_1HTD, k_1KSD, v_1KSD = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SKD, v_SKD))
        out_1HTD, lse_1HT = _flash(q_1HTD, k_1KSD, v_1KSD, 0.0, True, scale=scale)
        return out_1HTD[0].transpose(0, 1).float(), lse_1HT[0].transpose(0, 1).float()
    q_KRD = pack_groups(q_THD, k_SKD.shape[1])
    out_1KRD, lse_1KR = attend_packed(
        q_KRD, k_SKD.transpose(0, 1).unsqueeze(0), v_SKD.transpose(0, 1).unsqueeze(0), scale
    )
    return unpack_groups(out_1KRD[0], lse_1KR[0], q_THD.shape[0])


def pack_groups(q_THD: Tensor, num_kv_heads: int) -> Tensor:
    """Return the queries as one matrix for each KV head, ``q_KRD``."""
    return q_THD.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def unpack_groups(out_KRD: Tensor, lse_KR: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Return ``(out_THD, lse_TH)`` of what came of packed queries."""
    out_THD = out_KRD.unflatten(1, (num_queries, -1)).transpose(0, 1).flatten(1, 2)
    return out_THD, lse_KR.unflatten(1, (num_queries, -1)).transpose(0, 1).flatten(1, 2)


def attend_packed(
    q_KRD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return ``(out_BKRD, lse_BKR)`` in float32 over each of B sets of keys.

    The queries are the same for all sets, or those of each, ``q_BKRD``.
    """
    out_BKRD, lse_BKR = _flash(
        q_KRD.expand(k_BKSD.shape[0], -1, -1, -1), k_BKSD, v_BKSD, scale=scale
    )
    return out_BKRD.float(), lse_BKR.float()
