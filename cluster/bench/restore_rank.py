"""One rank with its host's store in this process, driven as the engine drives ranks; no Ray.

A prompt whose prefix is only in the store is asked, and what is timed is all until its first
token: looking up, choosing, staging, restoring, and the tokens behind the prefix.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.answer import Answer, step_record
from actors.choice import Chooser
from actors.device_cache import DeviceCache
from actors.errors import ClusterError
from actors.executor import PlanExecutor
from actors.generation import Generation
from actors.kv.finder import StoredBlocks, StoreFinder
from actors.kv.keys import TenantKeys, exactness_class
from actors.kv.link import DirectLink, Link, open_link
from actors.kv.messages import (
    RestoreChoice,
    RestoreTimes,
    StoredPrefix,
    StoreSpec,
)
from actors.kv.pieces import Layout
from actors.kv.rank import RankStore
from actors.kv.store import KVStore
from actors.messages import PrefillChunk, StepResult
from actors.offload import Offload
from actors.records import Restored
from actors.restore_profiler import measure_restore
from actors.scheduler import Scheduler, Step
from actors.step_sizes import Limits
from attention import Ring
from attention.timing import PartTimer
from cluster.bench.restore_naive import FetchedFirst, OneAfterTheOther
from models.decoder import Decoder
from models.kv_codec import Encoding
from models.page_pool import PagePool
from models.rates import Rates, model_shape
from models.restore_rates import RestoreRates
from models.sampling import SamplingParams

HOST = "host"
PAGE_TOKENS = 256
POLL_S = 0.002  # between two looks at what comes back
PIECE_BYTES = 64 * 2**20
SECRET = b"of a benchmark, which no one keeps"[:32]
FLUSH_S = 120.0
# Layer inputs of so many bytes are taken in a step; more would find no room until it is written.
CAPTURED_BYTES = 256 * 2**20
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
Choose = Callable[[StoredBlocks], RestoreChoice | None]


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """A prompt's first token, and how its prefix came back."""

    token_id: int
    seconds: float
    choice: RestoreChoice | None = None  # None: nothing came from the store
    restored: Restored | None = None
    stored: StoredPrefix | None = None
    times: Sequence[RestoreTimes | None] = ()  # of each rank


