"""Products with a weight matrix, by the faster of torch's two libraries.

In float32 on CPU torch calls MKL, which is slow at a few rows where the CPU is not
Intel's; oneDNN, which torch has with it, makes code for the CPU and the shape, and
is faster there at any number of rows. In 16 bit torch calls oneDNN itself.

T = rows, O = outputs, I = inputs.
"""

import os

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN keeps code for every shape that it has met, and torch a record of each: up to 1024 of
# both, which for prompts of all lengths are hundreds of MiB. Both are read at the first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

# Torch's compiler calls it; no public function does in float32.
_onednn = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, ``[T, O]``."""
    if _onednn is None or x_TI.device.type != "cpu" or x_TI.dtype is not torch.float32:
        return functional.linear(x_TI, weight_OI, bias_O)
    return _onednn(x_TI, weight_OI, bias_O, "none", [], "")
