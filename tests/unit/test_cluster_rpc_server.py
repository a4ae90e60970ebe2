"""The gRPC server and `Client`, over a real connection; the cluster behind it is a fake one."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import Request
from cluster import (
    Client,
    ClusterError,
    LimitExceeded,
    PromptError,
    QueueFull,
    RankLost,
    RequestOutput,
    SamplingError,
    SamplingParams,
    ServerUnavailable,
    Unauthenticated,
    UnknownRequest,
)
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc import server as rpc_server
from cluster.rpc.errors import ERROR_KEY, PUSHBACK_KEY
from cluster.rpc.limits import RpcLimits
from cluster.rpc.server import SERVICE, RpcServer
from models.draw import answer_seed
from tests.rpc_backend import WAIT_S, FakeBackend, next_token, serve

LONG = SamplingParams(max_tokens=20, seed=3)
PROMPT: dict[str, Any] = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def target(backend: FakeBackend) -> Iterator[str]:
    with serve(backend) as (target, _, _):
        yield target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what must come; the limit is for what never does."""
    limit_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def expected(request: Request, index: int = 0) -> tuple[int, ...]:
    tokens: list[int] = []
    while len(tokens) < request.params.max_tokens:
        tokens.append(next_token(request, answer_seed(request.params.seed or 0, index), tokens))
    return tuple(tokens)


@pytest.mark.parametrize(
    "prompt",
    [
        "a text",
        {"prompt": "a text", "priority": -1, "deadline_s": 60},
        PROMPT,
        {"messages": [{"role": "user", "content": "Who?"}]},
    ],
)
def test_prompts_of_all_forms_arrive(backend: FakeBackend, client: Client, prompt: Any) -> None:
    """As `LLM` would hand them on, and their answers come back in one piece or in many."""
    params = SamplingParams(max_tokens=7, temperature=0.5, stop=["x"], seed=11, n=2)

    output = client.generate(prompt, params)[0]

    asked = backend.asked[0]
    assert asked.params == params
    given_prompt = asked.text or asked.messages
    if asked.token_ids is not None:
        given_prompt = asked.token_ids.tolist()
    form = next(iter(prompt.values())) if isinstance(prompt, dict) else prompt
    assert list(given_prompt or ()) == list(form)
    assert [each.token_ids for each in output.outputs] == [expected(asked, i) for i in range(2)]
    assert output.outputs[1].text == "".join(f"{i}," for i in expected(asked, 1))
    deltas = list(client.stream(prompt, params))
    for each in output.outputs:
        mine = [delta for delta in deltas if delta.index == each.index]
        assert sum((delta.token_ids for delta in mine), ()) == each.token_ids
        assert mine[-1].finish_reason == each.finish_reason == "length"


def test_asynchronous_calls_are_the_same(backend: FakeBackend, target: str) -> None:
    """Many at a time in one event loop, and in another one afterwards."""

    async def ask(client: Client) -> tuple[list[RequestOutput], list[int]]:
        asked = [{"prompt_token_ids": [i]} for i in range(20)]
        outputs = await asyncio.gather(*(client.agenerate(each, LONG) for each in asked))
        ids = [i async for delta in client.astream(asked[3], LONG) for i in delta.token_ids]
        await client.aclose()
        return outputs, ids

    with Client(target) as client:
        whole = client.generate([{"prompt_token_ids": [i]} for i in range(20)], LONG)
        for _ in range(2):
            outputs, ids = asyncio.run(ask(client))
            assert [each.outputs for each in outputs] == [each.outputs for each in whole]
            assert tuple(ids) == whole[3].outputs[0].token_ids


def test_a_million_token_ids(backend: FakeBackend, client: Client) -> None:
    """They go up in pieces, under the default limit of a message."""
    ids = np.arange(10**6, dtype=np.int32)
    client.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1))
    assert backend.asked[0].token_ids is not None
    np.testing.assert_array_equal(backend.asked[0].token_ids, ids)


def test_progress_and_cancel_by_the_callers_own_id(backend: FakeBackend, client: Client) -> None:
    """What the backend calls a request is no client's business."""
    backend.hold_at = 2
    stream = client.stream({**PROMPT, "request_id": "mine"}, LONG)
    next(stream)
    assert [each.request_id for each in client.progress()] == ["mine"]
    assert client.progress("mine")[0].done_tokens == 40
    with pytest.raises(PromptError, match="under way"):
        client.generate({**PROMPT, "request_id": "mine"}, LONG)

    client.cancel("mine")

    assert [delta.finish_reason for delta in stream][-1] == "abort"
    for call in (client.cancel, client.progress):
        with pytest.raises(UnknownRequest, match="mine"):
            call("mine")
    assert client.status() == {"requests": 0, "failure": None}


