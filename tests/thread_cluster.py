"""A cluster without Ray: GPU workers as threads of one process, driven as the coordinator does."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from actors.draws import BadWords
from actors.generation import Generation
from actors.messages import Plan, StepResult, WorkerSpec
from actors.worker import GPUWorker
from attention import PassKVAttention, Ring, ThreadRanks, Zigzag
from attention.timing import PartTimer
from models.config import read_model_config
from models.layer_attention import PrefillAttention
from models.sampling import SamplingParams
from tests.staged_ring import StagedRing

GREEDY_32 = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


class ThreadCluster:
    """N ranks of one checkpoint; use as a context manager."""

    def __init__(
        self,
        checkpoint: Path,
        num_ranks: int,
        *,
        num_pages: int = 256,
        device: Literal["cpu", "cuda"] = "cpu",
        **settings: Any,
    ) -> None:
        """Bring the ranks up; on CUDA all of them share the first GPU."""
        self.config = read_model_config(checkpoint)
        self.num_ranks = num_ranks
        self._settings = {"decode_block_tokens": 16, "burst_steps": 16, **settings}
        self._sequences = 0
        self._exit = ExitStack()
        self.ranks = self._exit.enter_context(ThreadRanks(num_ranks))
        self.workers = [
            GPUWorker(_spec(checkpoint, rank, num_ranks, device)) for rank in range(num_ranks)
        ]

        def bring_up(ring: Ring) -> None:
            worker = self.workers[ring.rank]
            worker.load()
            worker.allocate(num_pages)
            worker.join(ring if device == "cpu" else StagedRing(ring))

        self.ranks.run(bring_up)

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY_32,
        seed: int = 0,
        bad_words: BadWords = (),
    ) -> list[int]:
        """Return the answer's token ids; every rank must have seen the same ones."""
        steps = self.results(prompt, params, seed, bad_words)
        return [token_id for results in steps for token_id in results[0].token_ids]

    def results(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY_32,
        seed: int = 0,
        bad_words: BadWords = (),
    ) -> list[list[StepResult]]:
        """Return what every rank made of every plan of an answer."""
        self._sequences += 1
        generation = Generation(
            sequence_id=self._sequences,
            prompt=np.asarray(prompt, dtype=np.int32),
            params=params,
            seed=seed if params.seed is None else params.seed,
            eos_ids=self.config.eos_token_ids,
            num_ranks=self.num_ranks,
            max_model_len=self.config.max_position_embeddings,
            bad_words=bad_words,
            **self._settings,
        )
        release: tuple[int, ...] = (self._sequences - 1,)
        steps: list[list[StepResult]] = []
        while plan := generation.next_plan(0, release):
            steps.append(self.execute(plan))
            assert len({result.token_ids for result in steps[-1]}) == 1
            generation.advance(steps[-1][0].token_ids)
            release = ()
        return steps

    def release(self, sequence_id: int) -> None:
        """Give back a sequence's pages now."""
        for worker in self.workers:
            worker._pool.release(sequence_id)
            worker._sampler.release(sequence_id)

    def predictions(self, token_ids: Sequence[int]) -> list[int]:
        """Return the greedy next token after every token of a prompt, from one prefill."""
        return self.logits(token_ids).argmax(-1).tolist()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits ``[T, V]`` that follow every token of a prompt, from one prefill."""
        ids_T = torch.tensor(token_ids)
        zigzag = Zigzag(num_tokens=len(token_ids), num_ranks=self.num_ranks)
        self._sequences += 1
        sequence_id = self._sequences

        def predict(ring: Ring) -> Tensor:
            worker = self.workers[ring.rank]
            decoder, pool = worker._decoder, worker._pool
            timer = PartTimer(decoder.device)
            pool.grow(sequence_id, zigzag.count(ring.rank))
            around_ring = PassKVAttention(zigzag, worker._ring, timer)
            attention = PrefillAttention(
                sequence_id, pool, worker._ring, around_ring, timer, last_layer=None
            )
            ids, positions = ids_T[zigzag.indices(ring.rank)], zigzag.positions(ring.rank)
            hidden_TE = decoder.forward(
                ids.to(decoder.device), positions.to(decoder.device), attention, timer
            )
            pool.release(sequence_id)
            return decoder.logits(hidden_TE).cpu()

        logits_TV = torch.empty(len(ids_T), self.config.vocab_size)
        for rank, of_rank_TV in enumerate(self.ranks.run(predict)):
            logits_TV[zigzag.indices(rank)] = of_rank_TV
        return logits_TV

    def execute(self, plan: Plan) -> list[StepResult]:
        """Have every rank execute a plan, as the coordinator does."""
        return self.ranks.run(lambda ring: self.workers[ring.rank].execute(plan))

    def __enter__(self) -> "ThreadCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()


def _spec(
    checkpoint: Path, rank: int, num_ranks: int, device: Literal["cpu", "cuda"]
) -> WorkerSpec:
    return WorkerSpec(
        rank=rank,
        num_ranks=num_ranks,
        checkpoint=str(checkpoint),
        device=device,
        dtype="auto",
        page_tokens=256,
        threads=1,
        ranks_on_host=num_ranks,
        gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=None,
    )
