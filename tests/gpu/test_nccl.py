"""The conformance suite of tests/ring_conformance.py over NCCL, between two processes."""

from collections.abc import Iterator

import pytest
import torch

from tests.nccl_ranks import nccl_version, why_not
from tests.process_ranks import ProcessRanks
from tests.ring_conformance import COLLECTIVE_CHECKS, EXCHANGE_CHECKS, Check

RANKS = 2
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def nccl_ranks() -> Iterator[ProcessRanks]:
    """Two ranks on two GPUs, or on one where NCCL allows it."""
    if reason := why_not(RANKS, torch.cuda.device_count(), nccl_version()):
        pytest.skip(reason)
    with ProcessRanks(RANKS, "cuda") as ranks:
        yield ranks


@pytest.mark.parametrize(
    "check", [*EXCHANGE_CHECKS, *COLLECTIVE_CHECKS], ids=lambda check: check.__name__
)
def test_ring_of_nccl_conforms(nccl_ranks: ProcessRanks, check: Check) -> None:
    """A cluster on GPUs runs like this."""
    nccl_ranks.run(check)
