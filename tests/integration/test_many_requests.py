"""Many requests through Ray: together, streamed, cancelled, with deadlines and progress."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import LLM, Progress, PromptError, QueueFull, SamplingParams, UnknownRequest
from tests.oracle import assert_greedy

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(shared_ray: None, llama: Path) -> Iterator[LLM]:
    overrides = ["ring.algorithm=pass_q", "scheduler.step_target_s=0.05"]
    with LLM(llama, context_parallel_size=2, overrides=overrides) as llm:
        yield llm


def prompts(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt_token_ids": rng.integers(0, 500, length).tolist()}
        for length in rng.integers(1, 400, count)
    ]


def wait_until(llm: LLM, running: int) -> None:
    for _ in range(500):
        if llm.status()["running"] == running:
            return
        time.sleep(0.02)
    raise AssertionError(f"never {running} running: {llm.status()}")


def test_hundreds_at_once_equal_each_alone(llm: LLM, llama: Path) -> None:
    """Handed in together, prefilled in chunks, decoded in one batch."""
    asked = prompts(200, seed=3)

    outputs = llm.generate(asked, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))

    for prompt, output in list(zip(asked, outputs, strict=True))[::10]:
        assert_greedy(llama, prompt["prompt_token_ids"], output.outputs[0].token_ids)
    assert {len(output.outputs[0].token_ids) for output in outputs} == {6}
    assert any(step.phase == "mixed" for output in outputs for step in output.steps)
    status = llm.status()
    assert (status["running"], status["waiting"], status["requests"]) == (0, 0, 0)
    assert status["decode_tokens_per_s"] > 0
    assert all(pages["running"] == 0 for pages in status["pages"])


def test_stream_tells_what_generate_returns(llm: LLM) -> None:
    """In pieces, of each answer its own, with the reason in its last one."""
    prompt = prompts(1, seed=4)[0]
    params = SamplingParams(n=2, max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    whole = llm.generate(prompt, params)[0]

    deltas = list(llm.stream(prompt, params))

    for index, answer in enumerate(whole.outputs):
        own = [delta for delta in deltas if delta.index == index]
        assert sum((delta.token_ids for delta in own), ()) == answer.token_ids
        assert [delta.finish_reason for delta in own][-1] == "length"
        assert len(own) > 2


def test_who_stops_to_read_cancels(llm: LLM) -> None:
    """A stream that is left frees what it held."""
    stream = llm.stream({"prompt_token_ids": [1, 2, 3]}, LONG)
    assert next(stream).token_ids
    stream.close()  # type: ignore[attr-defined]

    wait_until(llm, running=0)


def test_cancel_ends_a_request_with_what_it_has(llm: LLM) -> None:
    """Within a step; twice, or by a wrong id, is one sentence."""
    cancelled: list[float] = []

    def cancel() -> None:
        wait_until(llm, running=1)
        time.sleep(0.3)
        cancelled.append(time.perf_counter())
        llm.cancel("mine")

    thread = threading.Thread(target=cancel)
    thread.start()
    output = llm.generate({"prompt_token_ids": [4, 5, 6], "request_id": "mine"}, LONG)[0]
    thread.join()

    assert time.perf_counter() - cancelled[0] < 5.0
    assert output.outputs[0].finish_reason == "abort"
    assert 0 < len(output.outputs[0].token_ids) < 4000
    for request_id in ("mine", "other"):
        with pytest.raises(UnknownRequest, match=f"no request '{request_id}' waits or runs"):
            llm.cancel(request_id)
    with pytest.raises(UnknownRequest, match="no request 'mine'"):
        llm.progress("mine")


def test_an_id_that_is_under_way_is_refused_and_goes_on(llm: LLM) -> None:
    """The refusal of the second must not end the first."""
    stream = llm.stream({"prompt_token_ids": [5, 6], "request_id": "mine"}, LONG)
    next(stream)
    with pytest.raises(PromptError, match="'mine' is under way"):
        llm.generate({"prompt_token_ids": [5, 6], "request_id": "mine"}, LONG)
    next(stream)
    assert llm.progress("mine")

    llm.cancel("mine")
    assert [delta.finish_reason for delta in stream][-1] == "abort"


def test_deadline_ends_a_request_with_what_it_has(llm: LLM) -> None:
    output = llm.generate({"prompt_token_ids": [7, 8], "deadline_s": 0.5}, LONG)[0]

    assert output.outputs[0].finish_reason == "deadline"
    assert 0.5 <= output.metrics.total_s < 5.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"deadline_s": -1}, "deadline_s must be a number of seconds greater than 0, got -1"),
        ({"deadline_s": "soon"}, "deadline_s must be a number of seconds"),
        ({"priority": 1.5}, "priority must be an integer, lower ones go first, got 1.5"),
        ({"request_id": ""}, "request_id must be a text of at least one character, got ''"),
        ({"cache_salt": 7}, "cache_salt must be a text .* got 7"),
    ],
)
def test_wrong_options_get_their_sentence(llm: LLM, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        llm.generate({"prompt_token_ids": [1], **options})


def test_async_requests_run_together(llm: LLM) -> None:
    """One event loop, many requests under way."""
    asked = prompts(8, seed=6)

    async def ask_all() -> list[tuple[int, ...]]:
        outputs = await asyncio.gather(*(llm.agenerate(prompt, GREEDY) for prompt in asked))
        return [output.outputs[0].token_ids for output in outputs]

    together = asyncio.run(ask_all())

    assert together == [output.outputs[0].token_ids for output in llm.generate(asked, GREEDY)]


@pytest.mark.usefixtures("shared_ray")
def test_progress_of_a_long_prefill(needle: Path) -> None:
    """It never goes back, ends at all tokens, and half-way knows how long the rest takes."""
    prompt = {"prompt": "all work and no play " * 600, "request_id": "long"}
    seen: list[tuple[float, Progress]] = []
    with LLM(needle, context_parallel_size=2, overrides=["scheduler.step_target_s=0.1"]) as llm:
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                with contextlib.suppress(UnknownRequest):
                    seen.append((time.perf_counter(), llm.progress("long")[0]))
                time.sleep(0.05)

        thread = threading.Thread(target=watch)
        thread.start()
        output = llm.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))[0]
        end_s = time.perf_counter()
        done.set()
        thread.join()

    tokens = [progress.done_tokens for _, progress in seen]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > 10
    assert seen[-1][1].total_tokens == len(output.prompt_token_ids) == 12601
    moment_s, halfway = next(
        (at_s, progress) for at_s, progress in seen if progress.done_tokens > 12601 / 2
    )
    assert halfway.left_s is not None
    # Within what a busy machine explains; benchmarks/README.md has the accuracy.
    assert 1 / 3 < halfway.left_s / (end_s - moment_s) < 3


@pytest.mark.usefixtures("shared_ray")
def test_a_full_queue_refuses(llama: Path) -> None:
    """With the number, and nothing of the refused request stays."""
    overrides = ["scheduler.max_queued_requests=2", "max_num_seqs=1"]
    with LLM(llama, overrides=overrides) as llm:
        with pytest.raises(QueueFull, match=r"answers wait already, as many as may: try again"):
            llm.generate([{"prompt_token_ids": [token]} for token in range(8)], LONG)
        status = llm.status()
        assert status["waiting"] <= 2
