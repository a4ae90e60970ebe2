"""``ringspan serve`` as its users meet it: the official client, a real server, LLM's tokens."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster import LLM, RequestOutput, SamplingParams
from models.needle_text import make_demo, question
from tests.checkpoints import edit_json

KEY = "a-key-for-this-test"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=2, ignore_eos=True)
DEMO = make_demo(1024, seed=5)
PROMPTS = [DEMO.prompt_text + question(key) for key, _ in DEMO.questions[:2]]
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
START_S = 240.0


class Served:
    """A server in a process of its own."""

    def __init__(self, checkpoint: Path, *flags: str) -> None:
        """Start it, and wait until it says where it is."""
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        command = [
            sys.executable,
            "-m",
            "cluster",
            "serve",
            str(checkpoint),
            "--port",
            "0",
            "--grpc-port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, *flags],
            env={**environment, "RINGSPAN_API_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.wait_for_line("serving").split(" at ")[1].split("/v1")[0]

    def wait_for_line(self, word: str) -> str:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            line = self._news.get(timeout=START_S)
            if line is None:
                break
            if word in line:
                return line
        raise AssertionError(f"never said {word!r}: {self.lines}")

    def metric(self, name: str) -> float:
        """Return one number of the metrics page."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        lines = [line for line in page.splitlines() if line.startswith(f"ringspan:{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_for_metric(self, name: str, value: float) -> None:
        for _ in range(300):
            if self.metric(name) == value:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} never was {value}: {self.metric(name)}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._news.put(line)
        self._news.put(None)


@dataclass(frozen=True)
class Expected:
    """What `LLM.generate` answers."""

    greedy: list[RequestOutput]
    drawn: RequestOutput
    chat: RequestOutput