@pytest.mark.parametrize(
    "error",
    [PromptError("p"), SamplingError("s"), QueueFull("q"), RankLost("r"), UnknownRequest("u")],
)
def test_errors_of_the_cluster_arrive(
    backend: FakeBackend, client: Client, error: Exception
) -> None:
    """By class and sentence, whichever call meets them."""
    backend.error = error
    with pytest.raises(type(error), match=str(error)):
        client.generate(PROMPT)
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(client.agenerate(PROMPT))


def test_a_bug_behind_the_server_is_not_told(backend: FakeBackend, client: Client) -> None:
    """Neither its words nor where it is."""
    backend.error = KeyError("secret")
    with pytest.raises(ClusterError, match="log says why") as caught:
        client.generate(PROMPT)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", [3, {"prompt": "\ud800"}, {"prompt": "a", "request_id": "i" * 999}]
)
def test_what_is_no_prompt_is_named(client: Client, prompt: Any) -> None:
    """A client's slip is said in the words of `LLM`, on whichever side it is noticed."""
    with pytest.raises(PromptError):
        client.generate([prompt])


def test_one_prompt_that_fails_ends_the_others(backend: FakeBackend, client: Client) -> None:
    """As with `LLM.generate`: nobody will see their answers."""
    backend.hold_at = 0
    with pytest.raises(LimitExceeded):
        client.generate([PROMPT, {"prompt": "a" * 2**26}, PROMPT])
    until(lambda: not backend.running)


def test_whoever_stops_to_listen_frees_the_request(backend: FakeBackend, target: str) -> None:
    """In whatever way, before the first token or behind it; the backend alone would go on."""
    for hold_at in (0, 2):
        backend.hold_at = hold_at
        with Client(target) as client:
            calls = grpc.insecure_channel(target)
            call = calls.stream_stream(
                f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString
            )(iter([pb.GenerateRequest(options=pb.GenerateOptions(), text="a")]))
            asyncio.run(abandon(client))
            if hold_at:
                stream = client.stream(PROMPT, LONG)
                next(stream)
                stream.close()  # type: ignore[attr-defined]
            until(lambda: bool(backend.running))
            call.cancel()
            calls.close()
        until(lambda: not backend.running)


async def abandon(client: Client) -> None:
    task = asyncio.create_task(client.agenerate(PROMPT, LONG))
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await client.aclose()


def test_streams_have_a_limit(backend: FakeBackend) -> None:
    """Whoever comes then is told when to come again."""
    backend.hold_at = 1
    with (
        serve(backend, limits=RpcLimits(max_streams=1)) as (target, _, _),
        Client(target) as client,
    ):
        stream = client.stream(PROMPT, LONG)
        next(stream)
        with pytest.raises(QueueFull):
            client.generate(PROMPT)
        stream.close()  # type: ignore[attr-defined]
        until(lambda: not backend.running)
        backend.hold_at = None

        def has_place() -> bool:
            with contextlib.suppress(QueueFull):
                return bool(client.generate(PROMPT, LONG))
            return False

        until(has_place)


