"""Restores over Ray: planned by what was measured, over a link that is slowed down."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster import LLM, RequestOutput, SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy

MiB = 2**20
BLOCK_TOKENS = 64
LINK_BYTES_PER_S = 2e6  # a token has 1 KiB of activations, or 2 KiB of KV
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), num_key_value_heads=4, max_position_embeddings=4096
    )


def open_llm(checkpoint: Path, *more: str) -> LLM:
    overrides = [
        f"kv_store.host_memory_bytes={64 * MiB}",
        f"kv_store.block_tokens={BLOCK_TOKENS}",
        f"kv_store.restore_min_tokens={BLOCK_TOKENS}",
        f"restore.link_bytes_per_s={LINK_BYTES_PER_S}",
        "ring.algorithm=pass_kv",
        *more,
    ]
    return LLM(checkpoint, context_parallel_size=2, overrides=overrides)


@pytest.fixture(scope="module")
def llm(shared_ray: None, checkpoint: Path) -> Iterator[LLM]:
    """All that is stored comes back, half of it as activations' bytes."""
    with open_llm(checkpoint, "restore.method=load", "restore.activations=always") as llm:
        yield llm


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, count).tolist()


def ask(llm: LLM, prompt: list[int]) -> RequestOutput:
    return llm.generate({"prompt_token_ids": prompt}, GREEDY)[0]


def wait_until(condition: Callable[[], bool], limit_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "still not true"
        time.sleep(0.1)


def offload(llm: LLM, seed: int, count: int) -> list[int]:
    """Answer a prompt and give up what the device holds; return the next turn."""
    prompt = tokens(seed, count)
    turn = [*prompt, *ask(llm, prompt).outputs[0].token_ids, *tokens(seed + 1, 40)]
    seen: list[int] = []

    def is_settled() -> bool:
        (stats,) = llm.kv_stats().values()
        seen.append(stats["host"]["stored"])
        return not stats["host"]["leases"] and seen[-1] > 0 and seen[-3:] == 3 * seen[-1:]

    wait_until(is_settled)
    llm.reset_prefix_cache()
    return turn


def test_a_restore_is_told_in_every_form(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    """Plan, prediction, measurement, idle shares, and that the link is a simulated one."""
    turn = offload(llm, 1, 1000)
    llm.start_trace()
    output = ask(llm, turn)
    trace = llm.stop_trace()

    restored = output.restored
    assert restored is not None
    assert restored.tokens == restored.projected_tokens == 1007 // BLOCK_TOKENS * BLOCK_TOKENS
    assert restored.simulated_link_bytes_per_s == LINK_BYTES_PER_S
    # Two links bring it together; they can be no faster than they are held to.
    assert restored.measured_s > 0.9 * restored.link_bytes / 2 / LINK_BYTES_PER_S
    assert restored.predicted_s is not None
    assert 0.0 <= restored.link_idle < 1.0
    assert 0.0 <= restored.device_idle < 1.0
    line = output.explain().splitlines()[1]
    assert line == restored.line()
    assert "link (simulated, 2.0 MB/s)" in line
    status = llm.status()["restore"]
    assert status["restores"] == 1
    assert status["last"] == line
    assert status["activation_share"] == 1.0
    assert status["link_is_simulated"]
    json.dumps(status)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (told,) = [event for event in events if event["name"] == "restore" and event["pid"] == 0]
    assert told["args"]["plan"] == line
    assert line in trace.summary().text()
    assert_greedy(checkpoint, turn, output.outputs[0].token_ids)


def test_a_link_that_is_lost_costs_time_only(llm: LLM, checkpoint: Path) -> None:
    """Its process is killed on every rank: what is stored is computed from then on."""
    turn = offload(llm, 11, 700)
    links = [
        process
        for process in psutil.process_iter()
        if "link_process" in " ".join(_command(process))
        and _command(process.parent())[:1] == ["ray::GPUWorker"]
    ]
    assert len(links) >= 2
    for process in links:
        os.kill(process.pid, signal.SIGKILL)
    output = ask(llm, turn)

    assert output.num_cached_tokens == 0
    assert_greedy(checkpoint, turn, output.outputs[0].token_ids)
    assert ask(llm, tokens(5, 30)).outputs[0].token_ids


def _command(process: psutil.Process | None) -> list[str]:
    try:
        return [] if process is None else process.cmdline()
    except psutil.Error:
        return []


def test_the_solved_plan_is_taken(shared_ray: None, checkpoint: Path) -> None:
    """Over a link of 0.2 MB/s this model is computed sooner than loaded."""
    with open_llm(checkpoint, "restore.link_bytes_per_s=2e5") as llm:
        turn = offload(llm, 21, 1000)
        output = ask(llm, turn)

    assert output.num_cached_tokens < 500
    assert_greedy(checkpoint, turn, output.outputs[0].token_ids)
