"""Rates of the device: matrix products, copies, and attention as the engine calls it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attention import attend
from attention.cuda_kernels import attend_cudnn, attend_flash
from benchmarks.measure import RowWriter, median_s
from benchmarks.rows import Row
from benchmarks.shapes import GB, attention_flops
from benchmarks.sizes import K, Sizes

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of Llama-3-8B
CHECKED_TOKENS = 16 * K  # two kernels' results are compared up to this length
Kernel = Callable[[Tensor, Tensor, Tensor, bool, float | None], tuple[Tensor, Tensor]]


def measure_rates(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """The two ceilings: operations a second of large products, bytes a second of a copy."""
    for dtype in (torch.bfloat16, torch.float32):
        labels = {"what": f"GEMM {sizes.gemm_edge}", "dtype": _name(dtype)}
        rows.measure(labels, partial(_gemm, sizes, device, dtype))
    rows.measure({"what": "copy"}, partial(_copy, sizes, device))


def _gemm(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Row:
    edge = sizes.gemm_edge
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = median_s(lambda: torch.matmul(a, b, out=out), device, 4 * sizes.repeats)
    return {"ms": seconds * 1e3, "tflop_per_s": 2.0 * edge**3 / seconds / 1e12}


def _copy(sizes: Sizes, device: torch.device) -> Row:
    source = torch.randn(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), device, 4 * sizes.repeats)
    # Counted as read and written.
    return {"ms": seconds * 1e3, "gb_per_s": 2.0 * sizes.copy_bytes / seconds / GB}


def measure_attention(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Attention of as many queries as keys; flash is what the engine uses on CUDA."""
    kernels: dict[str, Kernel] = {"flash": attend_flash, "cudnn": attend_cudnn}
    if device.type == "cpu":
        kernels = {"cpu": lambda q, k, v, causal, scale: attend(q, k, v, causal=causal)}
    for num_tokens in sizes.attention_tokens:
        for causal in (True, False):
            for name, kernel in kernels.items():
                labels = {"tokens": num_tokens, "mask": "causal" if causal else "full"}
                rows.measure(
                    labels | {"kernel": name},
                    partial(_attention, num_tokens, causal, kernel, sizes, device),
                )


def _attention(
    num_tokens: int, causal: bool, kernel: Kernel, sizes: Sizes, device: torch.device
) -> Row:
    fused_TPD = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device)
    q, k, v = fused_TPD.to(torch.bfloat16).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    del fused_TPD
    seconds = median_s(lambda: kernel(q, k, v, causal, None), device, sizes.repeats)
    flops = attention_flops(num_tokens, HEADS, HEAD_DIM, causal=causal)
    row: Row = {"ms": seconds * 1e3, "tflop_per_s": flops / seconds / 1e12}
    if num_tokens <= CHECKED_TOKENS:
        ours, theirs = kernel(q, k, v, causal, None), attend(q, k, v, causal=causal)
        row["out_differs"] = float((ours[0] - theirs[0]).abs().max())
        row["lse_differs"] = float((ours[1] - theirs[1]).abs().max())
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
