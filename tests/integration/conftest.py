"""One Ray for the tests that need no Ray of their own; it takes seconds to start."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from models.needle_checkpoint import write_needle_checkpoint
from tests.checkpoints import write_llama_checkpoint


@pytest.fixture(scope="session", autouse=True)
def short_ray_directory() -> Iterator[None]:
    """Keep Ray's files of this run apart; its sockets' paths must be short."""
    directory = tempfile.mkdtemp(prefix="rs")
    os.environ["RAY_TMPDIR"] = directory
    os.environ["XDG_CACHE_HOME"] = directory + "/cache"  # measured rates of these tests alone
    os.environ["RAY_AUTH_TOKEN"] = "only-for-the-tests-of-this-machine"
    yield
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_ray(short_ray_directory: None) -> Iterator[None]:
    """A local Ray that every `LLM` of this process joins."""
    ray.init(
        "local",
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint with random weights."""
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint."""
    directory = tmp_path_factory.mktemp("needle")
    write_needle_checkpoint(directory)
    return directory