@pytest.fixture(scope="module")
def checkpoint(needle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, with a chat template that adds nothing."""
    directory = tmp_path_factory.mktemp("chat") / "needle-chat"
    shutil.copytree(needle, directory)
    edit_json(directory / "tokenizer_config.json", chat_template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def expected(shared_ray: None, checkpoint: Path) -> Expected:
    with LLM(checkpoint, context_parallel_size=2) as llm:
        return Expected(
            greedy=llm.generate(PROMPTS, GREEDY),
            drawn=llm.generate(PROMPTS[0], DRAWN)[0],
            chat=llm.chat([{"role": "user", "content": PROMPTS[1]}], GREEDY)[0],
        )


@pytest.fixture(scope="module")
def served(expected: Expected, checkpoint: Path) -> Iterator[Served]:
    server = Served(checkpoint, "-cp", "2", "--served-model-name", "needle")
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(model="needle", **fields)


def test_completions_are_those_of_generate(client: openai.OpenAI, expected: Expected) -> None:
    """Texts, tokens, log-probabilities and reasons, of several prompts in one call."""
    told = ask(
        client,
        prompt=PROMPTS,
        max_tokens=12,
        temperature=0,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )

    for choice, output in zip(told.choices, expected.greedy, strict=True):
        answer = output.outputs[0]
        assert (choice.text, choice.finish_reason) == (answer.text, answer.finish_reason)
        assert tuple(choice.token_ids) == answer.token_ids
        assert answer.logprobs is not None
        own = [
            places[token] for places, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
        assert choice.logprobs.token_logprobs == pytest.approx([p.logprob for p in own], abs=1e-4)
        assert choice.logprobs.tokens == [place.decoded_token for place in own]
    assert told.usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in expected.greedy)


def test_token_ids_and_seeds(client: openai.OpenAI, expected: Expected) -> None:
    """A prompt of ids draws what the text does, and the second time most of it is cached."""
    told = ask(
        client,
        prompt=list(expected.drawn.prompt_token_ids),
        max_tokens=12,
        temperature=1.0,
        seed=7,
        n=2,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )

    tokens = [tuple(choice.token_ids) for choice in told.choices]
    assert tokens == [answer.token_ids for answer in expected.drawn.outputs]
    again = ask(client, prompt=list(expected.drawn.prompt_token_ids), max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_chat_streamed_and_whole(client: openai.OpenAI, expected: Expected) -> None:
    """The same text, tokens and usage, in pieces and at once."""
    messages: Any = [{"role": "user", "content": PROMPTS[1]}]
    fields: dict[str, Any] = {
        "model": "needle",
        "messages": messages,
        "max_completion_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }

    create: Any = client.chat.completions.create
    whole = create(**fields)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(**fields, **options))

    answer = expected.chat.outputs[0]
    assert whole.choices[0].message.content == answer.text
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == answer.text
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason == answer.finish_reason
    told = [place for piece in pieces if piece.logprobs for place in piece.logprobs.content]
    assert [each.token for each in told] == [c.token for c in whole.choices[0].logprobs.content]
    assert len(told) == len(answer.token_ids)
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        len(expected.chat.prompt_token_ids),
        len(answer.token_ids),
    )


def test_prompts_are_scored(client: openai.OpenAI, served: Served) -> None:
    """``echo`` with ``logprobs`` and ``prompt_logprobs`` tell the same, token by token."""
    told = ask(
        client,
        prompt=PROMPTS[0],
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=1,
        extra_body={"prompt_logprobs": 1, "return_token_ids": True},
    ).choices[0]
    ids = told.prompt_token_ids
    assert told.text.startswith(PROMPTS[0])
    assert told.prompt_logprobs[0] is told.logprobs.token_logprobs[0] is None
    places = zip(ids[1:], told.prompt_logprobs[1:], strict=True)
    own = [place[str(token)]["logprob"] for token, place in places]
    assert told.logprobs.token_logprobs[1:-1] == pytest.approx(own)

    secret = {"Authorization": f"Bearer {KEY}"}
    cut = {"prompt": PROMPTS[0], "return_token_strs": True}
    tokens = httpx.post(f"{served.url}/tokenize", json=cut, headers=secret, timeout=60).json()
    assert tokens["tokens"] == ids
    assert len(tokens["token_strs"]) == tokens["count"] == len(ids)
    back = {"tokens": ids}
    text = httpx.post(f"{served.url}/detokenize", json=back, headers=secret, timeout=60).json()
    assert text["prompt"].endswith(PROMPTS[0])
    chat = {"messages": [{"role": "user", "content": PROMPTS[0]}]}
    told = httpx.post(f"{served.url}/tokenize", json=chat, headers=secret, timeout=60).json()
    assert ids[-told["count"] :] == told["tokens"]


def test_cancel_by_the_id_that_chunks_tell(client: openai.OpenAI, served: Served) -> None:
    """The stream ends with what it has, and says so."""
    body = {"ignore_eos": True}
    stream = client.completions.create(
        model="needle", prompt="a", max_tokens=100_000, stream=True, extra_body=body
    )
    chunk = next(iter(stream))
    gone = f"{served.url}/v1/cancel/{chunk.id}"
    assert httpx.post(gone, timeout=60).status_code == 401
    secret = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(gone, headers=secret, timeout=60).json()["cancelled"] is True
    *_, last = stream
    assert str(last.choices[0].finish_reason) == "abort"
    assert httpx.post(gone, headers=secret, timeout=60).status_code == 404


def test_metrics_of_the_ring(client: openai.OpenAI, served: Served) -> None:
    """Steps by what went round, the ranks' parts, and prompts that were there."""
    for _ in range(2):
        ask(client, prompt=PROMPTS[0], max_tokens=2)
    assert served.metric("cp_choice_total") > 0
    assert served.metric("cp_choice_total") == served.metric("cp_ring_step_seconds_count")
    assert served.metric("rank_part_seconds_total") > 0
    assert (
        0 < served.metric("prefix_cache_hits_total") < served.metric("prefix_cache_queries_total")
    )
    assert served.metric("cached_tokens_total") == served.metric("prefix_cache_hits_total")
    assert 0 <= served.metric("rank_heartbeat_age_seconds") < 60


def test_stop_ends_a_text(client: openai.OpenAI, expected: Expected) -> None:
    text = expected.greedy[0].outputs[0].text
    told = ask(client, prompt=PROMPTS[0], max_tokens=12, temperature=0, stop=text[2:4])
    assert (told.choices[0].text, told.choices[0].finish_reason) == (
        text[: text.index(text[2:4])],
        "stop",
    )


def test_client_reads_the_errors(client: openai.OpenAI, served: Served) -> None:
    """Each as the class that the client has for it."""
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        ask(client, prompt="a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        ask(client, prompt=[2**30])
    with pytest.raises(openai.NotFoundError, match="served as needle"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), prompt="a")
    assert [model.id for model in client.models.list()] == ["needle"]
    assert client.models.retrieve("needle").object == "model"
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_vanishes_frees_its_request(served: Served, stream: bool) -> None:
    """Nobody reads the answer: its pages belong to others; the server stays healthy meanwhile."""
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = served.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        served.wait_for_metric("num_requests_running", 1)
        assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
    served.wait_for_metric("num_requests_running", 0)


def test_port_in_use_is_one_sentence(served: Served, checkpoint: Path) -> None:
    """Said before the model is loaded."""
    port = served.url.rsplit(":", 1)[1]
    command = [
        sys.executable,
        "-m",
        "cluster",
        "serve",
        str(checkpoint),
        "--port",
        port,
        "--grpc-port",
        "0",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.startswith(f"ringspan: cannot listen at 127.0.0.1 port {port}: address")
    assert "loading" not in run.stdout


def test_sigterm_tells_every_stream(served: Served, client: openai.OpenAI) -> None:
    """Nobody is left with half an answer that looks whole. The last test of this server."""
    begun = threading.Barrier(21, timeout=120)

    def read() -> str:
        with httpx.stream(
            "POST",
            f"{served.url}/v1/completions",
            headers={"Authorization": f"Bearer {KEY}"},
            json={**LONG, "stream": True},
            timeout=120,
        ) as response:
            lines = response.iter_lines()
            next(lines)
            begun.wait()
            return "\n".join(line for line in lines if line)

    with ThreadPoolExecutor(20) as pool:
        reads = [pool.submit(read) for _ in range(20)]
        begun.wait()
        served.process.send_signal(signal.SIGTERM)
        served.wait_for_line("stopping")
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask(client, prompt="a")
        assert served.stop() == 0  # a second signal: the grace is over
        ends = [each.result().splitlines()[-2:] for each in reads]
    for error, done in ends:
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
    assert not [line for line in served.lines if "Traceback" in line or KEY in line]
