"""Messages that no client of ours would send, at a real gRPC server.

Made from the service's own description, and raw bytes. Every call ends, and by a status that says
what was wrong: INTERNAL and UNKNOWN are bugs.
"""

import string
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import hypothesis
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.limits import RpcLimits
from tests.rpc_backend import FakeBackend, serve

CAMPAIGN_CASES = 10_000
EVERYDAY_CASES = 300
CALL_S = 20.0
SERVICE = "/ringspan.v1.Inference/"
UNARY = {
    "Cancel": pb.CancelRequest,
    "Progress": pb.ProgressRequest,
    "Status": pb.StatusRequest,
}
TOLD = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,  # another try has taken over
}
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def values(field: Any) -> st.SearchStrategy[Any]:
    """Return what one entry of a field may be: small and sensible, or anything of its type."""
    kind = field.cpp_type
    if kind in INTEGERS:
        low, high = INTEGERS[kind]
        return st.integers(0, 40) | st.integers(low, high)
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        width = 64 if kind == FieldDescriptor.CPPTYPE_DOUBLE else 32
        return st.floats(0, 1, width=width) | st.floats(width=width)  # type: ignore[arg-type]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, 8)
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def messages(draw: st.DrawFn, kind: Any) -> Any:
    """Draw a message of a kind: any of its fields, and what its maps and lists may hold."""
    message = kind._concrete_class()
    fields = list(kind.fields)
    chosen = draw(st.lists(st.sampled_from(fields), unique=True, max_size=6)) if fields else []
    for field in chosen:
        target = getattr(message, field.name)
        if field.is_repeated and _is_map(field):
            key, value = field.message_type.fields
            pairs = st.dictionaries(values(key), values(value), max_size=4)
            for name, entry in draw(pairs).items():
                if value.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                    target[name].CopyFrom(entry)
                else:
                    target[name] = entry
        elif field.is_repeated:
            target.extend(draw(st.lists(values(field), max_size=5)))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            target.CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


def _is_map(field: Any) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def wire(kind: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a message, with some of them cut off or changed, or bytes of nothing."""
    whole = messages(kind).map(lambda message: message.SerializeToString())
    cut = st.tuples(whole, st.integers(0, 64)).map(lambda each: each[0][: each[1]])
    followed = st.tuples(whole, st.binary(max_size=8)).map(b"".join)
    return whole | whole | cut | followed | st.binary(max_size=64)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Draw the messages of a call that may well be answered: options that mostly are in range."""
    kind = pb.GenerateOptions.DESCRIPTOR.fields_by_name["sampling"].message_type
    params = draw(messages(kind)) if draw(st.booleans()) else pb.SamplingParams()
    params.n = draw(st.integers(1, 3))
    options = pb.GenerateOptions(
        request_id=draw(st.text(string.ascii_letters, max_size=4)),
        sampling=params,
        priority=draw(st.integers(-3, 3)),
    )
    sent = [pb.GenerateRequest(options=options)]
    piece = draw(st.sampled_from(["text", "ids", "chat"]))
    for _ in range(draw(st.integers(1, 3))):
        message = pb.GenerateRequest()
        if piece == "text":
            message.text = draw(st.text(string.printable, min_size=1, max_size=9))
        elif piece == "ids":
            message.token_ids.ids.extend(draw(st.lists(st.integers(0, 99), min_size=1)))
        else:
            message.chat.role, message.chat.content = "user", draw(st.text(max_size=9))
        sent.append(message)
    return [message.SerializeToString() for message in sent]


CALLS = st.one_of(
    st.tuples(st.just("Generate"), streams()),
    st.tuples(
        st.just("Generate"), st.lists(wire(pb.GenerateRequest.DESCRIPTOR), min_size=0, max_size=4)
    ),
    *(
        st.tuples(st.just(name), st.lists(wire(kind.DESCRIPTOR), min_size=1, max_size=1))
        for name, kind in UNARY.items()
    ),
)


@pytest.fixture
def call() -> Iterator[Callable[[str, list[bytes]], grpc.StatusCode]]:
    """Give what makes a call of raw messages, and returns its status."""
    backend = FakeBackend()
    with (
        serve(backend, limits=RpcLimits(upload_timeout_s=5.0)) as (address, _, _),
        grpc.insecure_channel(address) as channel,
    ):

        def send(method: str, sent: list[bytes]) -> grpc.StatusCode:
            told, details = grpc.StatusCode.OK, ""
            try:
                if method == "Generate":
                    for _ in channel.stream_stream(SERVICE + method)(iter(sent), timeout=CALL_S):
                        pass
                else:
                    channel.unary_unary(SERVICE + method)(sent[0], timeout=CALL_S)
            except grpc.RpcError as error:
                told, details = error.code(), error.details()
            assert told in TOLD, f"{method}: {told}: {details}"
            return told

        yield send
        assert not backend.running


def fuzz(call: Callable[[str, list[bytes]], grpc.StatusCode], cases: int) -> dict[str, int]:
    """Make so many calls; return how many had which status."""
    told: dict[str, int] = {}

    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(asked=CALLS)
    def send(asked: tuple[str, list[bytes]]) -> None:
        name = f"{asked[0]} {call(*asked).name}"
        told[name] = told.get(name, 0) + 1

    send()
    return told


def test_no_message_breaks_the_server(
    call: Callable[[str, list[bytes]], grpc.StatusCode],
) -> None:
    assert fuzz(call, EVERYDAY_CASES)["Generate OK"] > 10


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_ten_thousand_calls(call: Callable[[str, list[bytes]], grpc.StatusCode]) -> None:
    told = fuzz(call, CAMPAIGN_CASES)
    print(f"\n{sum(told.values())} calls: {told}")
