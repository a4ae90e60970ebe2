"""What vLLM's users expect beside OpenAI's paths: cancel, tokens, times, ids of requests."""

import asyncio
import json
from typing import Any

import pytest

from actors.errors import ClusterError
from cluster.http.settings import Settings
from cluster.metered import MeteredBackend
from tests.fake_backend import FakeBackend
from tests.http_asker import CHAT, COMPLETIONS, HI, Asker, chunks, run

KEYS = Settings(names=("m",), api_keys=("key-a", "key-b"), first_wait_s=0.01, keep_alive_s=0.01)


async def begin_stream(ask: Asker, **headers: str) -> tuple[asyncio.Task[Any], str]:
    """Begin an answer that does not go on by itself; return its task and the id it tells."""
    ask.backend.hold.clear()
    body = {**HI, "stream": True}
    task = asyncio.create_task(ask.post(CHAT, body, **headers))
    while not ask.backend.open:
        await asyncio.sleep(0)
    return task, next(iter(ask.backend.open)).rsplit("-", 1)[0]


def test_cancel_ends_an_answer_with_what_it_has() -> None:
    async def test(ask: Asker) -> None:
        stream, answer_id = await begin_stream(ask)
        response = await ask.post(f"/v1/cancel/{answer_id}", b"")
        assert (response.status_code, response.json()) == (
            200,
            {"id": answer_id, "cancelled": True},
        )
        told = chunks(await stream)
        assert told[0]["id"] == answer_id
        assert told[-1]["choices"][0]["finish_reason"] == "abort"
        # It has ended: there is nothing left to cancel.
        assert (await ask.refused(f"/v1/cancel/{answer_id}", b""))[:2] == (404, "not_found")

    run(test)


def test_another_key_cannot_cancel() -> None:
    """A foreign id and one that never was are told the same."""

    async def test(ask: Asker) -> None:
        stream, answer_id = await begin_stream(ask, authorization="Bearer key-a")
        other = {"authorization": "Bearer key-b"}
        foreign = await ask.refused(f"/v1/cancel/{answer_id}", b"", **other)
        missing = await ask.refused("/v1/cancel/cmpl-0", b"", **other)
        assert foreign[0] == missing[0] == 404
        assert foreign[2].replace(answer_id, "") == missing[2].replace("cmpl-0", "")
        assert (await ask.refused(f"/v1/cancel/{answer_id}", b""))[0] == 401
        assert not ask.backend.cancelled
        ask.backend.hold.set()
        assert chunks(await stream)[-1]["choices"][0]["finish_reason"] == "length"

    run(test, KEYS)


def test_cancel_works_where_all_places_are_taken() -> None:
    async def test(ask: Asker) -> None:
        stream, answer_id = await begin_stream(ask)
        assert (await ask.refused(COMPLETIONS, {"prompt": "a"}))[0] == 429
        assert (await ask.post(f"/v1/cancel/{answer_id}", b"")).status_code == 200
        await stream

    run(test, Settings(names=("m",), max_requests=1, first_wait_s=0.01))


def test_tokens_there_and_back() -> None:
    """In vLLM's shapes."""

    async def test(ask: Asker) -> None:
        told = (await ask.post("/tokenize", {"prompt": "ab", "return_token_strs": True})).json()
        assert told == {
            "count": 2,
            "max_model_len": 1000,
            "tokens": [97, 98],
            "token_strs": ["a", "b"],
        }
        assert (await ask.post("/tokenize", HI)).json()["tokens"] == [104, 105]
        back = await ask.post("/detokenize", {"tokens": told["tokens"]})
        assert back.json() == {"prompt": "ab"}

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", **HI}, "either prompt or messages"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {**HI, "chat_template": "{{ 1 }}"}, "chat_template is not supported"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
        ("/detokenize", {"tokens": "a"}, "list"),
        (CHAT, {**HI, "chat_template": "{{ 1 }}"}, "chat_template is not supported"),
        (CHAT, {**HI, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is not supported"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "stream: false only"),
        (
            COMPLETIONS,
            {"prompt": "a", "stream": True, "echo": True, "logprobs": 1},
            "stream: false only",
        ),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": -2}, "prompt_logprobs must be"),
        (COMPLETIONS, {"prompt": "a", "deadline_s": 0}, "deadline_s"),
        (COMPLETIONS, {"prompt": "a", "deadline_s": 1e300}, "deadline_s"),
        (COMPLETIONS, {"prompt": "a", "priority": 1.5}, "priority"),
    ],
)
def test_what_cannot_be_is_refused(path: str, body: object, says: str) -> None:
    """No client brings a template of its own: it would be a program of theirs."""

    async def test(ask: Asker) -> None:
        status, _, message = await ask.refused(path, body)
        assert (status, says in message) == (400, True), message

    run(test)


