"""The checks of tests/gpu_checks.py on the first CUDA device."""

import pytest
import torch

from tests.gpu_checks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_holds_on_cuda(name: str) -> None:
    """The docstring of each check says why it matters."""
    CHECKS[name](torch.device("cuda", 0))
