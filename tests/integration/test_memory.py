"""What a cluster holds does not grow with what it has answered."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster import LLM, SamplingParams

MiB = 2**20


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_memory_stays_flat_over_a_thousand_requests(llama: Path) -> None:
    """Ranks and coordinator: pages are used anew, and nothing of an answer stays but its KV."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1, presence_penalty=0.5)
    options: dict[str, Any] = {"kv_cache_memory_bytes": 8 * MiB, "max_model_len": 1024}
    with LLM(llama, context_parallel_size=2, **options) as llm:
        pids = [worker.pid for worker in llm.info.workers]
        pids += [
            process.pid
            for process in psutil.process_iter()
            if "ray::Coordinator" in " ".join(process.cmdline())
        ]

        def answer(count: int) -> None:
            prompts = [
                {"prompt_token_ids": rng.integers(0, 500, length).tolist()}
                for length in rng.integers(1, 120, count)
            ]
            llm.generate(prompts, params)

        def held_bytes() -> list[int]:
            return [psutil.Process(pid).memory_info().rss for pid in pids]

        answer(500)  # until pages, allocators and the kernels' caches have been used once
        before = held_bytes()
        for _ in range(10):
            answer(100)
        grown = [now - then for now, then in zip(held_bytes(), before, strict=True)]

        status = llm.status()
    assert len(pids) >= 3
    assert max(grown) < 16 * MiB, grown
    assert (status["running"], status["waiting"], status["requests"]) == (0, 0, 0)
