"""A stream that breaks anywhere, any number of times, ends with the tokens of one that did not."""

import asyncio
import dataclasses
from collections.abc import Sequence

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import QueueFull, RankLost
from actors.messages import Request
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import ServerUnavailable
from cluster.rpc.limits import RpcLimits
from cluster.rpc.reports import write_reports
from cluster.rpc.resume import MAX_TRIES, RESUME_TRIES, ResumableRequest
from cluster.rpc.upload import RequestReader
from cluster.rpc.wire import write_delta
from models.errors import RingspanError
from models.sampling import SamplingParams
from tests.rpc_backend import RESTORED, STEP, FakeBackend, place, prompt_report
from tests.unit.test_cluster_rpc_messages import Failed


def asked_of(messages: Sequence[pb.GenerateRequest]) -> tuple[Request, int]:
    reader = RequestReader(RpcLimits())
    for message in messages:
        reader.take(message)
    return reader.finish()


async def answer(pending: ResumableRequest, breaks: Sequence[int]) -> int:
    """Answer it by a backend whose streams break after so many deltas each; return the tries."""
    left = list(breaks)
    tries = 0
    while not pending.is_complete:
        request, attempt = asked_of(pending.messages())
        assert attempt == tries
        tries += 1
        most = left.pop(0) if left else 10**9
        taken = 0
        async for delta in FakeBackend().stream(request):
            if taken == most:
                break
            for report in write_reports(delta, with_ids=request.token_ids is None):
                pending.take(report)
            pending.take(pb.GenerateResponse(delta=write_delta(delta)))
            taken += 1
        if not pending.is_complete:
            assert pending.pause_s(Failed(ServerUnavailable("gone"))) > 0
    return tries


def pending(n: int, seed: int | None = 5) -> ResumableRequest:
    params = SamplingParams(n=n, max_tokens=6, seed=seed, logprobs=2, prompt_logprobs=1)
    ids = np.arange(9, dtype=np.int32)
    asked = Request(request_id="a", token_ids=ids, params=params, reports=True)
    return ResumableRequest(asked, "host:1")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(0, 7), max_size=6))
def test_breaks_change_nothing(n: int, breaks: list[int]) -> None:
    """Answer i goes on with its own seed, whichever were complete."""
    whole, broken = pending(n), pending(n)

    asyncio.run(answer(whole, []))
    asyncio.run(answer(broken, breaks))

    got, wanted = broken.output(), whole.output()
    assert got.outputs == wanted.outputs
    assert got.prompt_logprobs == wanted.prompt_logprobs == prompt_report(whole.request).logprobs
    assert (got.num_cached_tokens, got.steps[-1]) == (wanted.num_cached_tokens, STEP)
    assert wanted.steps == (STEP,)
    assert wanted.restored == RESTORED
    for output in wanted.outputs:
        assert output.cumulative_logprob == -sum(output.token_ids) / 8
        assert output.logprobs == tuple(place(each, 2) for each in output.token_ids)


def test_without_a_seed_one_is_drawn_for_all_tries() -> None:
    """Else the second try would go on with other random numbers."""
    request = pending(1, seed=None)
    seeds = {asked_of(request.messages())[0].params.seed for _ in range(3)}
    assert len(seeds) == 1
    assert seeds != {None}
    assert pending(1, seed=None).request.params.seed not in seeds


def test_a_deadline_goes_on_running() -> None:
    """A second try has what is left of it."""
    request = ResumableRequest(Request(request_id="a", text="a", deadline_s=100.0), "host:1")
    first, second = (asked_of(request.messages())[0].deadline_s for _ in range(2))
    assert first == 100.0
    assert second is not None
    assert 0 < second < first


@pytest.mark.parametrize("error", [RankLost("r"), QueueFull("q"), KeyError("bug")])
def test_what_a_retry_cannot_help_is_raised(error: Exception) -> None:
    """At once, by its name."""
    request = pending(1)
    request.messages()
    with pytest.raises(RingspanError):
        request.pause_s(Failed(error))


def test_a_full_queue_does_not_end_an_answer_that_had_begun() -> None:
    """It waits for its place, as long as the server says."""
    request = pending(1)
    request.messages()
    request.pause_s(Failed(ServerUnavailable("gone")))
    request.messages()
    assert request.pause_s(Failed(QueueFull("full"))) >= 1.0


def test_tries_have_an_end() -> None:
    """Of those in a row that bring nothing; behind a delta there are as many as a restart takes."""
    request = pending(1)
    for _ in range(MAX_TRIES - 1):
        request.messages()
        request.pause_s(None)
    request.take(pb.GenerateResponse(delta=pb.Delta(token_ids=[1])))
    for _ in range(RESUME_TRIES - 1):
        request.messages()
        request.pause_s(Failed(ServerUnavailable("gone")))
    request.messages()
    with pytest.raises(ServerUnavailable, match="gone"):
        request.pause_s(Failed(ServerUnavailable("gone")))


def test_a_broken_connection_has_no_word_of_the_server() -> None:
    """What gRPC itself says of it is taken as a break, and said with the address."""

    @dataclasses.dataclass
    class Broken:
        status: grpc.StatusCode

        def code(self) -> grpc.StatusCode:
            return self.status

        def details(self) -> str:
            return "Connection reset by peer"

        def trailing_metadata(self) -> None:
            return None

    request = pending(1)
    request.messages()
    assert request.pause_s(Broken(grpc.StatusCode.UNAVAILABLE)) > 0
    for _ in range(MAX_TRIES):
        request.messages()
    with pytest.raises(ServerUnavailable, match=r"host:1.*reset by peer"):
        request.pause_s(Broken(grpc.StatusCode.UNAVAILABLE))