def test_an_upload_that_stalls_is_ended(backend: FakeBackend) -> None:
    """It would keep its place for ever."""
    with serve(backend, limits=RpcLimits(upload_timeout_s=0.05)) as (target, _, _):
        status = ask_raw(target, "Generate", [], closes=False)
    assert status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def ask_raw(
    target: str, method: str, messages: list[bytes], *, closes: bool = True
) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Send these bytes as messages; return the status and what is beside it."""

    def sent() -> Iterator[bytes]:
        yield from messages
        if not closes:
            ended.wait(WAIT_S)

    ended = threading.Event()
    with grpc.insecure_channel(target) as channel:
        path = f"/{SERVICE}/{method}"
        call = channel.stream_stream(path)(sent(), timeout=WAIT_S)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        ended.set()
        return call.code(), dict(call.trailing_metadata() or ())


def test_a_message_that_is_too_large(target: str) -> None:
    """It is refused before it is read."""
    code, _ = ask_raw(target, "Generate", [bytes(5 * 2**20)])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_keys_and_tenants(backend: FakeBackend) -> None:
    """Without its key nothing is told; with another one's, nothing of its requests."""
    backend.hold_at = 1
    keys = ("key-a", "key-b")
    with serve(backend, api_keys=keys) as (target, _, _):
        for wrong in (None, "key-c"):
            with Client(target, api_key=wrong) as stranger:
                for call in (stranger.status, stranger.progress, lambda: stranger.generate("a")):
                    with pytest.raises(Unauthenticated):
                        call()
        with Client(target, api_key="key-a") as a, Client(target, api_key="key-b") as b:
            prompt = {**PROMPT, "request_id": "one", "cache_salt": "salt"}
            streams = [client.stream(prompt, LONG) for client in (a, b)]
            for stream in streams:
                next(stream)
            salts = {request.cache_salt for request in backend.asked}
            assert len(salts) == 2
            assert not any(key in salt for salt in salts for key in keys)
            assert [len(client.progress()) for client in (a, b)] == [1, 1]
            a.cancel("one")
            assert [delta.finish_reason for delta in streams[0]] == ["abort"]
            assert len(backend.running) == 1
            with pytest.raises(UnknownRequest):
                a.cancel("one")
            b.cancel("one")
            assert [delta.finish_reason for delta in streams[1]] == ["abort"]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_stream_that_breaks_is_taken_up(backend: FakeBackend, is_told: bool) -> None:
    """By another server on the same address, which knows nothing of it."""
    params = SamplingParams(max_tokens=20, temperature=0.9, presence_penalty=1.0, stop=["zz"], n=2)
    backend.hold_at = 5
    with serve(backend) as (target, server, thread), Client(target) as client:
        stream = client.stream(PROMPT, params)
        deltas = [next(stream) for _ in range(5)]
        thread.run(server.stop(0.0) if is_told else server._server.stop(None))
        other = FakeBackend()
        second = RpcServer(other, port=int(target.rpartition(":")[2]))
        thread.run(second.start())
        deltas += stream
        thread.run(second.stop(0.0))

    first = backend.asked[0]
    for index in range(2):
        tokens = sum((delta.token_ids for delta in deltas if delta.index == index), ())
        assert tokens == expected(first, index)
    assert other.asked[0].answer_ids == expected(first)[:5]
    assert not backend.running


def test_another_try_replaces_what_is_left_of_the_first(
    backend: FakeBackend, target: str, client: Client
) -> None:
    """A client may know of a break before the server does."""
    backend.hold_at = 1
    stream = client.stream({**PROMPT, "request_id": "mine"}, LONG)
    next(stream)
    backend.hold_at = None
    options = pb.GenerateOptions(request_id="mine", attempt=1)
    message = pb.GenerateRequest(options=options, token_ids=pb.TokenIds(ids=[5, 6, 7]))

    code, _ = ask_raw(target, "Generate", [message.SerializeToString()])

    assert code is grpc.StatusCode.OK
    until(lambda: not backend.running)
    stream.close()  # type: ignore[attr-defined]


def test_streams_are_told_that_the_server_stops(backend: FakeBackend) -> None:
    """What ends within the grace time ends well; the others may be taken up elsewhere."""
    backend.hold_at = 1
    message = pb.GenerateRequest(options=pb.GenerateOptions(), text="a")
    with serve(backend) as (target, server, thread), grpc.insecure_channel(target) as channel:
        generate = channel.stream_stream(
            f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString
        )
        calls = [generate(iter([message])) for _ in range(5)]
        until(lambda: len(backend.running) == 5)
        thread.run(server.stop(0.2))
        for call in calls:
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() is grpc.StatusCode.UNAVAILABLE
            told = dict(call.trailing_metadata())
            assert told[ERROR_KEY] == "ServerUnavailable"
            assert int(told[PUSHBACK_KEY]) > 0
    assert not backend.running


