"""Requests, deltas and errors come out of gRPC messages as they went in."""

import dataclasses
import itertools
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from actors.errors import ClusterError, QueueFull, RankLost, StepFailed, UnknownRequest
from actors.messages import Request, RequestDelta, StepReport
from cluster.api_keys import ApiKeys, Unauthenticated
from cluster.rpc import reports
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import (
    LimitExceeded,
    ServerUnavailable,
    error_of,
    is_broken,
    retry_s,
    status_of,
)
from cluster.rpc.limits import MAX_MESSAGE_BYTES, RpcLimits
from cluster.rpc.upload import RequestReader, write_request
from cluster.rpc.wire import read_delta, read_params, write_delta, write_params
from models.errors import PromptError, RingspanError, SamplingError
from models.sampling import SamplingParams
from tests.rpc_backend import METRICS, RESTORED, STEP, place, prompt_report

WORDS = st.lists(st.text(min_size=1, max_size=5), max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 9),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 9),
    "temperature": st.floats(0.1, 9),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 2**40),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "stop": WORDS,
    "stop_token_ids": st.lists(st.integers(0, 2**40), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(100, 2**40),
    "min_tokens": st.integers(0, 100),
    "logprobs": st.integers(-1, 9) | st.none(),
    "prompt_logprobs": st.integers(-1, 9) | st.none(),
    "logit_bias": st.dictionaries(st.integers(0, 2**40), st.floats(-100, 100), max_size=3),
    "bad_words": WORDS,
    "skip_special_tokens": st.booleans(),
}


def read(messages: list[pb.GenerateRequest], **limits: Any) -> Request:
    reader = RequestReader(RpcLimits(**limits))
    for message in messages:
        sent = message.SerializeToString()
        assert len(sent) < MAX_MESSAGE_BYTES
        reader.take(pb.GenerateRequest.FromString(sent))
    return reader.finish()[0]


def token_request(tokens: int, **options: Any) -> Request:
    return Request(request_id="a", token_ids=np.arange(tokens, dtype=np.int32), **options)


def test_every_sampling_parameter_has_a_test() -> None:
    """A parameter that is added must be sent too."""
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    assert FIELDS.keys() == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_sampling_parameters_survive(given_params: dict[str, Any]) -> None:
    """To the last bit of a number, whether it is given or has its default."""
    try:
        params = SamplingParams(**given_params)
    except SamplingError:
        reject()  # parameters that do not go together
    assert read_params(pb.SamplingParams.FromString(write_params(params).SerializeToString())) == (
        params
    )


def test_what_is_not_set_has_its_default() -> None:
    """The proto's zero is not the default of most parameters."""
    assert read_params(pb.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize("params", [{"seed": 2**63}, {"stop": ["\ud800"]}, {"top_k": 2**70}])
def test_what_cannot_be_sent_is_named(params: dict[str, Any]) -> None:
    """Before any byte is."""
    with pytest.raises(SamplingError, match=next(iter(params))):
        write_params(SamplingParams(**params))


def test_a_million_token_ids_fit() -> None:
    """Under gRPC's default message limit, in pieces; the largest ids too."""
    request = token_request(10**6, cache_salt="salt", priority=-3, deadline_s=1.5)
    assert request.token_ids is not None
    request.token_ids[::2] += 2**31 - 10**6

    got = read(write_request(request))

    assert got.token_ids is not None
    np.testing.assert_array_equal(got.token_ids, request.token_ids)
    assert dataclasses.replace(got, token_ids=None) == dataclasses.replace(request, token_ids=None)


def test_long_texts_are_cut_between_characters() -> None:
    """A piece of four-byte characters must be UTF-8 by itself."""
    text = "a😀é" * 300_000
    assert read(write_request(Request(request_id="a", text=text))).text == text
    chat = ({"role": "system", "content": ""}, {"role": "user", "content": text})
    assert read(write_request(Request(request_id="a", messages=chat))).messages == chat


def test_the_answer_so_far_is_sent() -> None:
    """It may be long."""
    request = token_request(3, answer_ids=tuple(range(100_000)))
    assert read(write_request(request)).answer_ids == request.answer_ids


@pytest.mark.parametrize(
    ("limits", "request_"),
    [
        ({"max_prompt_tokens": 9}, token_request(10)),
        ({"max_prompt_tokens": 9}, token_request(5, answer_ids=(1,) * 5)),
        ({"max_prompt_bytes": 9}, Request(request_id="a", text="é" * 5)),
        (
            {"max_chat_messages": 1},
            Request(request_id="a", messages=({"role": "user", "content": ""},) * 2),
        ),
    ],
)
def test_what_is_too_large_is_refused(limits: dict[str, int], request_: Request) -> None:
    """While it comes, not when all of it is there."""
    with pytest.raises(LimitExceeded, match="more"):
        read(write_request(request_), **limits)


OPTIONS = pb.GenerateRequest(options=pb.GenerateOptions())
TEXT = pb.GenerateRequest(text="a")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([OPTIONS], "empty"),
        ([TEXT], "first message"),
        ([OPTIONS, OPTIONS, TEXT], "only the first"),
        ([OPTIONS, TEXT, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]))], "one form"),
        ([OPTIONS, pb.GenerateRequest(chat=pb.ChatPiece(continues=True))], "continue"),
        ([pb.GenerateRequest(options=pb.GenerateOptions(request_id="a" * 300)), TEXT], "request_"),
        ([pb.GenerateRequest(options=pb.GenerateOptions(deadline_s=np.nan)), TEXT], "deadline_s"),
    ],
)
def test_wrong_orders_are_named(messages: list[pb.GenerateRequest], words: str) -> None:
    """Other languages' clients are written by this sentence."""
    with pytest.raises(PromptError, match=words):
        read(messages)


