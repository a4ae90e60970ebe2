"""The coordinator: brings the ranks up, and takes calls for the engine that drives them.

An async Ray actor runs this class.
"""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup

from actors.choice import Chooser
from actors.cluster_info import ClusterInfo, size_pool
from actors.device_cache import DeviceCache
from actors.engine import Engine, StoreSide
from actors.errors import ClusterError
from actors.kv.pieces import Layout
from actors.kv.stores import CreateStore, Stores, is_lossy, store_bytes
from actors.messages import Plan, Progress, Request, RequestDelta, RequestOutput, WorkerSpec
from actors.offload import Offload
from actors.placement import Place, place
from actors.profile_file import ProfileFacts, ProfileFile, RestoreFacts, host_numbers
from actors.ranks import Ranks
from actors.requests import RequestReader
from actors.restore import RestorePlanner, RestoreRules
from actors.restore_profile import find_restore_rates
from actors.scheduler import Scheduler
from actors.step_sizes import Limits
from actors.texts import Text, Tokens, detokenize, tokenize
from actors.trace import Trace, Tracer
from actors.worker import DTYPES
from configs import Config
from models.config import ModelConfig, check_max_model_len, read_model_config
from models.rates import ModelShape, Rates, model_shape
from models.tokenizer import Tokenizer

STORE_ANSWER_S = 600.0  # a disk is verified in minutes
EMPTY_PLANS = 12  # by which the time is measured that handing out a plan takes