def test_no_server_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the address, after a few tries."""
    monkeypatch.setattr("cluster.rpc.resume.MAX_TRIES", 2)
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
            client.generate(PROMPT)
        with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
            client.status()
    with pytest.raises(ClusterError, match="closed"):
        client.generate(PROMPT)
    with pytest.raises(ClusterError, match="closed"):
        client.status()


def test_a_port_in_use_is_one_sentence(backend: FakeBackend) -> None:
    """Two servers on one port would share its calls in silence."""
    with serve(backend) as (target, _, thread):
        port = int(target.rpartition(":")[2])
        with pytest.raises(ClusterError, match=f"{port}.*in use"):
            thread.run(RpcServer(backend, port=port).start())


def test_health_follows_the_cluster(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """True under load, false once a rank is lost; nobody needs a key for it."""
    monkeypatch.setattr(rpc_server, "HEALTH_S", 0.01)
    with (
        serve(backend, api_keys=("key",)) as (target, _, _),
        grpc.insecure_channel(target) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        def told(service: str) -> int:
            asked = health_pb2.HealthCheckRequest(service=service)
            status: int = stub.Check(asked, timeout=WAIT_S).status
            return status

        for service in ("", SERVICE):
            assert told(service) == health_pb2.HealthCheckResponse.SERVING
        backend.failure = "rank 1 was lost"
        for service in ("", SERVICE):
            until(lambda: told(service) == health_pb2.HealthCheckResponse.NOT_SERVING)  # noqa: B023


def test_reflection_is_enough_to_call(backend: FakeBackend, target: str) -> None:
    """A tool that has never seen the proto asks the server for it."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE).methods_by_name["Generate"]
        asked = message_factory.GetMessageClass(method.input_type)
        told = message_factory.GetMessageClass(method.output_type)
        message = asked(options={"sampling": {"max_tokens": 4}}, token_ids={"ids": [5, 6, 7]})
        call = channel.stream_stream(
            f"/{SERVICE}/Generate",
            request_serializer=asked.SerializeToString,
            response_deserializer=told.FromString,
        )
        responses = list(call(iter([message]), timeout=WAIT_S))
    tokens = [i for response in responses for i in response.delta.token_ids]
    assert tuple(tokens) == expected(backend.asked[0])
    assert responses[-1].done.completion_tokens == 4
    assert responses[-1].done.prompt_tokens == 3
    assert responses[0].started.request_id


def any_message(kind: Any) -> st.SearchStrategy[Any]:
    """Messages of a kind, every field drawn from all that its type can have."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            fields[field.name] = st.dictionaries(st.integers(-9, 600), st.floats(), max_size=3)
            continue
        values = any_value(field)
        fields[field.name] = st.lists(values, max_size=4) if field.is_repeated else values
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


def any_value(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return any_message(message_factory.GetMessageClass(field.message_type))
    edges = {
        field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT32: (0, 2**32 - 1),
        field.CPPTYPE_UINT64: (0, 2**64 - 1),
    }
    if field.cpp_type in edges:
        low, high = edges[field.cpp_type]
        return st.integers(max(low, -2), 40) | st.integers(low, high)
    if field.cpp_type == field.CPPTYPE_DOUBLE:
        return st.sampled_from([0.0, 0.5, 1.0]) | st.floats()
    if field.cpp_type == field.CPPTYPE_BOOL:
        return st.booleans()
    assert field.cpp_type == field.CPPTYPE_STRING
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


CALLS = {
    "Generate": pb.GenerateRequest,
    "Cancel": pb.CancelRequest,
    "Progress": pb.ProgressRequest,
    "Status": pb.StatusRequest,
}
NAMED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
SENT = st.sampled_from(sorted(CALLS)).flatmap(
    lambda method: st.tuples(
        st.just(method),
        st.lists(
            any_message(CALLS[method]).map(lambda message: message.SerializeToString())
            | st.binary(max_size=20),
            min_size=int(method != "Generate"),
            max_size=4 if method == "Generate" else 1,
        ),
    )
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[str]:
    with serve(FakeBackend()) as (target, _, _):
        yield target


def check_named(target: str, sent: tuple[str, list[bytes]]) -> None:
    method, messages = sent
    code, _ = ask_raw(target, method, messages)
    assert code.name in NAMED, f"{method} of {messages}"


@settings(max_examples=400, deadline=None)
@given(SENT)
def test_nothing_that_is_sent_makes_an_internal_error(
    fuzzed: str, sent: tuple[str, list[bytes]]
) -> None:
    """Neither random messages nor random bytes: all errors are the client's, and named."""
    check_named(fuzzed, sent)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None)
@given(SENT)
def test_nothing_that_is_sent_makes_an_internal_error_campaign(
    fuzzed: str, sent: tuple[str, list[bytes]]
) -> None:
    """See above."""
    check_named(fuzzed, sent)


def test_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    """Where the compiler is installed; `make proto` brings it."""
    protoc = pytest.importorskip("grpc_tools.protoc")
    source = "cluster/rpc/ringspan_v1.proto"
    root = Path(__file__).parents[2]
    assert protoc.main(["protoc", f"-I{root}", f"--python_out={tmp_path}", source]) == 0
    made = tmp_path / "cluster/rpc/ringspan_v1_pb2.py"
    assert made.read_text() == (root / "cluster/rpc/ringspan_v1_pb2.py").read_text()


def test_status_is_json(target: str) -> None:
    """For those who read the answer without this client."""
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/Status", response_deserializer=pb.StatusResponse.FromString
        )
        assert json.loads(call(b"", timeout=WAIT_S).json)["failure"] is None
