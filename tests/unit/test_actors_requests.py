"""From a request to what runs: what takes long is done beside the coordinator's event loop."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from actors.messages import Request
from actors.requests import SHORT_TEXT, OpenRequest, RequestReader
from models.config import read_model_config
from models.errors import PromptError
from models.tokenizer import Tokenizer
from tests.checkpoints import write_llama_checkpoint
from tests.letters import LetterBackend


class _WaitingBackend(LetterBackend):
    """Encodes when it may, and says where."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.threads: list[int] = []

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.threads.append(threading.get_ident())
        assert self.may_go.wait(10.0)
        return super().__call__(text, **options)


@pytest.fixture
def backend() -> _WaitingBackend:
    return _WaitingBackend()


@pytest.fixture
def reader(tmp_path: Path, backend: _WaitingBackend) -> RequestReader:
    model = read_model_config(write_llama_checkpoint(tmp_path))
    return RequestReader(model, Tokenizer(backend), max_model_len=10**6, max_logprobs=20)


def test_a_long_text_is_encoded_beside_the_event_loop(
    reader: RequestReader, backend: _WaitingBackend
) -> None:
    """A million tokens take seconds, for which no other answer waits."""
    request = Request(request_id="r", text="a" * (SHORT_TEXT + 1))

    async def read() -> OpenRequest:
        reading = asyncio.create_task(reader.with_tokens(request))
        while not backend.threads:
            await asyncio.sleep(0.001)
        backend.may_go.set()
        return reader.read(await reading, time.perf_counter())

    opened = asyncio.run(read())

    assert backend.threads != [threading.get_ident()]
    assert len(backend.threads) == 1  # it is not encoded twice
    assert opened.prompt.tolist() == [ord("a")] * (SHORT_TEXT + 1)
    assert opened.request.text == request.text


def test_a_short_text_is_encoded_at_once(reader: RequestReader, backend: _WaitingBackend) -> None:
    backend.may_go.set()
    request = Request(request_id="r", text="ab")

    async def read() -> OpenRequest:
        assert await reader.with_tokens(request) is request
        return reader.read(request, time.perf_counter())

    assert asyncio.run(read()).prompt.tolist() == [97, 98]
    assert backend.threads == [threading.get_ident()]


def test_a_long_text_that_is_no_unicode_is_refused(reader: RequestReader) -> None:
    request = Request(request_id="r", text="\ud800" * (SHORT_TEXT + 1))
    with pytest.raises(PromptError, match="not valid Unicode"):
        asyncio.run(reader.with_tokens(request))
