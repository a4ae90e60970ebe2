"""A product is the same whichever library makes it."""

from typing import Any

import pytest
import torch

from models import linear as module
from models.linear import linear

TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
def test_product_equals_float64(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    """Also of no rows, of strided rows, and with some rows of a fused weight."""
    rng = torch.Generator().manual_seed(0)
    fused_TI = torch.randn(rows, 3, 40, generator=rng).to(dtype)
    fused_OI = torch.randn(50, 40, generator=rng).to(dtype)
    bias_O = torch.randn(50, generator=rng).to(dtype)
    for x_TI, part in ((fused_TI[:, 0], slice(None)), (fused_TI[:, 1].contiguous(), slice(7, 31))):
        bias = bias_O[part] if has_bias else None

        with torch.inference_mode():
            actual = linear(x_TI, fused_OI[part], bias)

        expected = x_TI.double() @ fused_OI[part].double().T
        if bias is not None:
            expected += bias.double()
        torch.testing.assert_close(actual.double(), expected, **TOLERANCES[dtype])


def test_a_torch_without_onednn_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds differ."""
    monkeypatch.setattr(module, "_onednn", None)

    assert torch.equal(linear(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))
