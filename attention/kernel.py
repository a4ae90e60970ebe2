"""One local block of attention: `attend(q, k, v) -> (out, lse)`, by the kernel of the device.

Every kernel's own layout and result is converted here and nowhere else.
CPU: torch's flash kernel. CUDA: flash attention in 16 bit, the
memory-efficient kernel in float32.
"""

import torch
from torch import Tensor


def attend(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(out_THD, lse_TH)`` in float32 of attention over the given keys.

    Query heads are grouped: head h attends to KV head ``h // (H / K)``. With
    ``causal``, query i sees keys 0..i and there are as many keys as queries. The
    last dimension of each input is contiguous; others may be strided. ``scale``
    defaults to ``D ** -0.5``.

    Raises:
        ValueError: A causal call whose queries and keys differ in number. The
            kernels disagree on where such a mask begins.
    """
    if causal and q_THD.shape[0] != k_SKD.shape[0]:
        raise ValueError(f"causal attention of {q_THD.shape[0]} queries to {k_SKD.shape[0]} keys")
    # An empty query or key set ends the process inside the CPU kernel.
    if q_THD.shape[0] == 0 or k_SKD.shape[0] == 0:
        return empty_partial(q_THD)
    kernel = _attend_cpu if q_THD.device.type == "cpu" else _attend_cuda
    return kernel(q_THD, k_SKD, v_SKD, causal, scale)


def empty_partial(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial over no keys: ``out = 0, lse = -inf``."""
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    return out_THD, out_THD.new_full(q_THD.shape[:2], -torch.inf)


def _attend_cpu(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    q_1HTD, k_1KSD, v_1KSD = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SKD, v_SKD))
    out_1HTD, lse_1HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_1HTD, k_1KSD, v_1KSD, 0.0, causal, scale=scale
    )
    return out_1HTD[0].transpose(0, 1).float(), lse_1HT[0].transpose(0, 1).float()


def _attend_cuda(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    if q_THD.dtype is torch.float32:
        return _attend_cuda_float32(q_THD, k_SKD, v_SKD, causal, scale)
    out_1THD, lse_1HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THD[None],
        k_SKD[None],
        v_SKD[None],
        None,
        None,
        q_THD.shape[0],
        k_SKD.shape[0],
        0.0,
        causal,
        False,
        scale=scale,
    )
    return out_1THD[0].float(), lse_1HT[0].transpose(0, 1)


def _attend_cuda_float32(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel: it has no grouped heads, and pads the rows of its LSE."""
    group = q_THD.shape[1] // k_SKD.shape[1]
    k_SHD, v_SHD = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    top_left_mask = 1
    out_1THD, lse_1HT, *_ = torch.ops.aten._efficient_attention_forward(
        q_THD[None],
        k_SHD[None],
        v_SHD[None],
        None,
        None,
        None,
        None,
        None,
        0.0,
        top_left_mask if causal else 0,
        True,
        scale=scale,
    )
    return out_1THD[0], lse_1HT[0, :, : q_THD.shape[0]].transpose(0, 1)
