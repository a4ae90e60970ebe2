"""One rank: a model, a pool of KV pages and its place in the ring.

One Ray actor per GPU runs this class (see `actors.remote`), but the class knows
nothing of Ray: tests run several of them as threads of one process.
"""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from actors.device_memory import available_kv_bytes
from actors.errors import PlacementError
from actors.executor import PlanExecutor
from actors.kv.client import Store
from actors.kv.link import DirectLink
from actors.kv.messages import StoreInfo
from actors.kv.pieces import Layout
from actors.kv.rank import RankStore
from actors.messages import Plan, StepResult, WorkerInfo, WorkerSpec
from actors.profile_file import device_name
from actors.profiler import measure
from actors.restore_profiler import compute_for, measure_restore
from attention import Ring
from attention.clocks import RankClock, ring_clock
from attention.ring import connect_ring
from attention.spans import SpanRecorder
from attention.timing import PartTimer
from attention.traced_ring import TracedRing
from models.config import read_model_config
from models.decoder import Decoder
from models.kv_codec import Encoding
from models.page_pool import PagePool, kv_bytes_per_token
from models.rates import Rates
from models.restore_rates import RestoreRates
from models.weights import load_weights, weights_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GPUWorker:
    """Executes plans on one rank. Bring it up by `load`, `allocate` and `join`, in this order.

    `execute` runs in one thread; `progress` and `ping` may be called from
    another one meanwhile.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Only store the spec: whatever can fail happens in `load` and reaches the caller."""
        self._spec = spec
        self._decoder: Decoder
        self._pool: PagePool
        self._ring: Ring
        self._executor: PlanExecutor
        self._recorder: SpanRecorder | None = None

    def load(self) -> WorkerInfo:
        """Read the checkpoint onto this rank's device.

        Raises:
            CheckpointError: It is missing, damaged or not supported.
            PlacementError: CUDA is asked for and torch sees no device.
        """
        start_s = time.perf_counter()
        spec, directory = self._spec, Path(self._spec.checkpoint)
        torch.set_num_threads(spec.threads)
        self._device = self._find_device()
        config = read_model_config(directory)
        dtype = config.dtype if spec.dtype == "auto" else DTYPES[spec.dtype]
        weights = load_weights(directory, config, device=self._device, dtype=dtype)
        self._decoder = Decoder(config, weights)
        return WorkerInfo(
            rank=spec.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=str(self._device),
            device_name=device_name(self._device),
            dtype=str(dtype).removeprefix("torch."),
            weights_bytes=weights_bytes(config, dtype),
            kv_bytes_per_token=kv_bytes_per_token(config, dtype, spec.kv_cache_dtype),
            kv_memory_bytes=spec.kv_cache_memory_bytes
            or available_kv_bytes(self._device, spec.gpu_memory_utilization, spec.ranks_on_host),
            load_s=time.perf_counter() - start_s,
        )

    def allocate(self, num_pages: int) -> None:
        """Allocate the page pool."""
        config = self._decoder.config
        self._pool = PagePool(
            num_layers=config.num_layers,
            num_pages=num_pages,
            page_tokens=self._spec.page_tokens,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self._decoder.dtype,
            device=self._device,
            kv_cache_dtype=self._spec.kv_cache_dtype,
        )

    def connect(self, host: str, port: int, generation: int, *, ring_timeout_s: float) -> None:
        """Join the ring of a generation through the coordinator's TCPStore.

        Raises:
            RuntimeError: A rank did not come within ``ring_timeout_s``.
        """
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self.join(
            connect_ring(
                dist.PrefixStore(f"generation-{generation}", store),
                self._spec.rank,
                self._spec.num_ranks,
                self._device,
                timeout_s=ring_timeout_s,
                piece_bytes=self._spec.piece_bytes,
            )
        )

    def join(self, ring: Ring) -> None:
        """Take this rank's end of a ring."""
        self._ring = ring
        self._executor = PlanExecutor(
            self._decoder, self._pool, ring, piece_bytes=self._spec.piece_bytes
        )

    def attach_store(
        self,
        stores: Sequence[tuple[Store, StoreInfo]],
        layout: Layout,
        encoding: Encoding,
        *,
        link_bytes_per_s: float | None = None,
    ) -> None:
        """Write finished blocks to a KV store from now on, and restore from it.

        ``stores`` are those of each rank's host; for the rest see `RankStore`.
        """
        rank = self._spec.rank
        self._executor.store = RankStore(
            self._pool,
            *stores[rank],
            layout,
            rank=rank,
            encoding=encoding,
            decoder=self._decoder,
            link_bytes_per_s=link_bytes_per_s,
        )

    def keep_activations(self, share: float, keeps_both: bool) -> None:
        """See `RankStore.keep_activations`."""
        assert self._executor.store is not None
        self._executor.store.keep_activations(share, keeps_both=keeps_both)

    def close(self) -> None:
        """End what this rank has beside its process's own threads."""
        if self._executor.store is not None:
            self._executor.store.close()

    def flush_store(self, timeout_s: float) -> bool:
        """Wait until what was finished is in the store; return whether it is."""
        store = self._executor.store
        return store is None or store.writer.flush(timeout_s)

    def profile(self) -> Rates:
        """Measure what this ring does in a second; all ranks at once, and all get the same."""
        return measure(
            self._decoder,
            self._ring,
            page_tokens=self._spec.page_tokens,
            kv_cache_dtype=self._spec.kv_cache_dtype,
        )

    def profile_restore(self) -> RestoreRates | None:
        """Measure what restores take; all ranks at once, and all get the same.

        None without a store, or where one has no room. The link is measured unthrottled.
        """
        store = self._executor.store
        if store is None:
            return None
        return measure_restore(
            self._decoder,
            self._ring,
            store.arena,
            store.layout,
            store.client,
            DirectLink(store.arena),
            encoding=store.encoding,
            page_tokens=self._spec.page_tokens,
            kv_cache_dtype=self._spec.kv_cache_dtype,
        )

    def compute_for(self, seconds: float) -> None:
        """Be busy as in a prefill: a store measures its disk beside it."""
        compute_for(self._decoder, seconds)

    def start_trace(self, max_spans: int) -> RankClock:
        """Record spans of the steps from now on, at most so many; every rank must be told."""
        self._recorder = SpanRecorder(self._device, max_spans)
        self._executor.ring = TracedRing(self._ring, self._recorder)
        return ring_clock(self._ring, self._device)

    def stop_trace(self) -> None:
        """Record no more."""
        self._recorder, self._executor.ring = None, self._ring

    def execute(self, plan: Plan) -> StepResult:
        """Run all layers and all ring rounds of one plan; every rank gets the same plan.

        Raises:
            RuntimeError: A peer was lost or did not answer in time.
        """
        start_s, timer = time.perf_counter(), PartTimer(self._device, self._recorder)
        sequences = self._executor.execute(plan, timer)
        parts_s, end_s = timer.seconds(), time.perf_counter()
        return StepResult(
            rank=self._spec.rank,
            number=plan.number,
            sequences=sequences,
            parts_s=parts_s,
            wall_s=end_s - start_s,
            restoring=self._executor.restoring,
            spans=None if self._recorder is None else self._recorder.take(start_s, end_s),
        )

    def progress(self) -> float:
        """Return the share of the prefill under way that is done, 0 to 1."""
        return self._executor.progress

    def restoring(self) -> dict[int, float]:
        """Return how far restores are: of each sequence the share of layers that is there."""
        return self._executor.restoring

    def ping(self) -> int:
        """Say that this rank is alive."""
        return self._spec.rank

    def clock_s(self) -> float:
        """Return this moment, as this rank's spans tell the time."""
        return time.perf_counter()

    def _find_device(self) -> torch.device:
        if self._spec.device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise PlacementError(
                f"rank {self._spec.rank} was given a GPU by Ray, but torch {torch.__version__} sees"
                " none there: install a CUDA build of torch, or pass --device cpu"
            )
        torch.cuda.set_device(0)  # Ray shows each worker its own GPU only
        return torch.device("cuda", 0)