class Coordinator:
    """One model's cluster. All methods run in one event loop."""

    def __init__(
        self,
        config: Config,
        create_worker: Callable[[WorkerSpec, Any, Place], Any],
        create_store: CreateStore,
    ) -> None:
        """Only store; `start` does what can fail."""
        self._config = config
        self._create_worker = create_worker
        self._create_store = create_store
        self._stores: Stores | None = None
        self._runner: asyncio.Task[None] | None = None
        self._tracer = Tracer()
        self._group: PlacementGroup | None = None
        self._model: ModelConfig
        self._tokenizer: Tokenizer | None
        self._ranks: Ranks
        self._info: ClusterInfo
        self._engine: Engine

    async def start(self) -> ClusterInfo:
        """Place the ranks, load the model on each, allocate KV pages, form the ring.

        Raises:
            RingspanError: The checkpoint cannot be served, or the ranks cannot be placed.
        """
        config, directory = self._config, Path(self._config.model)
        self._model = await asyncio.to_thread(read_model_config, directory)
        check_max_model_len(self._model, config.max_model_len)
        device = _device(config)
        group, places = await asyncio.to_thread(
            place,
            config.context_parallel_size,
            device,
            config.ray.placement_timeout_s,
            config.ray.nodes_timeout_s,
        )
        self._group = group
        workers = [self._create_worker(self._spec(where, device), group, where) for where in places]
        self._ranks = Ranks(workers, places, config.ring)
        # The tokenizer is read while the ranks read their weights.
        self._tokenizer, infos = await asyncio.gather(
            asyncio.to_thread(Tokenizer.load, directory),
            self._ranks.call("load", timeout_s=config.ray.start_timeout_s),
        )
        self._info = size_pool(
            config,
            self._model.max_position_embeddings,
            infos,
            places,
            has_tokenizer=self._tokenizer is not None,
        )
        num_pages = self._info.kv_capacity_tokens // config.page_tokens // len(places)
        await self._ranks.call("allocate", num_pages, timeout_s=config.ray.start_timeout_s)
        await self._form_ring()
        capacity_bytes = store_bytes(config, device)
        if capacity_bytes:
            self._stores = await Stores.start(
                config,
                self._layout(),
                capacity_bytes,
                self._ranks,
                places,
                group,
                self._create_store,
            )
        rates = await self._find_rates()
        chooser = Chooser(config.ring.algorithm, self._shape(), rates, len(places))
        store_side = None if self._stores is None else await self._plan_restores(chooser, places)
        self._engine = self._make_engine(num_pages, chooser, store_side)
        self._ranks.watch()
        self._runner = asyncio.create_task(self._engine.run())
        return self._info

    async def generate(self, request: Request) -> RequestOutput:
        """Answer one request, beside others.

        Raises:
            PromptError: The prompt is empty, too long or cannot be read.
            SamplingError: A sampling parameter is not for this model.
            QueueFull: Too many requests wait.
            ClusterError: A rank was lost or a step failed.
        """
        return await self._engine.generate(request)

    async def stream(self, request: Request) -> AsyncIterator[RequestDelta]:
        """Answer one request piece by piece; raises as `generate`."""
        async for delta in self._engine.stream(request):
            yield delta

    async def cancel(self, request_id: str) -> None:
        """End a request with what it has; `UnknownRequest` where it is not under way."""
        self._engine.cancel(request_id)

    async def progress(self, request_id: str | None = None) -> list[Progress]:
        """Return how far prefills have come, of one request or of all; see `Engine.progress`."""
        return await self._engine.progress(request_id)

    async def tokenize(self, text: Text) -> Tokens:
        """Return a text's tokens; see `actors.texts.tokenize`."""
        return await asyncio.to_thread(tokenize, self._tokenizer, text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; see `actors.texts.detokenize`."""
        return await asyncio.to_thread(
            detokenize, self._tokenizer, token_ids, self._model.vocab_size
        )

    async def reset_prefix_cache(self) -> None:
        """Give up the KV of all answers that are complete."""
        self._engine.scheduler.cache.clear()

    async def ask_stores(self, method: str, salt: str | None = None) -> dict[str, Any]:
        """Return what each host's KV store says to ``stats``, ``verify`` or ``clear``.

        With a salt only that tenant's KV is cleared.
        """
        if self._stores is None:
            raise ClusterError("there is no KV store: set kv_store.host_memory_bytes")
        args = () if salt is None else (self._stores.keys.tenant(salt),)
        return await self._stores.ask_all(method, *args, timeout_s=STORE_ANSWER_S)

    async def status(self) -> dict[str, Any]:
        """Return what this cluster is and does, for people and programs."""
        failure = self._engine.failure
        stores = None
        if self._stores is not None:
            stores = await self._stores.ask_all("stats", timeout_s=1.0)
        return {
            **dataclasses.asdict(self._info),
            **self._engine.status(),
            "kv_store": stores,
            "failure": None if failure is None else str(failure),
        }

    async def start_trace(self) -> None:
        """See `actors.trace.Tracer.start`."""
        await self._tracer.start(self._ranks, self._info.num_ranks)

    async def stop_trace(self) -> Trace:
        """See `actors.trace.Tracer.stop`."""
        return await self._tracer.stop(self._ranks, self._info)

    async def stop(self) -> None:
        """End the ranks' processes; the coordinator itself is ended by its owner."""
        if self._runner is not None:
            self._runner.cancel()
        if self._stores is not None:
            await self._stores.stop(self._ranks)
        if hasattr(self, "_ranks"):
            self._ranks.kill()
        if self._group is not None:
            ray.util.remove_placement_group(self._group)

    async def _form_ring(self) -> None:
        """Host the rendezvous here: a store in a rank would die with it."""
        ring = self._config.ring
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        await self._ranks.call(
            "connect",
            host,
            self._store.port,
            0,
            ring_timeout_s=ring.timeout_s,
            timeout_s=self._config.ray.start_timeout_s,
        )

    async def _find_rates(self) -> Rates:
        """Return what this ring does in a second, as measured now or by an earlier start."""
        config, file = self._config, self._profile_file()
        rates = None if config.profile.refresh else await asyncio.to_thread(file.load)
        if rates is None:
            measured = await self._ranks.call("profile", timeout_s=config.ray.start_timeout_s)
            rates = dataclasses.replace(measured[0], dispatch_s=await self._dispatch_s())
            await asyncio.to_thread(file.save, rates)
        return rates

    def _profile_file(self) -> ProfileFile:
        config, workers = self._config, self._info.workers
        return ProfileFile(
            config.profile.directory,
            ProfileFacts(
                devices=tuple(worker.device_name for worker in workers),
                hosts=host_numbers(self._info.hosts),
                threads=config.threads_per_rank,
                dtype=workers[0].dtype,
                kv_cache_dtype=config.kv_cache_dtype,
                model=self._shape(),
            ),
        )

    async def _plan_restores(self, chooser: Chooser, places: Sequence[Place]) -> StoreSide:
        """Return who plans restores; what is stored how from now on follows from its rates."""
        config, stores = self._config, self._stores
        assert stores is not None
        rates = await find_restore_rates(
            self._ranks,
            stores.handles,
            self._profile_file(),
            RestoreFacts(
                block_tokens=config.kv_store.block_tokens,
                host_dtype=config.kv_store.host_dtype,
                disk_directory=config.kv_store.disk_directory,
            ),
            refresh=config.profile.refresh,
            timeout_s=config.ray.start_timeout_s,
        )
        rules = RestoreRules(
            method=config.restore.method,
            objective=config.restore.objective,
            activations="never" if is_lossy(config) else config.restore.activations,
            block_tokens=config.kv_store.block_tokens,
            max_chunk_tokens=config.max_num_batched_tokens,
            rank_hosts=tuple(where.host for where in places),
            copies_compute=self._info.workers[0].device == "cpu",
            link_bytes_per_s=config.restore.link_bytes_per_s,
        )
        planner = RestorePlanner(self._shape(), chooser, rates, rules)
        await asyncio.to_thread(planner.warm_up)
        await self._ranks.call(
            "keep_activations",
            planner.activation_share,
            config.restore.activations == "both",
            timeout_s=config.ray.start_timeout_s,
        )
        return StoreSide(stores.finder, planner)

    async def _dispatch_s(self) -> float:
        """Return what an empty plan takes: to all ranks and back, the lower quartile of some."""
        runs_s = []
        for _ in range(EMPTY_PLANS):
            start_s = time.perf_counter()
            plan = Plan(number=0, cache_ops=(), ended=(), chunks=(), rows=(), algorithm="pass_kv")
            await self._ranks.call(
                "execute", ray.put(plan), timeout_s=self._config.ray.start_timeout_s
            )
            runs_s.append(time.perf_counter() - start_s)
        return sorted(runs_s)[EMPTY_PLANS // 4]

    def _layout(self) -> Layout:
        model = self._model
        return Layout(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=self._info.workers[0].dtype,
            block_tokens=self._config.kv_store.block_tokens,
        )

    def _shape(self) -> ModelShape:
        return model_shape(self._model, DTYPES[self._info.workers[0].dtype].itemsize)

    def _make_engine(
        self, num_pages: int, chooser: Chooser, store_side: StoreSide | None
    ) -> Engine:
        config, info = self._config, self._info
        cache = DeviceCache(
            num_ranks=info.num_ranks,
            num_pages=num_pages,
            page_tokens=config.page_tokens,
            shares=config.enable_prefix_caching,
        )
        target_s = config.scheduler.step_target_s
        limits = Limits(
            decode_block_tokens=config.decode_block_tokens,
            burst_steps=config.scheduler.decode_burst_steps,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_queued_requests=config.scheduler.max_queued_requests,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            step_target_s=chooser.step_target_s() if target_s is None else target_s,
            decode_rides=config.scheduler.decode_rides,
        )
        reader = RequestReader(
            self._model,
            self._tokenizer,
            max_model_len=info.max_model_len,
            max_logprobs=config.max_logprobs,
        )
        offload = None
        if self._stores is not None:
            offload = Offload(self._stores.keys, config.kv_store.restore_min_tokens)
        return Engine(
            self._ranks,
            Scheduler(cache, chooser, limits, offload),
            chooser,
            reader,
            self._tracer,
            store_side,
        )

    def _spec(self, where: Place, device: Literal["cpu", "cuda"]) -> WorkerSpec:
        config = self._config
        cores = os.cpu_count() or 1
        return WorkerSpec(
            rank=where.rank,
            num_ranks=config.context_parallel_size,
            checkpoint=config.model,
            device=device,
            dtype=config.dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            page_tokens=config.page_tokens,
            piece_bytes=config.ring.piece_bytes,
            threads=config.threads_per_rank or max(1, cores // where.ranks_on_host),
            ranks_on_host=where.ranks_on_host,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        )


def _device(config: Config) -> Literal["cpu", "cuda"]:
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
