"""`cluster.serve:app`: the same server under Ray Serve, as RayService runs it."""

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve

from cluster import LLM, Client, ClusterError, SamplingParams, Unauthenticated
from cluster.serve import app
from configs import ConfigError

KEY = "a-key-for-this-test"
IDS = [5, 9, 17, 33, 8, 100]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = {"prompt": IDS, "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stream": True}
LONG["return_token_ids"] = True  # this checkpoint has no text


@dataclass(frozen=True)
class Served:
    """Where it answers, and what it must answer."""

    url: str
    target: str
    token_ids: tuple[int, ...]


@pytest.fixture(scope="module")
def served(
    shared_ray: None, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with LLM(llama, context_parallel_size=2) as llm:
        expected = llm.generate({"prompt_token_ids": IDS}, GREEDY)[0].outputs[0].token_ids
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    http_port, grpc_port = _free_ports(2)
    serve.start(http_options={"host": "127.0.0.1", "port": http_port})
    arguments = {
        "model": str(llama),
        "context_parallel_size": "2",  # as `serve run` gives it
        "server": {"grpc_port": grpc_port, "served_model_name": ["mine"], "grace_s": 2.0},
        "server.api_key_file": str(keys),
    }
    serve.run(app(arguments))
    yield Served(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", expected)
    serve.shutdown()


def test_both_doors_answer_with_the_tokens_of_llm(served: Served) -> None:
    """One replica, one cluster of actors behind it."""
    openai_client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY)
    extras = {"ignore_eos": True, "return_token_ids": True}
    told = openai_client.completions.create(
        model="mine", prompt=IDS, max_tokens=8, temperature=0, extra_body=extras
    )
    with Client(served.target, api_key=KEY) as client:
        output = client.generate({"prompt_token_ids": IDS}, GREEDY)[0]

    assert told.choices[0].to_dict()["token_ids"] == list(served.token_ids)
    assert output.outputs[0].token_ids == served.token_ids
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
    assert "ringspan:up" in httpx.get(f"{served.url}/metrics", timeout=60).text


def test_keys_and_limits_hold(served: Served) -> None:
    refused = httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    with Client(served.target) as client, pytest.raises(Unauthenticated):
        client.status()
    large = httpx.post(
        f"{served.url}/v1/completions",
        content=b"x" * (2**25),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        timeout=60,
    )
    assert large.status_code == 413


def test_clients_that_leave_free_their_requests(served: Served) -> None:
    """Ray cancels what the replica has called for them, even the call that cancels."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with Client(served.target, api_key=KEY) as client, httpx.Client(timeout=60) as http:
        for lines in range(40):
            url = f"{served.url}/v1/completions"
            with http.stream("POST", url, json=LONG, headers=headers) as stream:
                for number, _ in enumerate(stream.iter_lines()):
                    if number >= lines % 8:
                        break
            end_s = time.monotonic() + 10.0
            while (status := client.status())["running"] and time.monotonic() < end_s:
                time.sleep(0.01)
            assert status["running"] == status["waiting"] == 0, f"after {lines % 8} lines"


@pytest.mark.campaign
def test_a_failed_cluster_is_replaced(served: Served) -> None:
    """Ray Serve asks for the replica's health, and starts another one with a new cluster."""
    with Client(served.target, api_key=KEY) as client:
        pid = client.status()["workers"][1]["pid"]
        os.kill(pid, signal.SIGKILL)
        assert _come_back(client, without=pid)
        output = client.generate({"prompt_token_ids": IDS}, GREEDY)[0]
    assert output.outputs[0].token_ids == served.token_ids


def _come_back(client: Client, *, without: int, limit_s: float = 200.0) -> bool:
    """Return whether a cluster without that rank answers in time."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        with contextlib.suppress(ClusterError):
            status = client.status()
            if status["failure"] is None and without not in {
                worker["pid"] for worker in status["workers"]
            }:
                return True
        time.sleep(0.5)
    return False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "needs the argument model"),
        ({"model": "CHECKPOINT", "modle": 1}, "unknown key 'modle'; did you mean model?"),
        ({"model": "CHECKPOINT", "server.port": "x"}, "server.port"),
        ({"model": "CHECKPOINT", "server": {"port": 1, "grpc_port": 1}}, "must differ"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    llama: Path, arguments: dict[str, object], told: str
) -> None:
    """Said where the application is built."""
    given = {key: str(llama) if each == "CHECKPOINT" else each for key, each in arguments.items()}
    with pytest.raises(ConfigError, match=re.escape(told)):
        app(given)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
