"""What ours is compared with: the ideal, and transformers; each in processes of its own."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from actors.errors import ClusterError
from actors.messages import Draw, StepResult, WorkerSpec
from actors.plans import prefill_plan
from actors.remote import create_plain
from actors.worker import GPUWorker
from cluster.bench.contestants import Ask
from cluster.bench.runs import Measured, peak_rss_bytes, reset_peak_rss

LIMIT_S = 3600.0
MiB = 2**20
GREEDY = Draw(temperature=0.0, seed=0, stop_ids=())


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
        """Compute a prompt and its first token."""
        ids = np.asarray(token_ids, dtype=np.int32)
        refs = [rank.prefill.remote(ids) for rank in self._ranks]
        results: list[tuple[StepResult, int]] = ray.get(refs, timeout=LIMIT_S)
        return Measured(
            max(result.wall_s for result, _ in results), max(peak for _, peak in results)
        )

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            ray.kill(rank)


class Transformers:
    """Hugging Face transformers, sdpa attention and its own cache, in one process."""

    def __init__(self, name: str, checkpoint: Path, threads: int) -> None:
        self.name = name
        self._runner = create_plain(_TransformersRunner, str(checkpoint), threads)

    def prefill(self, token_ids: Sequence[int]) -> Measured:
        """Compute a prompt and its first token."""
        measured: Measured = ray.get(self._runner.prefill.remote(list(token_ids)), timeout=LIMIT_S)
        return measured

    def decode(self, token_ids: Sequence[int], steps: int) -> Measured:
        """Return the mean time of one greedy decode step behind a prompt."""
        measured: Measured = ray.get(
            self._runner.decode.remote(list(token_ids), steps), timeout=LIMIT_S
        )
        return measured

    def begin(self, token_ids: Sequence[int]) -> None:
        """Compute a first turn whose KV is kept."""
        ray.get(self._runner.begin.remote(list(token_ids)), timeout=LIMIT_S)

    def turn(self, new_ids: Sequence[int]) -> Measured:
        """Compute new tokens behind the first turn, and the token that follows them."""
        measured: Measured = ray.get(self._runner.turn.remote(list(new_ids)), timeout=LIMIT_S)
        return measured

    def batch(self, asks: Sequence[Ask]) -> Measured:
        """Generate answers in one batch, all as long as the longest that is asked for."""
        prompts = [list(ask.token_ids) for ask in asks]
        longest = max(ask.answer_tokens for ask in asks)
        measured: Measured = ray.get(self._runner.batch.remote(prompts, longest), timeout=LIMIT_S)
        return measured

    def close(self) -> None:
        """End the process."""
        ray.kill(self._runner)


class _SilentRing:
    """A `Ring` end that is alone: nothing is sent, nothing waited for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> "_SilentRing":
        return self

    def wait(self) -> None:
        pass

    def all_gather(self, part: Tensor) -> Tensor:
        return part.expand(self.size, *part.shape)


class _SilentRank:
    """One process of the ideal."""

    def __init__(self, checkpoint: str, rank: int, num_ranks: int, max_tokens: int) -> None:
        self._num_ranks = num_ranks
        self._worker = GPUWorker(
            WorkerSpec(
                rank=rank,
                num_ranks=num_ranks,
                checkpoint=checkpoint,
                device="cpu",
                dtype="auto",
                page_tokens=256,
                piece_bytes=64 * MiB,
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
        plan = prefill_plan(1, token_ids, self._num_ranks, draw=GREEDY)
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

    @torch.inference_mode()
    def begin(self, token_ids: list[int]) -> None:
        output = self._model(torch.tensor([token_ids]), logits_to_keep=1, use_cache=True)
        self._cache = output.past_key_values
        self._context_tokens = len(token_ids)

    @torch.inference_mode()
    def turn(self, new_ids: list[int]) -> Measured:
        held = self._cache.get_seq_length()
        if held != self._context_tokens:
            raise ClusterError(f"transformers' cache has {held} tokens, not {self._context_tokens}")
        reset_peak_rss(os.getpid())
        start_s = time.perf_counter()
        output = self._model(
            torch.tensor([new_ids]),
            past_key_values=self._cache,
            logits_to_keep=1,
            use_cache=True,
        )
        int(output.logits[0, -1].argmax())
        measured = Measured(time.perf_counter() - start_s, peak_rss_bytes(os.getpid()))
        self._cache.crop(-len(new_ids))  # the next turn begins where this one did
        return measured

    @torch.inference_mode()
    def batch(self, prompts: list[list[int]], answer_tokens: int) -> Measured:
        reset_peak_rss(os.getpid())
        start_s = time.perf_counter()
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        self._model.generation_config.eos_token_id = None  # no row ends before the others
        made = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=answer_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start_s
        if made.shape[1] != longest + answer_tokens:
            raise ClusterError(
                f"transformers made {made.shape[1] - longest} tokens, not {answer_tokens}"
            )
        return Measured(seconds, peak_rss_bytes(os.getpid()))
