"""The checks that `make gpu` makes on CUDA hold on CPU, and say no where they should."""

import pytest
import torch

from attention import attend
from tests import gpu_checks
from tests.gpu_checks import CHECKS
from tests.nccl_ranks import version_of, why_not


@pytest.mark.parametrize("name", CHECKS)
def test_check_holds_on_cpu(name: str) -> None:
    """A check that fails on CUDA must be the device's fault, not its own."""
    CHECKS[name](torch.device("cpu"))


def test_check_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that passes whatever the kernel gives would prove nothing."""
    monkeypatch.setattr(gpu_checks, "attend", lambda q, k, v, **kw: attend(q, k, 1.1 * v, **kw))
    with pytest.raises(AssertionError):
        gpu_checks.check_lengths(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("ranks", "devices", "version", "reason"),
    [
        (2, 2, (2, 18, 1), None),
        (2, 1, (2, 30, 7), None),
        (2, 1, (2, 28, 9), "2 ranks on 1 GPU need NCCL 2.30 or later, found 2.28.9"),
        (2, 0, None, "no CUDA device"),
    ],
)
def test_ranks_share_a_gpu_where_nccl_allows_it(
    ranks: int, devices: int, version: tuple[int, int, int] | None, reason: str | None
) -> None:
    """Older NCCL ends with an error about a duplicate GPU."""
    assert why_not(ranks, devices, version) == reason


def test_version_number_of_nccl() -> None:
    assert version_of(23007) == (2, 30, 7)
    assert version_of(22809) == (2, 28, 9)
