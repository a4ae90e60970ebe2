"""The CUDA kernels behind `attention.kernel.attend`, each brought to the same call and result.

All take ``q_THD, k_SKD, v_SKD`` with a contiguous last dimension and any other
strides, and return ``(out_THD, lse_TH)`` in float32. What each kernel asks for
beyond that is met here:

    flash      16 bit; head dim a multiple of 8, at most 256
    efficient  float32; head dim a multiple of 4; no grouped heads: the KV heads
               become the batch, and the query heads of a group read one KV head
               through a stride of 0; its LSE rows are padded; it reaches keys
               by 32-bit offsets
    cudnn      16 bit; head dim a multiple of 8, at most 128

`attend` uses flash and efficient. `make gpu` times cudnn beside flash. Letters as
in `attention`, and G = query heads of one KV head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

HEAD_DIM_UNIT = 8
FLASH_PAGE_UNIT = 256  # tokens; a page of the paged flash kernel is a multiple of it
_MAX_OFFSET = 2**31 - 1  # elements
_TOP_LEFT_MASK = 1


def attend_cuda(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend with the kernel of the dtype; see `attention.kernel.attend`, which checks the call."""
    kernel = attend_efficient if q_THD.dtype is torch.float32 else attend_flash
    head_dim = q_THD.shape[-1]
    padding = -head_dim % HEAD_DIM_UNIT
    if not padding:
        return kernel(q_THD, k_SKD, v_SKD, causal, scale)
    # Zeros change no score and come out as zeros; the scale is that of the real head dim.
    q_THD, k_SKD, v_SKD = (functional.pad(x, (0, padding)) for x in (q_THD, k_SKD, v_SKD))
    scale = head_dim**-0.5 if scale is None else scale
    out_THD, lse_TH = kernel(q_THD, k_SKD, v_SKD, causal, scale)
    return out_THD[..., :head_dim], lse_TH


def attend_flash(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Flash attention, with those arguments alone that no version of torch has changed."""
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


def attend_efficient(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel, which takes float32 (as three TF32 products)."""
    T, H, D = q_THD.shape
    K = k_SKD.shape[1]
    q_KTGD = q_THD.unflatten(1, (K, H // K)).permute(1, 0, 2, 3)
    k_KSGD, v_KSGD = (
        _head_major_if_far(x).unsqueeze(2).expand(-1, -1, H // K, -1) for x in (k_SKD, v_SKD)
    )
    out_KTGD, lse_KGT, *_ = torch.ops.aten._efficient_attention_forward(
        q_KTGD,
        k_KSGD,
        v_KSGD,
        None,
        None,
        None,
        None,
        None,
        0.0,
        _TOP_LEFT_MASK if causal else 0,
        True,
        scale=scale,
    )
    out_THD = out_KTGD.permute(1, 0, 2, 3).reshape(T, H, D)
    return out_THD, lse_KGT[:, :, :T].permute(2, 0, 1).reshape(T, H)


def attend_cudnn(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention by cuDNN. Nothing but `make gpu` calls it, until it has been measured."""
    q_1HTD, k_1KSD, v_1KSD = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SKD, v_SKD))
    out_1HTD, lse_1HT1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_1HTD, k_1KSD, v_1KSD, None, True, 0.0, causal, False, scale=scale
    )
    return out_1HTD[0].transpose(0, 1).float(), lse_1HT1[0].reshape(q_1HTD.shape[1:3]).t()


def flash_reads_pages(pages: Tensor) -> bool:
    """Return whether this torch's flash kernel can read these pages ``[pages, C, K, D]`` itself."""
    return (
        pages.dtype in (torch.bfloat16, torch.float16)
        and pages.shape[1] % FLASH_PAGE_UNIT == 0
        and pages.shape[-1] % HEAD_DIM_UNIT == 0
        and _takes(torch.ops.aten._flash_attention_forward.default, "block_table", "seqused_k")
    )


@dataclass(frozen=True, eq=False)
class PageIndex:
    """Where the rows of B sequences lie in pages, as the paged flash kernel is told; int32."""

    pages_BP: Tensor  # 0 behind a sequence's last page
    num_rows_B: Tensor
    row_ends_B1: Tensor  # 0, then the sum of rows up to each sequence
    max_rows: int

    @classmethod
    def of(
        cls, runs: Sequence[tuple[Sequence[int], int]], page_tokens: int, device: torch.device
    ) -> "PageIndex":
        """Return the index of runs of ``(pages, rows)``; every one has rows."""
        counts = [num_rows for _, num_rows in runs]
        max_pages = -(-max(counts, default=0) // page_tokens)
        pages_BP = torch.zeros(len(runs), max_pages, dtype=torch.int32)
        for row_P, (page_ids, num_rows) in zip(pages_BP, runs, strict=True):
            used = page_ids[: -(-num_rows // page_tokens)]
            row_P[: len(used)] = torch.tensor(used, dtype=torch.int32)
        ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        return cls(
            pages_BP.to(device), ends.diff().to(device), ends.to(device), max(counts, default=0)
        )


def attend_flash_pages(
    q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, index: PageIndex, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Flash attention of queries that all see their sequence's rows in pages.

    Each sequence has as many queries, one after the other; several sequences one each.
    """
    T, H, _ = q_THD.shape
    per_sequence = T // len(index.num_rows_B)
    assert per_sequence == T or per_sequence == 1
    out_THD, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THD,
        k_pages,
        v_pages,
        torch.arange(0, T + 1, per_sequence, dtype=torch.int32, device=q_THD.device),
        index.row_ends_B1,
        per_sequence,
        index.max_rows,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=index.num_rows_B,
        block_table=index.pages_BP,
    )
    # A single query comes back with a batch dimension, its LSE with one at the end.
    return out_THD.reshape(q_THD.shape).float(), lse_HT.reshape(H, T).transpose(0, 1)


def _head_major_if_far(x_SKD: Tensor) -> Tensor:
    """Return ``x_KSD``, copied head by head where a row would lie past a 32-bit offset."""
    x_KSD = x_SKD.transpose(0, 1)
    return x_KSD.contiguous() if len(x_SKD) * x_SKD.stride(0) > _MAX_OFFSET else x_KSD


def _takes(operator: torch._ops.OpOverload, *arguments: str) -> bool:
    """Return whether this torch's operator has these arguments."""
    known = {argument.name for argument in operator._schema.arguments}
    return known.issuperset(arguments)