def test_prompt_comes_before_its_answer() -> None:
    """With log-probabilities of both, as harnesses that score texts read them."""
    body = {"prompt": ["ab", "x"], "echo": True, "n": 2}

    async def test(ask: Asker) -> None:
        whole = (await ask.post(COMPLETIONS, body | {"logprobs": 1})).json()["choices"]
        assert [choice["text"] for choice in whole] == ["abbc", "abcd", "xy", "xz"]
        assert whole[0]["logprobs"] == {
            "tokens": ["a", "b", "b", "c"],
            "token_logprobs": [None, -1.5, -1.5, -1.5],
            "top_logprobs": [None, *({t: -1.5, chr(ord(t) + 1): -0.5} for t in "bbc")],
            "text_offset": [0, 1, 2, 3],
        }
        ids = (await ask.post(COMPLETIONS, {"prompt": [120], "echo": True})).json()
        assert ids["choices"][0]["text"] == "xy"
        told = chunks(await ask.post(COMPLETIONS, body | {"stream": True}))
        for index, choice in enumerate(whole):
            own = [c["text"] for t in told for c in t["choices"] if c["index"] == index]
            assert "".join(own) == choice["text"]

    run(test)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs_and_ids(path: str) -> None:
    """vLLM's: in each choice of a completion, beside the choices of a chat."""
    body = {"prompt": "hi"} if path == COMPLETIONS else HI
    asked = {"prompt_logprobs": 1, "return_token_ids": True}

    async def test(ask: Asker) -> None:
        told = (await ask.post(path, body | asked)).json()
        told = told["choices"][0] if path == COMPLETIONS else told
        assert told["prompt_token_ids"] == [104, 105]
        first, second = told["prompt_logprobs"]
        assert first is None
        assert second["105"] == {"logprob": -1.5, "rank": 2, "decoded_token": "i"}
        assert second["106"]["rank"] == 1
        plain = (await ask.post(path, body)).json()
        plain = plain["choices"][0] if path == COMPLETIONS else plain
        assert plain["prompt_logprobs"] is plain["prompt_token_ids"] is None

    run(test)


def test_priority_and_deadline_reach_the_cluster() -> None:
    async def test(ask: Asker) -> None:
        await ask.post(COMPLETIONS, {"prompt": "a", "priority": -3, "deadline_s": 2.5})
        asked = ask.backend.requests[0]
        assert (asked.priority, asked.deadline_s) == (-3, 2.5)

    run(test)


def test_times_of_an_answer() -> None:
    """Whole, and in a stream's last chunk, with usage or without."""
    times = {
        "time_to_first_token_ms": pytest.approx(200),
        "queue_time_ms": pytest.approx(100),
        "generation_time_ms": pytest.approx(100),
        "mean_itl_ms": pytest.approx(100 / 3),
        "tokens_per_second": pytest.approx(40),
    }
    body = {"prompt": "abcd", "include_metrics": True}

    async def test(ask: Asker) -> None:
        assert (await ask.post(COMPLETIONS, body)).json()["metrics"] == times
        plain = (await ask.post(COMPLETIONS, {"prompt": "abcd"})).json()
        assert plain["metrics"] is None
        told = chunks(await ask.post(COMPLETIONS, body | {"stream": True}))
        assert (told[-1]["metrics"], told[-1]["usage"]) == (times, None)
        assert all(each["metrics"] is None for each in told[:-1])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        last = chunks(await ask.post(COMPLETIONS, body | options))[-1]
        assert last["metrics"] == times
        assert last["usage"]["total_tokens"] == 8

    run(test)


def test_one_token_has_no_time_between_tokens() -> None:
    async def test(ask: Asker) -> None:
        body = {"prompt": "a", "include_metrics": True}
        assert (await ask.post(COMPLETIONS, body)).json()["metrics"]["mean_itl_ms"] is None

    run(test)


def test_request_id_comes_back_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also with an error; where none is sent, each answer has one of ours."""

    async def test(ask: Asker) -> None:
        given = await ask.post(COMPLETIONS, {"prompt": "a"}, x_request_id="my-id/7")
        assert given.headers["x-request-id"] == "my-id/7"
        ask.backend.error = ClusterError("broken")
        failed = await ask.post(COMPLETIONS, {"prompt": "a"}, x_request_id="my-id/8")
        assert (failed.status_code, failed.headers["x-request-id"]) == (503, "my-id/8")
        assert "my-id/8" in caplog.text
        made = [(await ask.client.get("/version")).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]

    run(test)


@pytest.mark.parametrize("wrong", ["", "a b", "a" * 129, "\x7f"])
def test_wrong_request_id_is_refused(wrong: str) -> None:
    """It goes into logs and headers: no line breaks, no megabytes."""

    async def test(ask: Asker) -> None:
        response = await ask.post(COMPLETIONS, {"prompt": "a"}, x_request_id=wrong)
        assert response.status_code == 400
        assert response.headers["x-request-id"] != wrong
        assert "X-Request-Id" in json.loads(response.content)["error"]["message"]

    run(test)


def test_models_by_name_and_probes() -> None:
    """A name may have a slash; probes need no key."""

    async def test(ask: Asker) -> None:
        key = {"authorization": "Bearer k"}
        told = (await ask.client.get("/v1/models/team/m", headers=key)).json()
        assert (told["id"], told["object"]) == ("team/m", "model")
        missing = await ask.client.get("/v1/models/other", headers=key)
        assert missing.json()["error"]["code"] == "model_not_found"
        assert (await ask.client.get("/v1/models/team/m")).status_code == 401
        for path in ("/ping", "/health", "/version", "/metrics"):
            assert (await ask.client.get(path)).status_code == 200

    run(test, Settings(names=("m", "team/m"), api_keys=("k",)))


def test_every_door_counts_in_the_same_metrics() -> None:
    """A server's other door uses the same metered backend; what is left early is counted so."""

    async def go() -> None:
        backend = FakeBackend()
        metered = MeteredBackend(backend, "m")
        ask = Asker(backend, metered)
        await ask.post(COMPLETIONS, {"prompt": "abcd"})
        request = backend.requests[0]
        async for _ in metered.stream(request):
            pass
        left = metered.stream(request)
        await anext(aiter(left))
        await left.aclose()  # type: ignore[attr-defined]
        page = (await ask.client.get("/metrics")).text
        for line in (
            'ringspan:generation_tokens_total{model_name="m"} 10.0',
            'ringspan:e2e_request_latency_seconds_count{model_name="m"} 2.0',
            'ringspan:num_aborted_requests_total{model_name="m"} 1.0',
        ):
            assert line in page
        assert not backend.open

    asyncio.run(go())
