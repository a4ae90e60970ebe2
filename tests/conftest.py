"""What all tests share: one torch thread, for CI machines have few cores and ranks are threads."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)
