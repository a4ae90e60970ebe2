"""Who runs in a benchmark, each in processes of its own: ours, the ideal, and transformers.

All live at once on one Ray, so that runs can be interleaved; who does not run
only waits.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor

from actors.messages import Draw, PrefillPlan, RequestOutput, StepRecord, StepResult, WorkerSpec
from actors.remote import create_plain
from actors.worker import GPUWorker
from cluster.llm import LLM
from models.sampling import SamplingParams

LIMIT_S = 3600.0
GREEDY = Draw(temperature=0.0, seed=0, stop_ids=())


@dataclass(frozen=True)
class Measured:
    """One run. ``parts_s`` is the mean over ranks; ``peak_bytes`` the largest process's RSS."""

    seconds: float
    peak_bytes: int = 0
    parts_s: dict[str, float] = field(default_factory=dict)


class Contestant(Protocol):
    """Somebody whose prefill is timed, in processes that end with `close`."""

    name: str

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        """Compute a prompt and its first token."""

    def close(self) -> None:
        """End the processes."""


class DecodeContestant(Contestant, Protocol):
    """Somebody whose decode is timed too."""

    def decode(self, token_ids: Sequence[int], steps: int) -> Measured:
        """Return the mean time of one greedy decode step behind a prompt."""


class Ours:
    """The whole system through its handle: Ray, coordinator, ranks."""

    def __init__(self, name: str, checkpoint: Path, **options: Any) -> None:
        self.name = name
        self._llm = LLM(checkpoint, device="cpu", **options)
        self._pids = [worker.pid for worker in self._llm.info.workers]

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        for pid in self._pids:
            reset_peak_rss(pid)
        step = self._run(token_ids, 1).steps[0]
        return Measured(step.wall_s, self._peak_bytes(), _parts_s(step))

    def decode(self, token_ids: Sequence[int], steps: int) -> Measured:
        bursts = self._run(token_ids, 1 + steps).steps[1:]
        parts: Counter[str] = Counter()
        for burst in bursts:
            parts.update({part: seconds / steps for part, seconds in _parts_s(burst).items()})
        seconds = sum(burst.wall_s for burst in bursts) / steps
        return Measured(seconds, self._peak_bytes(), dict(parts))

    def _peak_bytes(self) -> int:
        return max(map(peak_rss_bytes, self._pids))

    def close(self) -> None:
        self._llm.close()

    def _run(self, token_ids: Sequence[int], max_tokens: int) -> RequestOutput:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return self._llm.generate({"prompt_token_ids": token_ids}, params)[0]


class Ideal:
    """N processes that compute the same N shards at once and never communicate.

    What arrives in the ring is whatever the buffers hold: the work is the same,
    the numbers are not, and no ring can be faster on the same machine.
    """

    def __init__(self, name: str, checkpoint: Path, num_ranks: int, max_tokens: int) -> None:
        self.name = name
        self._ranks = [
            create_plain(_SilentRank, str(checkpoint), rank, num_ranks, max_tokens)
            for rank in range(num_ranks)
        ]

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        ids = np.asarray(token_ids, dtype=np.int32)
        refs = [rank.prefill.remote(ids) for rank in self._ranks]
        results: list[tuple[StepResult, int]] = ray.get(refs, timeout=LIMIT_S)
        return Measured(
            max(result.wall_s for result, _ in results), max(peak for _, peak in results)
        )

    def close(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)


class Transformers:
    """Hugging Face transformers, sdpa attention and its own cache, in one process."""

    def __init__(self, name: str, checkpoint: Path, threads: int) -> None:
        self.name = name
        self._runner = create_plain(_TransformersRunner, str(checkpoint), threads)

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        measured: Measured = ray.get(self._runner.prefill.remote(list(token_ids)), timeout=LIMIT_S)
        return measured

    def decode(self, token_ids: Sequence[int], steps: int) -> Measured:
        measured: Measured = ray.get(
            self._runner.decode.remote(list(token_ids), steps), timeout=LIMIT_S
        )
        return measured

    def close(self) -> None:
        ray.kill(self._runner)


class _SilentRing:
    """A `Ring` end that is alone: nothing is sent, nothing waited for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> "_SilentRing":
        return self

    def wait(self) -> None:
        pass

    def all_gather(self, part: Tensor) -> Tensor:
        return part.expand(self.size, *part.shape)

    def broadcast(self, value: Tensor, source: int) -> None:
        pass


class _SilentRank:
    """One process of the ideal."""

    def __init__(self, checkpoint: str, rank: int, num_ranks: int, max_tokens: int) -> None:
        self._worker = GPUWorker(
            WorkerSpec(
                rank=rank,
                num_ranks=num_ranks,
                checkpoint=checkpoint,
                device="cpu",
                dtype="auto",
                page_tokens=256,
                threads=1,
                ranks_on_host=num_ranks,
                gpu_memory_utilization=0.9,
                kv_cache_memory_bytes=None,
            )
        )
        self._worker.load()
        self._worker.allocate(max_tokens // num_ranks // 256 + 2)
        self._worker.join(_SilentRing(rank, num_ranks))

    def prefill(self, token_ids: np.ndarray[Any, np.dtype[np.int32]]) -> tuple[StepResult, int]:
        reset_peak_rss(os.getpid())
        plan = PrefillPlan(
            number=0,
            sequence_id=1,
            token_ids=token_ids,
            algorithm="pass_kv",
            draw=GREEDY,
            sampling_rank=0,
            release=(1,),
        )
        return self._worker.execute(plan), peak_rss_bytes(os.getpid())


class _TransformersRunner:
    def __init__(self, checkpoint: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()

    @torch.inference_mode()
    def prefill(self, token_ids: list[int]) -> Measured:
        reset_peak_rss(os.getpid())
        start_s = time.perf_counter()
        output = self._model(torch.tensor([token_ids]), logits_to_keep=1, use_cache=True)
        int(output.logits[0, -1].argmax())
        return Measured(time.perf_counter() - start_s, peak_rss_bytes(os.getpid()))

    @torch.inference_mode()
    def decode(self, token_ids: list[int], steps: int) -> Measured:
        reset_peak_rss(os.getpid())
        output = self._model(torch.tensor([token_ids]), logits_to_keep=1, use_cache=True)
        start_s = time.perf_counter()
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
        int(output.logits[0, -1].argmax())
        return Measured((time.perf_counter() - start_s) / steps, peak_rss_bytes(os.getpid()))


def _parts_s(step: StepRecord) -> dict[str, float]:
    """Return where a step's time went: the mean over its ranks, and what Ray took on top."""
    total: Counter[str] = Counter()
    for parts_s in step.ranks_parts_s:
        total.update(parts_s)
    mean = {part: seconds / step.num_ranks for part, seconds in total.items()}
    mean["other"] = sum(step.ranks_wall_s) / step.num_ranks - sum(mean.values())
    mean["ray"] = step.wall_s - max(step.ranks_wall_s)
    return mean


def reset_peak_rss(pid: int) -> None:
    """Begin to count a process's peak memory anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_rss_bytes(pid: int) -> int:
    """Return the most memory that a process held since the last reset."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM in /proc/{pid}/status")