@pytest.mark.parametrize(
    "params",
    [
        {"n": 65},
        {"prompt_logprobs": 0},
        {"stop": [f"{i}" for i in range(1025)]},
    ],
)
def test_parameters_beyond_a_limit_are_refused(params: dict[str, Any]) -> None:
    """Each of n answers takes memory before any queue is asked."""
    request = Request(request_id="a", text="a", params=SamplingParams(**params))
    with pytest.raises(SamplingError, match=next(iter(params))):
        read(write_request(request))


@pytest.mark.parametrize("content", [None, ["part"], 3])
def test_a_chat_is_of_texts(content: Any) -> None:
    """What else a message may be elsewhere is not sent as something else."""
    with pytest.raises(PromptError, match="role and a content"):
        write_request(Request(request_id="a", messages=({"role": "user", "content": content},)))


@pytest.mark.parametrize("stop_reason", [None, 0, 7, "", "end"])
def test_deltas_survive(stop_reason: int | str | None) -> None:
    """A stop token 0 is not the same as none."""
    delta = RequestDelta(
        request_id="a",
        index=2,
        text="é",
        token_ids=(5, 0),
        finish_reason="stop",
        stop_reason=stop_reason,
        logprobs=(place(5, 2), place(0, 0)),
        prompt_tokens=9,
        num_cached_tokens=4,
        metrics=METRICS,
    )
    for each in (delta, dataclasses.replace(delta, finish_reason=None, metrics=None)):
        sent = write_delta(each).SerializeToString()
        assert read_delta(pb.Delta.FromString(sent), "a", with_logprobs=True) == each


def test_reports_survive_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces; what is empty stays empty, and the first place has none."""
    monkeypatch.setattr(reports, "PIECE_ENTRIES", 7)
    monkeypatch.setattr(reports, "PIECE_IDS", 4)
    monkeypatch.setattr(reports, "PIECE_STEPS", 2)
    bare = RequestDelta(request_id="a", index=0, text="", token_ids=(1,))
    restores = (None, RESTORED, dataclasses.replace(RESTORED, simulated_link_bytes_per_s=0.0))
    for count, ids, restored, steps in itertools.product(
        (None, 0, 3), (False, True), restores, (0, 5)
    ):
        request = Request(
            request_id="a",
            text=None if ids else "text",
            token_ids=np.arange(9, dtype=np.int32) if ids else None,
            params=SamplingParams(prompt_logprobs=count),
        )
        report = StepReport(steps=(STEP,) * steps, restored=restored)
        delta = dataclasses.replace(bare, prompt=prompt_report(request), report=report)
        reader = reports.ReportReader(request.token_ids)
        for piece in reports.write_reports(delta, with_ids=request.token_ids is None):
            reader.take(pb.GenerateResponse.FromString(piece.SerializeToString()))
        got = reader.add_to(bare)
        assert got.report == report
        assert got.prompt is not None
        assert delta.prompt is not None
        assert got.prompt.logprobs == delta.prompt.logprobs
        np.testing.assert_array_equal(got.prompt.token_ids, delta.prompt.token_ids)
        assert reader.add_to(bare) == bare


class Failed:
    """A call's error as gRPC has it."""

    def __init__(self, error: Exception) -> None:
        self._status = status_of(error)

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.sentence

    def trailing_metadata(self) -> Any:
        return self._status.metadata


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptError("p"), "INVALID_ARGUMENT"),
        (SamplingError("s"), "INVALID_ARGUMENT"),
        (LimitExceeded("l"), "RESOURCE_EXHAUSTED"),
        (QueueFull("q"), "RESOURCE_EXHAUSTED"),
        (UnknownRequest("u"), "NOT_FOUND"),
        (Unauthenticated("k"), "UNAUTHENTICATED"),
        (RankLost("r"), "UNAVAILABLE"),
        (StepFailed("f"), "UNAVAILABLE"),
        (ServerUnavailable("d"), "UNAVAILABLE"),
    ],
)
def test_errors_keep_class_and_sentence(error: RingspanError, code: str) -> None:
    """A client catches what a caller of `LLM` would."""
    failed = Failed(error)
    got = error_of(failed, "host:1")
    assert (type(got), str(got)) == (type(error), str(error))
    assert failed.code().name == code
    may_retry = isinstance(error, QueueFull | ServerUnavailable)
    assert (retry_s(failed) is not None) == may_retry
    assert is_broken(failed) == isinstance(error, ServerUnavailable)


@pytest.mark.parametrize("error", [KeyError("secret"), ClusterError("failed with secret")])
def test_what_is_not_for_a_client_stays_here(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """No INTERNAL and nothing of a traceback; the log has it."""
    failed = Failed(error)
    assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert "secret" not in failed.details()
    assert "secret" in caplog.text


def test_a_long_sentence_is_cut() -> None:
    """It echoes what a client sent, and is a header: beyond a limit gRPC makes INTERNAL of it."""
    assert len(Failed(SamplingError("s" * 10**6)).details()) == 500


def test_tenants_follow_from_keys() -> None:
    """Two keys are two tenants, a key is always the same one, and its name is not the key."""
    keys = ApiKeys(["key-a", "key-b"])
    tenants = {keys.tenant(f"Bearer {key}") for key in ("key-a", "key-b")}
    assert len(tenants) == 2
    assert ApiKeys(["key-b"]).tenant("bearer  key-b") in tenants
    assert not any("key" in tenant for tenant in tenants)
    for wrong in (None, "", "key-a", "Bearer", "Bearer key-c", "Basic key-a"):
        with pytest.raises(Unauthenticated):
            keys.tenant(wrong)
    assert ApiKeys().tenant(None) == ""
