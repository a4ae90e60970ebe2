"""A cluster without Ray: GPU workers as threads of one process, driven as the coordinator does."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actors.choice import Chooser, Rule
from actors.device_cache import DeviceCache
from actors.draws import BadWords
from actors.generation import Generation
from actors.kv.messages import RestoreChoice, StoredPrefix
from actors.messages import Plan, SequenceResult, StepResult, WorkerSpec
from actors.offload import Lookup, Offload
from actors.plans import prefill_plan
from actors.scheduler import Scheduler, Step
from actors.step_sizes import Limits
from actors.worker import GPUWorker
from attention import PassKVAttention, Ring, RingSequence, ThreadRanks, Zigzag
from attention.timing import PartTimer
from models.config import read_model_config
from models.layer_attention import NewRows, PrefillAttention
from models.page_pool import KVCacheDtype
from models.rates import Rates, model_shape
from models.sampling import SamplingParams
from tests.staged_ring import StagedRing

if TYPE_CHECKING:  # it needs pyarrow, which computing does not
    from actors.kv.finder import StoredBlocks, StoreFinder
    from tests.thread_stores import ThreadStores

Choose = Callable[["StoredBlocks"], RestoreChoice | None]

MiB = 2**20
GREEDY_32 = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


class ThreadCluster:
    """N ranks of one checkpoint; use as a context manager."""

    def __init__(
        self,
        checkpoint: Path,
        num_ranks: int,
        *,
        num_pages: int = 256,
        page_tokens: int = 256,
        device: Literal["cpu", "cuda"] = "cpu",
        rule: Rule = "pass_kv",
        rates: Rates | None = None,
        shares: bool = False,
        piece_bytes: int = 64 * MiB,
        follows: bool = False,
        kv_cache_dtype: KVCacheDtype = "auto",
        stores: "ThreadStores | None" = None,
        **settings: Any,
    ) -> None:
        """Bring the ranks up; on CUDA all of them share the first GPU.

        Without ``shares`` every prompt is computed anew, as a single request would be.
        With ``follows`` bursts are handed out before the results of those before are told.
        ``settings`` are those of `Limits`.
        """
        self.follows = follows
        self.config = read_model_config(checkpoint)
        self.num_ranks = num_ranks
        self._sequences = 0
        self._exit = ExitStack()
        self.ranks = self._exit.enter_context(ThreadRanks(num_ranks, piece_bytes=piece_bytes))
        self.workers = [
            GPUWorker(
                _spec(checkpoint, rank, num_ranks, device, page_tokens, piece_bytes, kv_cache_dtype)
            )
            for rank in range(num_ranks)
        ]

        def bring_up(ring: Ring) -> None:
            worker = self.workers[ring.rank]
            worker.load()
            worker.allocate(num_pages)
            worker.join(ring if device == "cpu" else StagedRing(ring))

        self.ranks.run(bring_up)
        self.cache = DeviceCache(
            num_ranks=num_ranks, num_pages=num_pages, page_tokens=page_tokens, shares=shares
        )
        itemsize = self.workers[0]._decoder.dtype.itemsize
        self.scheduler = Scheduler(
            self.cache,
            Chooser(rule, model_shape(self.config, itemsize), rates, num_ranks),
            Limits(
                **{
                    "decode_block_tokens": 16,
                    "burst_steps": 16,
                    "max_num_seqs": 256,
                    "max_num_batched_tokens": 8192,
                    "max_queued_requests": 1000,
                    **settings,
                }
            ),
            None if stores is None else Offload(stores.keys, stores.restore_min_tokens),
        )
        self.finder = None if stores is None else stores.attach(self.workers)
        # What the stores have is staged so many steps after a prompt has begun; 0: before.
        self.staging_steps = 0
        self._coming: list[tuple[int, Lookup, StoredPrefix]] = []
        # How what the stores have comes back; all of it is loaded unless a test says otherwise.
        self.choose: Choose = lambda found: RestoreChoice(recompute_to=found.lookup.start)

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY_32,
        seed: int = 0,
        bad_words: BadWords = (),
    ) -> list[int]:
        """Return the answer's token ids."""
        generation = self.add(prompt, params, seed, bad_words)
        self.run()
        return generation.token_ids

    def results(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY_32,
        seed: int = 0,
        bad_words: BadWords = (),
    ) -> list[list[SequenceResult]]:
        """Return what every rank made of every plan of an answer."""
        self.add(prompt, params, seed, bad_words)
        return [[result.sequences[0] for result in results] for _, results in self.run()]

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY_32,
        seed: int = 0,
        bad_words: BadWords = (),
        *,
        salt: str = "",
        priority: int = 0,
    ) -> Generation:
        """Hand an answer to the scheduler."""
        self._sequences += 1
        generation = Generation(
            sequence_id=self._sequences,
            prompt=np.asarray(prompt, dtype=np.int32),
            params=params,
            seed=seed if params.seed is None else params.seed,
            eos_ids=self.config.eos_token_ids,
            max_model_len=self.config.max_position_embeddings,
            cache_salt=salt,
            priority=priority,
            bad_words=bad_words,
        )
        self.scheduler.add(generation)
        return generation

    def run(self, max_steps: int | None = None) -> list[tuple[Step, list[StepResult]]]:
        """Execute steps until nothing is left to do, or so many."""
        done: list[tuple[Step, list[StepResult]]] = []
        while max_steps is None or len(done) < max_steps:
            step = self.scheduler.next_step()
            if self._ask_stores() and step is None:
                continue
            if step is None and self.scheduler.awaits_rows:
                self.scheduler.note_restoring([worker.restoring() for worker in self.workers])
                time.sleep(0.001)
                continue
            if step is None:
                break
            while step is not None:
                results = self.execute(step.plan)
                for index in range(len(step.generations)):
                    # Of the ranks that know what was sampled, all must know the same.
                    known = {result.sequences[index].token_ids for result in results} - {()}
                    assert len(known) <= 1
                following = self.scheduler.following_burst(step) if self.follows else None
                self.scheduler.advance(step, results)
                done.append((step, results))
                step = following
        return done

    def flush(self) -> None:
        """Wait until all finished blocks are in the KV stores."""
        assert all(worker.flush_store(20.0) for worker in self.workers)

    def _ask_stores(self) -> bool:
        """Look up and give back what the scheduler wants; return whether anything was looked up."""
        offload = self.scheduler.offload
        if offload is None or self.finder is None:
            return False
        for stored in offload.take_returned():
            asyncio.run(self.finder.release(stored))
        coming = [each for each in self._coming if each[0] <= 0]
        self._coming = [
            (left - 1, lookup, stored) for left, lookup, stored in self._coming if left > 0
        ]
        for _, lookup, stored in coming:
            self.scheduler.found(lookup, stored)
        lookups = offload.take_lookups()
        for lookup in lookups:
            self._look_up(self.finder, lookup)
        return bool(lookups or coming or self._coming)

    def _look_up(self, finder: "StoreFinder", lookup: Lookup) -> None:
        found = asyncio.run(finder.find(lookup))
        choice = None if found is None else self.choose(found)
        stored = None
        if found is not None and choice is not None:
            stored = asyncio.run(finder.stage(found, choice))
            if self.staging_steps and stored is not None:
                self.scheduler.begin_ahead(lookup, stored.start)
                self._coming.append((self.staging_steps, lookup, stored))
                return
        self.scheduler.found(lookup, stored)

    def check_invariants(self) -> None:
        """Assert that the coordinator's tables are the ranks' own, and that nothing is lost."""
        self.cache.check_invariants()
        for op in self.cache.take_ops():
            for rank, worker in enumerate(self.workers):
                worker._pool.apply(op, rank)
        for table, worker in zip(self.cache._tables, self.workers, strict=True):
            worker._pool.table.check_invariants()
            assert table._runs == worker._pool.table._runs

    def predictions(self, token_ids: Sequence[int]) -> list[int]:
        """Return the greedy next token after every token of a prompt, from one prefill."""
        return self.logits(token_ids).argmax(-1).tolist()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits ``[T, V]`` that follow every token of a prompt, from one prefill."""
        ids_T = torch.tensor(token_ids)
        zigzag = Zigzag(num_tokens=len(token_ids), num_ranks=self.num_ranks)
        self._sequences += 1
        sequence_id = self._sequences

        chunk = prefill_plan(sequence_id, ids_T.int().numpy(), self.num_ranks, draw=None)

        def predict(ring: Ring) -> Tensor:
            worker, rank = self.workers[ring.rank], ring.rank
            decoder, pool = worker._decoder, worker._pool
            timer = PartTimer(decoder.device)
            for op in chunk.cache_ops:
                pool.apply(op, rank)
            sequence = RingSequence(zigzag=zigzag, cached_rows=(0,) * self.num_ranks)
            around_ring = PassKVAttention([sequence], worker._ring, timer)
            rows = NewRows(sequence_id=sequence_id, first_row=0, count=zigzag.count(rank))
            attention = PrefillAttention(
                [rows], [], pool, worker._ring, around_ring, timer, last_layer=None
            )
            ids, positions = ids_T[zigzag.indices(rank)], zigzag.positions(rank)
            hidden_TE = decoder.forward(
                ids.to(decoder.device), positions.to(decoder.device), attention, timer
            )
            pool.table.release(sequence_id)
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
        for worker in self.workers:
            worker.close()
        self._exit.close()


def _spec(
    checkpoint: Path,
    rank: int,
    num_ranks: int,
    device: Literal["cpu", "cuda"],
    page_tokens: int,
    piece_bytes: int,
    kv_cache_dtype: KVCacheDtype,
) -> WorkerSpec:
    return WorkerSpec(
        rank=rank,
        num_ranks=num_ranks,
        checkpoint=str(checkpoint),
        device=device,
        dtype="auto",
        kv_cache_dtype=kv_cache_dtype,
        page_tokens=page_tokens,
        piece_bytes=piece_bytes,
        threads=1,
        ranks_on_host=num_ranks,
        gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=None,
    )
