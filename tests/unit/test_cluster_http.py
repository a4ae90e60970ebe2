"""OpenAI's API in front of a cluster that is not there: bodies, streams, errors, limits."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ClusterError, QueueFull, RankLost
from cluster.http.bodies import ChatCompletion, Completion
from cluster.http.settings import Settings
from models.errors import PromptError
from tests.http_asker import CHAT, COMPLETIONS, FAST, HI, Asker, chunks, read_error, run

PASS_KV, PREFILL = 'algorithm="pass_kv"', 'model_name="m",phase="prefill"'


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["bcd"]),
        (["ab", "xy"], ["bc", "yz"]),
        ([1, 2], ["\2\3"]),
        ([[65], [66]], ["B", "C"]),
    ],
)
def test_completion_in_every_form_of_a_prompt(prompt: object, texts: list[str]) -> None:
    """One choice for each prompt, in their order, with all prompts' tokens counted."""

    async def test(ask: Asker) -> None:
        response = await ask.post(COMPLETIONS, {"model": "m", "prompt": prompt})
        whole = Completion.model_validate_json(response.content)
        assert [choice.text for choice in whole.choices] == texts
        assert [choice.index for choice in whole.choices] == list(range(len(texts)))
        tokens = sum(map(len, texts))
        assert whole.usage is not None
        assert whole.usage.model_dump() == {
            "prompt_tokens": tokens,
            "completion_tokens": tokens,
            "total_tokens": 2 * tokens,
            "prompt_tokens_details": {"cached_tokens": len(texts)},
        }

    run(test)


