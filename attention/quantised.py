"""Rows of keys or values in one byte a value: each row of a head by its largest magnitude.

    int8   whole numbers from -127 to 127
    fp8    e4m3 floating point, up to 448

A row's largest magnitude is one of its values, so it is kept exactly, in the rows' own
dtype, and the value it belongs to comes back as it was. So whoever encodes what was decoded
gets the same values again: nothing more is lost, however often rows move. Finite rows of
any magnitude come back finite.

Letters as in `attention`; a row is the last dimension.
"""

from typing import Literal

import torch
from torch import Tensor

RowEncoding = Literal["int8", "fp8"]
_CODES: dict[RowEncoding, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}


def encode_rows(encoding: RowEncoding, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes ``[..., D]``, bytes as uint8, and largest magnitudes ``[..., 1]``."""
    code_dtype, most = _CODES[encoding]
    largest = rows.abs().amax(dim=-1, keepdim=True)
    divisor = largest.float()
    # Divided before it is scaled up: a share is at most 1, whatever the magnitude. A row of
    # zeros has no share; its codes are 0.
    shares = rows.float() / divisor.masked_fill(divisor == 0.0, 1.0)
    scaled = shares.mul_(most)
    codes = scaled.round_() if encoding == "int8" else scaled
    return codes.to(code_dtype).view(torch.uint8), largest


def decode_rows(encoding: RowEncoding, codes: Tensor, largest: Tensor) -> Tensor:
    """Return rows ``[..., D]`` in the dtype of their largest magnitudes ``[..., 1]``."""
    code_dtype, most = _CODES[encoding]
    return (codes.view(code_dtype).float() / most).mul_(largest.float()).to(largest.dtype)


def as_decoded(encoding: RowEncoding, rows: Tensor) -> Tensor:
    """Return rows as they come back once they have been encoded."""
    return decode_rows(encoding, *encode_rows(encoding, rows))
