"""gRPC and `Client` before a real cluster: the tokens are those of `LLM`, breaks or none."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.messages import Request
from cluster import LLM, Client, PromptError, SamplingError, SamplingParams, UnknownRequest
from cluster.backend import ClusterBackend
from cluster.rpc.server import RpcServer
from models.needle_text import make_demo, question
from tests.rpc_backend import WAIT_S, ServerThread, serve

DEMO = make_demo(512, seed=1)
KEY, ANSWER = DEMO.questions[0]
PROMPT = DEMO.prompt_text + question(KEY)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
# Everything that follows from the tokens so far, or from a token's index.
SAMPLED = SamplingParams(
    max_tokens=24,
    temperature=2.0,
    seed=7,
    top_p=0.95,
    presence_penalty=0.7,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    min_tokens=20,
    logit_bias={65: 1.5},
    bad_words=["ab"],
    stop=["nothing has this"],
)


@pytest.fixture(scope="module")
def llm(shared_ray: None, needle: Path) -> Iterator[LLM]:
    with LLM(needle, context_parallel_size=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def target(llm: LLM) -> Iterator[str]:
    with serve(ClusterBackend(llm._cluster)) as (target, _, _):
        yield target


@pytest.fixture(scope="module")
def client(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, n=3)])
def test_tokens_are_those_of_the_handle(llm: LLM, client: Client, params: SamplingParams) -> None:
    """Text and token ids, as a whole and streamed; results are of the same classes."""
    ids = list(PROMPT.encode())
    wanted = llm.generate(PROMPT, params)[0].outputs
    for prompt in (PROMPT, {"prompt_token_ids": ids}):
        assert client.generate(prompt, params)[0].outputs == wanted
    deltas = list(client.stream(PROMPT, params))
    for each in wanted:
        mine = [delta for delta in deltas if delta.index == each.index]
        assert sum((delta.token_ids for delta in mine), ()) == each.token_ids
        assert "".join(delta.text for delta in mine) == each.text


def test_what_is_told_beside_the_answers_is_that_of_the_handle(llm: LLM, client: Client) -> None:
    """Log-probabilities, the prompt's ids and its own, cached tokens, and every step."""
    params = replace(SAMPLED, n=2, logprobs=2, prompt_logprobs=1)
    # Salts of their own: both are computed anew, in the same steps.
    wanted = llm.generate({"prompt": PROMPT, "cache_salt": "handle"}, params)[0]
    got = client.generate({"prompt": PROMPT, "cache_salt": "client"}, params)[0]
    streamed = list(client.stream({"prompt": PROMPT, "cache_salt": "stream"}, params))
    again = client.generate({"prompt": PROMPT, "cache_salt": "client"}, GREEDY)[0]

    assert got.outputs == wanted.outputs
    assert got.prompt_token_ids == wanted.prompt_token_ids
    assert got.prompt_logprobs == wanted.prompt_logprobs
    shape = [(step.phase, step.prefill_tokens, step.decode_tokens) for step in wanted.steps]
    assert [(step.phase, step.prefill_tokens, step.decode_tokens) for step in got.steps] == shape
    assert got.explain().count("step ") == len(shape)
    [prompt] = [delta.prompt for delta in streamed if delta.prompt is not None]
    assert prompt.logprobs == wanted.prompt_logprobs
    assert streamed[-1].metrics is not None
    assert again.num_cached_tokens > 0


def test_one_event_loop_has_the_same_calls(llm: LLM, client: Client) -> None:
    """Without blocking it."""
    wanted = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids

    async def test() -> None:
        for handle in (llm, client):
            deltas = [delta async for delta in handle.astream(PROMPT, GREEDY)]
            assert sum((delta.token_ids for delta in deltas), ()) == wanted
            assert (await handle.agenerate(PROMPT, GREEDY)).outputs[0].token_ids == wanted
        assert (await client.astatus())["failure"] is None
        assert await client.aprogress() == []
        with pytest.raises(UnknownRequest):
            await client.acancel("never was")
        await client.aclose()

    asyncio.run(test())