def test_stream_tells_what_the_whole_answer_does() -> None:
    """Texts, tokens, log-probabilities, reasons and usage, of n answers to each prompt."""
    body = {"prompt": ["abcde", "vwx"], "n": 2, "logprobs": 2, "return_token_ids": True}

    async def test(ask: Asker) -> None:
        whole = (await ask.post(COMPLETIONS, body)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        told = chunks(await ask.post(COMPLETIONS, body | options))
        assert told[-1]["usage"] == whole["usage"]
        assert told[-1]["choices"] == []
        for choice in whole["choices"]:
            own = [c for t in told for c in t["choices"] if c["index"] == choice["index"]]
            assert "".join(c["text"] for c in own) == choice["text"]
            assert list(chain(*(c["token_ids"] for c in own))) == choice["token_ids"]
            assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
            for name, values in choice["logprobs"].items():
                assert list(chain(*(c["logprobs"][name] for c in own))) == values

    run(test)


def test_chat_and_its_stream() -> None:
    """The messages go to the template; roles come first, log-probabilities with each token."""
    asked = {"logprobs": True, "top_logprobs": 1, "max_completion_tokens": 1}

    async def test(ask: Asker) -> None:
        whole = ChatCompletion.model_validate_json((await ask.post(CHAT, HI | asked)).content)
        assert whole.choices[0].message.content == "i"
        place = whole.choices[0].logprobs
        assert place is not None
        assert place.content[0].model_dump() == {
            "token": "i",
            "logprob": -1.5,
            "bytes": [105],
            "top_logprobs": [{"token": "j", "logprob": -0.5, "bytes": [106]}],
        }
        told = chunks(await ask.post(CHAT, HI | asked | {"stream": True}))
        deltas = [each["choices"][0]["delta"] for each in told]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == "i"
        assert ask.backend.requests[0].messages == ({"role": "user", "content": "hi"},)

    run(test)


def test_chat_answers_as_long_as_the_model_can() -> None:
    """As other servers do; text parts are joined."""
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    async def test(ask: Asker) -> None:
        await ask.post(CHAT, {"messages": [{"role": "user", "content": content}]})
        assert ask.backend.requests[0].params.max_tokens == 1000
        assert ask.backend.requests[0].messages == ({"role": "user", "content": "a\nb"},)

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (COMPLETIONS, {}, 400, "prompt: field required"),
        (COMPLETIONS, [], 400, "JSON object"),
        (COMPLETIONS, b"{", 400, "not JSON"),
        (COMPLETIONS, b"\xff{}", 400, "cannot be read"),
        (COMPLETIONS, b"[" * 100_000, 400, "cannot be read"),
        (COMPLETIONS, {"prompt": ""}, 400, "empty"),
        (COMPLETIONS, {"prompt": []}, 400, "empty"),
        (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": [1, True]}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": [1] * 1000}, 400, "max_model_len is 1000"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, "unknown field 'temprature'"),
        (CHAT, HI | {"echo": True}, 400, "echo is not supported"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        (COMPLETIONS, {"prompt": "a", "echo": 0}, 400, "echo: input should be a valid boolean"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature must be"),
        (COMPLETIONS, {"prompt": "a", "temperature": True}, 400, "temperature: must be a number"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 10**400}, 400, "top_p"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n must be"),
        (COMPLETIONS, {"prompt": "a", "n": 129}, 400, "at most 128"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 65}, 400, "at most 128"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop must be a text or a list"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop must be"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias must be"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "stream: true only"),
        (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "served as m"),
        (COMPLETIONS, b'{"prompt": "a", "model": "\\ud800"}', 404, "there is no model"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages must be objects"),
        (CHAT, HI | {"tools": [{}]}, 400, "tools is not supported"),
        (CHAT, HI | {"top_logprobs": 2}, 400, "logprobs: true only"),
        ("/v1/nothing", {}, 404, "no such path"),
        ("/v1/models", {}, 405, "POST is not"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    path: str, body: object, status: int, says: str
) -> None:
    """In OpenAI's shape, naming what is wrong; nothing of it reaches the cluster."""

    async def test(ask: Asker) -> None:
        got, code, message = await ask.refused(path, body)
        assert (got, says in message) == (status, True), message
        assert code
        if says != "empty":
            assert not ask.backend.requests

    run(test)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptError("too long"), 400, "invalid_prompt"),
        (QueueFull("many wait"), 429, "queue_full"),
        (RankLost("rank 1 on host 10.0.0.7 died"), 503, "rank_lost"),
        (ClusterError("the coordinator failed at 10.0.0.7"), 503, "cluster_error"),
        (ValueError("secret prompt of 10.0.0.7"), 503, "server_failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_cluster(error: Exception, status: int, code: str, stream: bool) -> None:
    """A stream that fails at once has a status too; hosts and stacks stay inside."""

    async def test(ask: Asker) -> None:
        ask.backend.error = error
        got = await ask.refused(COMPLETIONS, {"prompt": "a", "stream": stream})
        assert got[:2] == (status, code)
        assert "10.0.0.7" not in got[2]

    run(test)


def test_error_on_the_way_is_told_in_the_stream() -> None:
    """The status has gone out: the client must still learn that the answer is not whole."""

    async def test(ask: Asker) -> None:
        ask.backend.error, ask.backend.break_after = RankLost("rank 0 died"), 1
        told = chunks(await ask.post(COMPLETIONS, {"prompt": "abcd", "stream": True}))
        assert [choice["text"] for choice in told[0]["choices"]] == ["bc"]
        assert told[-1]["error"]["code"] == "rank_lost"

    run(test)


def test_keys_are_tenants() -> None:
    """No key, no entry; two keys never share a prefix, and neither can name another's."""
    keys = Settings(names=("m",), api_keys=("key-a", "key-b"))

    async def test(ask: Asker) -> None:
        for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic key-a"}):
            got = await ask.refused(COMPLETIONS, b"not even JSON", **header)
            assert got[:2] == (401, "invalid_api_key")
        assert (await ask.client.get("/v1/models")).status_code == 401
        assert (await ask.client.get("/health")).status_code == 200
        for key in ("key-a", "key-b", "key-a"):
            response = await ask.post(COMPLETIONS, {"prompt": "a"}, authorization=f"Bearer {key}")
            assert response.status_code == 200
        salts = [request.cache_salt for request in ask.backend.requests]
        assert salts[0] == salts[2] != salts[1]
        assert not any("key-a" in salt for salt in salts)
        named = {"prompt": "a", "cache_salt": salts[1]}
        got = await ask.refused(COMPLETIONS, named, authorization="Bearer key-a")
        assert got[0] == 400
        assert "cache_salt" in got[2]

    run(test, keys)
    assert "key-a" not in repr(keys)


def test_salt_is_free_without_keys() -> None:
    async def test(ask: Asker) -> None:
        await ask.post(COMPLETIONS, {"prompt": "a", "cache_salt": "tenant"})
        assert ask.backend.requests[0].cache_salt == "tenant"

    run(test)


@pytest.mark.parametrize("says_length", [True, False])
def test_large_body_is_refused_before_it_is_read(says_length: bool) -> None:
    """By its header, or, where that is missing, as soon as too much has come."""
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"x" * 100

    async def test(ask: Asker) -> None:
        headers = {"content-type": "application/json"}
        if says_length:
            headers["content-length"] = "100000"
        response = await ask.client.post(COMPLETIONS, content=body(), headers=headers)
        assert read_error(response)[:2] == (413, "body_too_large")
        assert sent < 20

    run(test, Settings(names=("m",), max_body_bytes=500))


def test_body_that_does_not_come_is_given_up() -> None:
    """A client that says nothing must not hold a place for ever."""

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def test(ask: Asker) -> None:
        headers = {"content-type": "application/json"}
        response = await ask.client.post(COMPLETIONS, content=body(), headers=headers)
        assert read_error(response)[:2] == (408, "body_timeout")

    run(test, Settings(names=("m",), body_timeout_s=0.05))


def test_too_many_at_once() -> None:
    """Refused at the door, and let in again when there is room."""

    async def test(ask: Asker) -> None:
        ask.backend.hold.clear()
        first = asyncio.create_task(ask.post(COMPLETIONS, {"prompt": "a"}))
        while not ask.backend.open:
            await asyncio.sleep(0)
        assert (await ask.refused(COMPLETIONS, {"prompt": ["a", "b"]}))[:2] == (
            429,
            "too_many_requests",
        )
        ask.backend.hold.set()
        assert (await first).status_code == 200
        assert (await ask.post(COMPLETIONS, {"prompt": ["a", "b"]})).status_code == 200

    run(test, Settings(names=("m",), max_requests=2))


def test_end_of_the_server() -> None:
    """Nobody comes in; who is inside may end, and who does not in time is told."""

    async def test(ask: Asker) -> None:
        ask.backend.hold.clear()
        inside = [
            asyncio.create_task(ask.post(COMPLETIONS, {"prompt": "a", "stream": stream}))
            for stream in (True, False)
        ]
        while len(ask.backend.open) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # beyond first_wait_s: the stream has begun
        gate = ask.app.state.gate
        assert not await gate.drain(0.01)
        assert (await ask.refused(COMPLETIONS, {"prompt": "a"}))[:2] == (503, "shutting_down")
        assert (await ask.client.get("/health")).status_code == 503
        gate.close()
        streamed, whole = await asyncio.gather(*inside)
        assert chunks(streamed)[-1]["error"]["code"] == "shutting_down"
        assert read_error(whole)[:2] == (503, "shutting_down")
        assert not ask.backend.open
        assert await gate.drain(60)

    run(test)


def test_signs_of_life_and_progress_while_a_prompt_is_prefilled() -> None:
    """Proxies cut silent connections, and a user wants to know how long it takes."""

    async def test(ask: Asker) -> None:
        ask.backend.hold.clear()
        body = {"prompt": "abc", "stream": True, "return_progress": True}
        asked = asyncio.create_task(ask.post(COMPLETIONS, body))
        await asyncio.sleep(0.2)
        ask.backend.hold.set()
        response = await asked
        assert ": keep-alive\n\n" in response.text
        told = [each["prompt_progress"] for each in chunks(response) if each["prompt_progress"]]
        assert {**told[0], "time_ms": 0} == {
            "total": 10,
            "cache": 2,
            "processed": 4,
            "time_ms": 0,
        }
        assert all(each["processed"] == each["total"] for each in told[1:])

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_vanishes_ends_its_request(stream: bool) -> None:
    """Nobody reads the answer: others get its place at once, also before a token."""

    async def test(ask: Asker) -> None:
        ask.backend.hold.clear()
        gone = asyncio.Event()
        body = json.dumps({"prompt": "abc", "stream": stream}).encode()
        inbox = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": COMPLETIONS,
            "raw_path": COMPLETIONS.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        served = asyncio.create_task(ask.app(scope, receive, send))
        while not ask.backend.open:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert ask.backend.open
        gone.set()
        await served
        assert not ask.backend.open
        assert await ask.app.state.gate.drain(60)

    run(test, replace(FAST, first_wait_s=50.0))


def test_health_is_of_the_cluster() -> None:
    """A server whose ranks are lost must not get requests."""

    async def test(ask: Asker) -> None:
        ask.backend.told["failure"] = "rank 1 on host 10.0.0.7 died"
        got = read_error(await ask.client.get("/health"))
        assert got[:2] == (503, "unhealthy")
        assert "10.0.0.7" not in got[2]

    run(test)


def test_metrics_have_the_names_that_dashboards_know() -> None:
    async def test(ask: Asker) -> None:
        await ask.post(COMPLETIONS, {"prompt": "abcd"})
        page = (await ask.client.get("/metrics")).text
        for line in (
            'ringspan:prompt_tokens_total{model_name="m"} 4.0',
            'ringspan:generation_tokens_total{model_name="m"} 4.0',
            'ringspan:prompt_tokens_cached_total{model_name="m"} 1.0',
            'ringspan:request_success_total{finished_reason="length",model_name="m"} 1.0',
            'ringspan:time_to_first_token_seconds_count{model_name="m"} 1.0',
            'ringspan:inter_token_latency_seconds_count{model_name="m"} 2.0',
            'ringspan:request_queue_time_seconds_sum{model_name="m"} 0.1',
            'ringspan:num_requests_running{model_name="m"} 3.0',
            'ringspan:num_requests_waiting{model_name="m"} 2.0',
            'ringspan:kv_cache_usage_perc{model_name="m"} 0.25',
            'ringspan:up{model_name="m"} 1.0',
            'ringspan:cp_choice_total{algorithm="pass_kv",model_name="m"} 1.0',
            f'ringspan:cp_ring_step_seconds_bucket{{{PASS_KV},le="0.2",{PREFILL}}} 0.0',
            f'ringspan:cp_ring_step_seconds_bucket{{{PASS_KV},le="0.5",{PREFILL}}} 1.0',
            f"ringspan:cp_ring_step_seconds_sum{{{PASS_KV},{PREFILL}}} 0.3",
            'ringspan:rank_part_seconds_total{model_name="m",part="wait",rank="0"} 0.1',
            'ringspan:iteration_tokens_total_sum{model_name="m"} 600.0',
            'ringspan:prefix_cache_queries_total{model_name="m"} 1000.0',
            'ringspan:prefix_cache_hits_total{model_name="m"} 600.0',
            'ringspan:cached_tokens_total{cache_source="device",model_name="m"} 88.0',
            'ringspan:cached_tokens_total{cache_source="disk",model_name="m"} 256.0',
            'ringspan:kv_restore_bytes_total{model_name="m",tier="host"} 4096.0',
            'ringspan:kv_restore_tokens_total{model_name="m",tier="host"} 256.0',
            'ringspan:kv_restore_recomputed_tokens_total{model_name="m"} 64.0',
            'ringspan:kv_restore_decision_total{decision="split",model_name="m"} 1.0',
            'ringspan:rank_heartbeat_age_seconds{model_name="m",rank="1"} 1.5',
            'ringspan:kv_store_used_bytes{host="0",model_name="m",tier="disk"} 7.0',
            'ringspan:kv_store_hits_total{host="0",model_name="m",tier="remote"} 4.0',
            'ringspan:kv_verify_failures_total{host="0",model_name="m",tier="host"} 2.0',
            'ringspan:request_prefill_time_seconds_sum{model_name="m"} 0.1',
        ):
            assert line in page, page
        assert "10.0.0.7" not in page

    run(test)


def test_models_and_schema() -> None:
    async def test(ask: Asker) -> None:
        told = (await ask.client.get("/v1/models")).json()["data"]
        assert [(each["id"], each["max_model_len"]) for each in told] == [("m", 1000)]
        schema = (await ask.client.get("/openapi.json")).json()
        assert {COMPLETIONS, CHAT, "/health"} <= schema["paths"].keys()

    run(test)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: (
        st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4)
    ),
    max_leaves=8,
)
NAMES = (
    "prompt messages model n stream stream_options seed stop temperature top_p top_k min_p"
    " logit_bias max_tokens max_completion_tokens min_tokens logprobs top_logprobs stop_token_ids"
    " bad_words ignore_eos cache_salt return_progress return_token_ids echo tools user"
    " presence_penalty frequency_penalty repetition_penalty"
)
LIKELY = {
    "prompt": "ab",
    "messages": [{"role": "user", "content": "ab"}],
    "n": 2,
    "stream": True,
    "logprobs": 1,
    "max_tokens": 3,
    "stop": ["x"],
    "seed": 1,
}
BODIES = st.dictionaries(st.sampled_from(NAMES.split()), ODD, max_size=5).flatmap(
    lambda odd: st.sets(st.sampled_from(sorted(LIKELY)), min_size=2).map(
        lambda names: {name: LIKELY[name] for name in names} | odd
    )
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from([COMPLETIONS, CHAT]), body=BODIES | ODD)
def test_no_body_makes_the_server_fail(path: str, body: object) -> None:
    """Whatever a client sends, it gets an answer or a sentence that says what is wrong."""

    async def test(ask: Asker) -> None:
        response = await ask.post(path, body)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            assert read_error(response)[1]
        elif isinstance(body, dict) and body.get("stream"):
            assert not any("error" in chunk for chunk in chunks(response))

    run(test)