class Rank:
    """A model, its pages, and a store with one prefix."""

    def __init__(
        self,
        decoder: Decoder,
        ring: Ring,
        rates: Rates,
        *,
        prefix: Sequence[int],
        new_tokens: int,
        block_tokens: int,
        encoding: Encoding = "raw",
        keeps_both: bool = False,
    ) -> None:
        """Start the store, with room for the prefix as KV, and as layer inputs where both."""
        config = decoder.config
        self._decoder, self._ring, self._prefix = decoder, ring, list(prefix)
        self._encoding, self._keeps_both = encoding, keeps_both
        self._sequences = 0
        num_tokens = len(prefix) + new_tokens + 1
        self._num_pages = -(-num_tokens // PAGE_TOKENS) + 1
        self.layout = Layout(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=str(decoder.dtype).removeprefix("torch."),
            block_tokens=block_tokens,
        )
        token_width = 2 * config.num_kv_heads * config.head_dim + keeps_both * config.hidden_size
        token_bytes = config.num_layers * token_width * decoder.dtype.itemsize
        self._kv_store = KVStore(
            StoreSpec(
                host=HOST,
                layout=self.layout,
                # A profile leases some places beside the prefix's.
                capacity_bytes=int(1.1 * token_bytes * num_tokens) + 128 * 2**20,
                cluster=secrets.token_hex(4),
                token="bench",
            )
        )
        info = self._kv_store.start()
        self._pool = PagePool(
            num_layers=config.num_layers,
            num_pages=self._num_pages,
            page_tokens=PAGE_TOKENS,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self._store = RankStore(
            self._pool,
            self._kv_store,
            info,
            self.layout,
            rank=0,
            encoding=encoding,
            decoder=decoder,
        )
        self._executor = PlanExecutor(decoder, self._pool, ring, piece_bytes=PIECE_BYTES)
        self._executor.store = self._store
        host_dtype = "auto" if encoding == "raw" else encoding
        keys = TenantKeys(SECRET, b"f" * 32, exactness_class(host=host_dtype), block_tokens)
        shape = model_shape(config, decoder.dtype.itemsize)
        self.chooser = Chooser("auto", shape, rates, 1)
        self._cache = DeviceCache(
            num_ranks=1, num_pages=self._num_pages, page_tokens=PAGE_TOKENS, shares=True
        )
        captured_bytes = config.num_layers * config.hidden_size * decoder.dtype.itemsize
        self.max_chunk_tokens = max(block_tokens, min(8192, CAPTURED_BYTES // captured_bytes))
        self._scheduler = Scheduler(
            self._cache,
            self.chooser,
            Limits(
                decode_block_tokens=16,
                burst_steps=16,
                max_num_seqs=1,
                max_num_batched_tokens=self.max_chunk_tokens,
                max_queued_requests=1,
                step_target_s=self.chooser.step_target_s(),
            ),
            Offload(keys, restore_min_tokens=min(256, block_tokens)),
        )
        self._finder = StoreFinder(
            [_Handle(self._kv_store, info.flight_address)],
            [HOST],
            block_tokens=block_tokens,
            timeout_s=60.0,
        )

    @property
    def link(self) -> Link:
        """What the store's bytes come by."""
        return self._store.loader.link

    def measure(self) -> RestoreRates:
        """Measure what restores take over this machine's own link, as a starting cluster does.

        Raises:
            ClusterError: The store has no room to measure with.
        """
        rates = measure_restore(
            self._decoder,
            self._ring,
            self._store.arena,
            self.layout,
            self._store.client,
            DirectLink(self._store.arena),
            encoding=self._encoding,
            page_tokens=PAGE_TOKENS,
        )
        if rates is None:
            raise ClusterError("rates of restores could not be measured: the store had no room")
        return rates

    def open_link(self, bytes_per_s: float | None) -> None:
        """Have the link that is asked for, in place of what there was."""
        self._store.link.close()
        self._store.link = self._store.loader.link = open_link(self._store.arena, bytes_per_s)

    def fill(self) -> None:
        """Compute the prefix and keep it in the store.

        Raises:
            ClusterError: The store has not all of it.
        """
        self.evict()
        if self._keeps_both:
            self._store.keep_activations(1.0, keeps_both=True)
        asyncio.run(self._first_token([*self._prefix, 0], lambda _: None))
        # What comes back is in the store already: it is not taken again.
        self._store.keep_activations(0.0, keeps_both=False)
        found: list[StoredBlocks] = []

        def look(stored: StoredBlocks) -> None:
            found.append(stored)

        self.evict()
        asyncio.run(self._first_token([*self._prefix, 0], look))
        blocks = found[0].blocks if found else ()
        whole = sum(block.has_both or not self._keeps_both for block in blocks)
        if whole * self.layout.block_tokens < len(self._prefix):
            raise ClusterError(
                f"the store has {whole} of {len(self._prefix) // self.layout.block_tokens} blocks:"
                " is there memory for all of them?"
            )

    def evict(self) -> None:
        """Have nothing on the device; pages are overwritten, so that no old row can look right."""
        self._cache.clear()
        assert self._store.writer.flush(FLUSH_S)
        layout, num_rows = self.layout, self._num_pages * PAGE_TOKENS
        spans = self._pool.spans(range(self._num_pages), 0, num_rows)
        shape = 2, layout.num_kv_heads, num_rows, layout.head_dim
        zeros = torch.zeros(1, dtype=self._pool.dtype).expand(shape)  # [2, K, S, D]
        for layer in range(layout.num_layers):
            self._pool.write_rows(layer, spans, zeros)

    def restore(self, new_ids: Sequence[int], choose: Choose) -> FirstToken:
        """Ask the prefix with new tokens behind it; what the store has comes back as chosen."""
        self.evict()
        return self._checked(asyncio.run(self._first_token([*self._prefix, *new_ids], choose)))

    def restore_naively(self, new_ids: Sequence[int], choose: Choose) -> FirstToken:
        """Likewise, but all is fetched, then all is copied, then computing begins."""
        self.evict()
        loader = self._store.loader
        self._store.loader = OneAfterTheOther(
            self._pool,
            self._store.arena,
            self.layout,
            self._store.client,
            0,
            decoder=self._decoder,
            link=FetchedFirst(loader.link),
        )
        try:
            return self._checked(asyncio.run(self._first_token([*self._prefix, *new_ids], choose)))
        finally:
            self._store.loader = loader

    def resume(self, new_ids: Sequence[int]) -> FirstToken:
        """Ask the prefix with new tokens behind it once it is on the device already.

        Raises:
            ClusterError: It was not.
        """
        self.evict()
        loader, first = self._store.loader, self._decoder.config.vocab_size - 1
        link, loader.link = loader.link, DirectLink(self._store.arena)
        try:
            asyncio.run(self._first_token([*self._prefix, first], load_all))
        finally:
            loader.link = link
        token = asyncio.run(self._first_token([*self._prefix, *new_ids], load_all))
        if token.restored is not None:
            raise ClusterError("the prefix was not on the device: what was measured is a restore")
        return token

    def close(self) -> None:
        """End the store and the link."""
        self._store.link.close()
        self._kv_store.close()

    def _checked(self, token: FirstToken) -> FirstToken:
        """Refuse a run in which less came back than was chosen."""
        wanted = 0 if token.choice is None else len(self._prefix) - token.choice.recompute_to
        came = 0 if token.restored is None else token.restored.tokens
        if came != wanted:
            raise ClusterError(f"{came} of {wanted} tokens came back: what was measured is other")
        return token

    async def _first_token(self, token_ids: Sequence[int], choose: Choose) -> FirstToken:
        """Drive one prompt to its first token, then whatever is left to do, untimed."""
        self._sequences += 1
        generation = Generation(
            sequence_id=self._sequences,
            prompt=np.asarray(token_ids, dtype=np.int32),
            params=ONE_TOKEN,
            seed=0,
            eos_ids=(),
            max_model_len=self._decoder.config.max_position_embeddings,
        )
        answer = Answer(generation, None)
        choices: list[RestoreChoice | None] = []
        stored: StoredPrefix | None = None
        times: Sequence[RestoreTimes | None] = ()
        begin_s = time.perf_counter()
        self._scheduler.add(generation)
        seconds = 0.0
        while True:
            step = self._scheduler.next_step()
            has_asked = await self._ask_store(choose, choices)
            if step is None and self._scheduler.awaits_rows:
                time.sleep(POLL_S)
                self._scheduler.note_restoring([self._executor.restoring])
                continue
            if step is None:
                if has_asked:
                    continue
                break
            results = [self._execute(step)]
            self._scheduler.advance(step, results)
            if step.plan.chunks:
                record = step_record(step, results, plan_s=0.0, wall_s=results[0].wall_s)
                part = step.plan.parts[0]
                answer.take(record, part, [results[0].sequences[0]])
                if isinstance(part, PrefillChunk) and part.behind_restored:
                    stored, _ = generation.restored[-1]
                    times = [result.sequences[0].restore for result in results]
            if generation.token_ids and not seconds:
                seconds = time.perf_counter() - begin_s
            if self._store.capture is not None:  # it has room for what is not written
                assert self._store.writer.flush(FLUSH_S)
        if not generation.token_ids:
            raise ClusterError("a prompt came to its end without a token")
        return FirstToken(
            token_id=generation.token_ids[0],
            seconds=seconds,
            choice=choices[0] if choices else None,
            restored=answer.restored[-1] if answer.restored else None,
            stored=stored,
            times=times,
        )

    async def _ask_store(self, choose: Choose, choices: list[RestoreChoice | None]) -> bool:
        """Look up what the scheduler wants, and return leases, as the engine does."""
        offload = self._scheduler.offload
        assert offload is not None
        lookups = offload.take_lookups()
        for stored in offload.take_returned():
            await self._finder.release(stored)
        for lookup in lookups:
            found = await self._finder.find(lookup)
            choice = None if found is None else choose(found)
            choices.append(choice)
            prefix = None
            if found is not None and choice is not None:
                prefix = await self._finder.stage(found, choice)
            self._scheduler.found(lookup, prefix)
        return bool(lookups)

    def _execute(self, step: Step) -> StepResult:
        """Execute a plan, as `actors.worker` does."""
        start_s, timer = time.perf_counter(), PartTimer(self._decoder.device)
        sequences = self._executor.execute(step.plan, timer)
        parts_s = timer.seconds()
        return StepResult(
            rank=0,
            number=step.plan.number,
            sequences=sequences,
            parts_s=parts_s,
            wall_s=time.perf_counter() - start_s,
            restoring=self._executor.restoring,
        )


def load_all(found: StoredBlocks) -> RestoreChoice:
    """Have all of it loaded, and nothing recomputed."""
    return RestoreChoice(recompute_to=found.lookup.start)


class _Handle:
    """The store as the finder reaches it."""

    host = HOST

    def __init__(self, store: KVStore, flight_address: str) -> None:
        self._store = store
        self.flight_address = flight_address

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """See `actors.kv.finder.StoreHandle`."""
        return getattr(self._store, method)(*args)