def test_errors_are_those_of_the_handle(client: Client) -> None:
    """They were raised in the coordinator's process, behind two borders."""
    with pytest.raises(PromptError, match="vocabulary"):
        client.generate({"prompt_token_ids": [10**6]})
    with pytest.raises(PromptError, match="empty"):
        client.generate("")
    with pytest.raises(SamplingError, match="stop_token_ids"):
        client.generate(PROMPT, SamplingParams(stop_token_ids=[10**6]))
    with pytest.raises(UnknownRequest):
        client.cancel("never was")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_an_answer_goes_on_from_any_token(llm: LLM, params: SamplingParams) -> None:
    """Greedy or sampled, with penalties: tokens and text are those of an unbroken run."""
    whole = llm.generate(PROMPT, params)[0].outputs[0]
    requests = [
        Request(
            request_id=f"continued-{broken_at}",
            token_ids=np.frombuffer(PROMPT.encode(), dtype=np.uint8).astype(np.int32),
            params=params,
            answer_ids=whole.token_ids[:broken_at],
        )
        for broken_at in range(1, len(whole.token_ids))
    ]
    cluster = llm._cluster
    outputs = cluster.results([cluster.submit("generate", request) for request in requests])
    for output in outputs:
        assert output.outputs[0] == whole
    with pytest.raises(PromptError, match="answer_ids"):
        cluster.ask("generate", replace(requests[0], answer_ids=whole.token_ids))


def test_logprobs_of_a_continued_answer_are_those_of_its_new_tokens(llm: LLM) -> None:
    """Those of the tokens that were given have been told by the earlier call."""
    params = replace(GREEDY, logprobs=1)
    whole = llm.generate(PROMPT, params)[0].outputs[0]
    request = Request(
        request_id="continued", text=PROMPT, params=params, answer_ids=whole.token_ids[:9]
    )
    output = llm._cluster.ask("generate", request).outputs[0]
    assert whole.logprobs is not None
    assert output.token_ids == whole.token_ids
    assert len(output.logprobs) == len(whole.logprobs) - 9
    for got, wanted in zip(output.logprobs, whole.logprobs[9:], strict=True):
        assert got.keys() == wanted.keys()
        for token_id in got:
            assert got[token_id].logprob == pytest.approx(wanted[token_id].logprob, abs=1e-3)


def test_a_broken_stream_is_taken_up(llm: LLM) -> None:
    """The server goes away in the midst of an answer and comes back: nobody sees it."""
    params = replace(SAMPLED, max_tokens=200, min_tokens=150)
    wanted = llm.generate(PROMPT, params)[0].outputs[0]
    backend = ClusterBackend(llm._cluster)
    thread = ServerThread()
    first = RpcServer(backend)
    port = thread.run(first.start())
    with Client(f"127.0.0.1:{port}") as client:
        stream = client.stream(PROMPT, params)
        deltas = [next(stream)]
        thread.run(first.stop(0.0))
        second = RpcServer(backend, port=port)
        thread.run(second.start())
        deltas += stream
        thread.run(second.stop(0.0))
    thread.run(backend.close())
    thread.close()
    assert sum((delta.token_ids for delta in deltas), ()) == wanted.token_ids
    assert "".join(delta.text for delta in deltas) == wanted.text


def test_whoever_vanishes_frees_the_request(llm: LLM, target: str) -> None:
    """Its connection ends without a word, in the midst of a long answer."""
    before = llm.status()["requests"]
    client = Client(target)
    stream = client.stream(PROMPT, replace(GREEDY, max_tokens=400_000))
    next(stream)
    assert llm.status()["requests"] == before + 1
    client.close()
    limit_s = time.monotonic() + WAIT_S
    while llm.status()["requests"] > before:
        assert time.monotonic() < limit_s
        time.sleep(0.05)


def test_progress_status_and_health(llm: LLM, client: Client, target: str) -> None:
    """What a watcher asks, while an answer is made."""
    stream = client.stream(
        {"prompt": PROMPT, "request_id": "mine"}, replace(GREEDY, max_tokens=400_000)
    )
    next(stream)
    told: dict[str, Any] = client.status()
    assert (told["num_ranks"], told["failure"]) == (2, None)
    progress = client.progress("mine")[0]
    assert progress.done_tokens == progress.total_tokens >= len(PROMPT)  # with a BOS token
    client.cancel("mine")
    assert [delta.finish_reason for delta in stream][-1] == "abort"
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
