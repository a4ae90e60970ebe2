"""One local block of attention: `attend(q, k, v) -> (out, lse)`, by the kernel of the device.

CPU: torch's flash kernel (`attention.cpu_kernel`). CUDA: flash attention in 16 bit,
the memory-efficient kernel in float32 (`attention.cuda_kernels`). Every kernel's own
layout and result is converted in those two files and nowhere else.
"""

import torch
from torch import Tensor

from attention.cpu_kernel import attend_cpu
from attention.cuda_kernels import attend_cuda


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
    kernel = attend_cpu if q_THD.device.type == "cpu" else attend_cuda
    return kernel(q_THD, k_SKD, v_SKD, causal, scale)


def empty_partial(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial over no keys: ``out = 0, lse = -inf``."""
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    return out_THD, out_THD.new_full(q_THD.shape[:2], -torch.inf)
