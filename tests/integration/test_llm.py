"""The `LLM` handle over Ray: right tokens, clear errors, nothing left behind."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import LLM, ClusterError, PlacementError, PromptError, RankLost, SamplingParams
from models.needle_text import make_demo, question
from tests.oracle import assert_greedy

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.mark.parametrize(
    ("num_ranks", "algorithm"),
    [
        (1, "auto"),
        (2, "pass_q"),
        (3, "pass_kv"),
        pytest.param(4, "auto", marks=pytest.mark.campaign),
    ],
)
def test_greedy_tokens_equal_transformers(llama: Path, num_ranks: int, algorithm: str) -> None:
    """Through Ray as through threads; more ranks than cores start as well."""
    rng = np.random.default_rng(num_ranks)
    prompts = [rng.integers(0, 500, length).tolist() for length in (1, 63, 1000)]
    overrides = [f"ring.algorithm={algorithm}"]
    with LLM(llama, context_parallel_size=num_ranks, overrides=overrides) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY)
        status = llm.status()

    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == tuple(prompt)
        assert len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"
        assert_greedy(llama, prompt, output.outputs[0].token_ids)
    assert status["num_ranks"] == num_ranks
    assert status["failure"] is None


def test_needle_answers_and_explains(needle: Path) -> None:
    """Text in, text out, ended by EOS, with a record of every step and which parts it had."""
    demo = make_demo(4096, seed=1)
    key, expected = demo.questions[0]
    overrides = ["ring.algorithm=pass_kv"]
    with LLM(needle, context_parallel_size=2, overrides=overrides) as llm:
        params = SamplingParams(max_tokens=24, temperature=0.0)
        output = llm.generate(demo.prompt_text + question(key), params)[0]

    assert output.outputs[0].text == expected
    assert output.outputs[0].finish_reason == "stop"
    prefill = output.steps[0]
    assert (prefill.phase, prefill.algorithm, prefill.num_ranks) == ("prefill", "pass_kv", 2)
    assert sum(step.prefill_tokens for step in output.steps) == len(output.prompt_token_ids)
    for parts_s in prefill.ranks_parts_s:
        assert parts_s.keys() >= {"gemm", "attention", "merge", "wait", "store"}
    assert prefill.prices_s.keys() == {"pass_kv", "pass_q"}
    assert prefill.predicted_s is not None
    assert "pass_kv over 2 ranks" in output.explain()
    assert 0 < output.metrics.ttft_s <= output.metrics.total_s


def test_wrong_prompts_are_refused_and_the_next_is_served(needle: Path) -> None:
    """One sentence each; the cluster goes on."""
    with LLM(needle, max_model_len=64) as llm:
        for prompt, sentence in (
            ("", "the prompt is empty"),
            ({"prompt_token_ids": []}, "the prompt is empty"),
            ({"prompt_token_ids": [1, 2**40]}, "outside the vocabulary"),
            ({"prompt_token_ids": ["a"]}, "flat list of integers"),
            ({"prompt": "x" * 64}, "the prompt has 65 tokens, but max_model_len is 64"),
            ({"messages": [{"role": "user", "content": "hi"}]}, "chat template"),
            ({"text": "hi"}, "exactly one of"),
            ({"prompt": "hi", "cache_salt": 7}, "cache_salt must be a text .* got 7"),
            ({"prompt": "hi", "cache_salt": ""}, "cache_salt must be a text"),
        ):
            with pytest.raises(PromptError, match=sentence):
                llm.generate(prompt)
        output = llm.generate("hello", SamplingParams(max_tokens=500, ignore_eos=True))[0]
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64
        assert output.outputs[0].finish_reason == "length"


def test_a_turn_computes_its_new_tokens_only(llama: Path) -> None:
    """Of its own tenant, until the cache is cleared; several answers share their prompt."""
    rng = np.random.default_rng(5)
    prompt, question = rng.integers(0, 500, 600).tolist(), rng.integers(0, 500, 30).tolist()
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with LLM(llama, context_parallel_size=2) as llm:
        first = llm.generate({"prompt_token_ids": prompt}, params)[0]
        turn = [*prompt, *first.outputs[0].token_ids, *question]
        prompts: list[dict[str, Any]] = [
            {"prompt_token_ids": turn},
            {"prompt_token_ids": turn, "cache_salt": "somebody else"},
        ]
        second, other = llm.generate(prompts, params)
        llm.reset_prefix_cache()
        anew = llm.generate({"prompt_token_ids": turn}, SamplingParams(n=3, max_tokens=4))[0]
        status = llm.status()

    cached = [output.num_cached_tokens for output in (first, second, other, anew)]
    assert cached == [0, 619, 0, 0]
    assert sum(step.prefill_tokens for step in anew.steps) == len(turn) + 2
    for prompt_ids, output in ((prompt, first), (turn, second), (turn, other)):
        assert_greedy(llama, prompt_ids, output.outputs[0].token_ids)
    assert (status["running"], status["waiting"]) == (0, 0)


def test_same_seed_same_tokens(llama: Path) -> None:
    """A seed decides the draw, whatever was answered before."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    other = SamplingParams(max_tokens=20, temperature=1.0, seed=8, ignore_eos=True)
    prompt = {"prompt_token_ids": [3, 1, 4]}
    with LLM(llama, context_parallel_size=2) as llm:
        first = llm.generate(prompt, params)[0].outputs[0].token_ids
        different = llm.generate(prompt, other)[0].outputs[0].token_ids
        again = llm.generate(prompt, params)[0].outputs[0].token_ids

    assert first == again != different


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_ends_the_request_with_its_name(needle: Path, kill: signal.Signals) -> None:
    """A dead or silent rank is named within 30 s, and no process of the ring stays."""
    demo = make_demo(32768, seed=2)
    overrides = ["ring.heartbeat_timeout_s=8"]
    with LLM(needle, context_parallel_size=2, overrides=overrides) as llm:
        pids = [worker.pid for worker in llm.info.workers]
        killer = threading.Timer(1.5, os.kill, (pids[1], kill))
        killer.start()
        start_s = time.perf_counter()
        with pytest.raises(RankLost, match=r"rank 1 on host .* start the cluster again"):
            llm.generate(demo.prompt_text)
        assert time.perf_counter() - start_s < 30
        with pytest.raises(RankLost, match="rank 1"):
            llm.generate("hello")
        assert "rank 1" in llm.status()["failure"]
        _wait_until(lambda: not any(map(_is_alive, pids)))
    with pytest.raises(ClusterError, match="this LLM is closed"):
        llm.generate("hello")


def test_more_ranks_than_gpus_is_one_sentence(needle: Path) -> None:
    with pytest.raises(PlacementError, match="context_parallel_size is 2, but the Ray cluster has"):
        LLM(needle, context_parallel_size=2, device="cuda")


def test_pool_that_cannot_hold_max_model_len_is_refused(needle: Path) -> None:
    """The numbers are in the sentence; without max_model_len the model serves what fits."""
    small = 2**20  # one page of the needle model's float32 KV is 1 MiB
    with pytest.raises(PlacementError, match=r"max_model_len 4096 needs .* GiB of KV pages"):
        LLM(needle, kv_cache_memory_bytes=small, max_model_len=4096)
    with LLM(needle, kv_cache_memory_bytes=2 * small) as llm:
        assert llm.info.max_model_len == 512 - 18


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], limit_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "still not true"
        time.sleep(0.1)
