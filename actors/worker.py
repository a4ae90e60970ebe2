"""One rank: a model, a pool of KV pages and its place in the ring.

One Ray actor per GPU runs this class (see `actors.remote`), but the class knows
nothing of Ray: tests run several of them as threads of one process.
"""

import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from actors.device_memory import available_kv_bytes
from actors.errors import PlacementError
from actors.messages import DecodePlan, Plan, PrefillPlan, StepResult, WorkerInfo, WorkerSpec
from actors.sampler import Sampler
from attention import PassKVAttention, Ring, Zigzag
from attention.ring import connect_ring
from attention.timing import PartTimer
from models.config import read_model_config
from models.decoder import Decoder
from models.layer_attention import DecodeAttention, PrefillAttention
from models.logprobs import TokenLogprobs, logprobs_in_pieces
from models.page_pool import PagePool
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
        self._rounds_done = 0
        self._rounds = 0
        self._decoder: Decoder
        self._pool: PagePool
        self._ring: Ring
        self._sampler: Sampler

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
        self._sampler = Sampler(config.vocab_size, self._device)
        return WorkerInfo(
            rank=spec.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=str(self._device),
            dtype=str(dtype).removeprefix("torch."),
            weights_bytes=weights_bytes(config, dtype),
            kv_bytes_per_token=(
                config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
            ),
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
        )

    def connect(
        self, host: str, port: int, generation: int, *, ring_timeout_s: float, piece_bytes: int
    ) -> None:
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
                piece_bytes=piece_bytes,
            )
        )

    def join(self, ring: Ring) -> None:
        """Take this rank's end of a ring."""
        self._ring = ring

    def execute(self, plan: Plan) -> StepResult:
        """Run all layers and all ring rounds of one plan; every rank gets the same plan.

        Raises:
            RuntimeError: A peer was lost or did not answer in time.
        """
        start_s, timer = time.perf_counter(), PartTimer(self._device)
        for sequence_id in plan.release:
            self._pool.release(sequence_id)
            self._sampler.release(sequence_id)
        prompt_logprobs: TokenLogprobs | None = None
        if isinstance(plan, PrefillPlan):
            token_ids, prompt_logprobs = self._prefill(plan, timer)
        else:
            token_ids = self._decode(plan, timer)
        return StepResult(
            rank=self._spec.rank,
            number=plan.number,
            token_ids=token_ids,
            parts_s=timer.seconds(),
            wall_s=time.perf_counter() - start_s,
            logprobs=self._sampler.take_logprobs(),
            prompt_logprobs=prompt_logprobs,
        )

    def progress(self) -> float:
        """Return the share of the prefill under way that is done, 0 to 1."""
        return self._rounds_done / max(1, self._rounds)

    def ping(self) -> int:
        """Say that this rank is alive."""
        return self._spec.rank

    def _prefill(
        self, plan: PrefillPlan, timer: PartTimer
    ) -> tuple[tuple[int, ...], TokenLogprobs | None]:
        ring = self._ring
        zigzag = Zigzag(num_tokens=len(plan.token_ids), num_ranks=ring.size)
        indices_T = zigzag.indices(ring.rank)
        ids_T = torch.from_numpy(plan.token_ids).long()[indices_T].to(self._device)
        self._pool.grow(plan.sequence_id, len(ids_T))
        self._rounds_done, self._rounds = 0, self._decoder.config.num_layers * ring.size
        around_ring = PassKVAttention(zigzag, ring, timer, on_round=self._count_round)
        samples = ring.rank == plan.sampling_rank
        last_row = [len(ids_T) - 1] if samples else []
        hidden_TE = self._decoder.forward(
            ids_T,
            zigzag.positions(ring.rank).to(self._device),
            PrefillAttention(plan.sequence_id, self._pool, around_ring, timer),
            timer,
            keep_rows=last_row if plan.prompt_logprobs is None else None,
        )
        prompt_logprobs = None
        if plan.prompt_logprobs is not None:
            prompt_logprobs = self._prompt_logprobs(hidden_TE, indices_T, plan, timer)
            hidden_TE = hidden_TE[last_row]
        if samples:
            self._sampler.begin(plan)
        token_id, _ = self._choose(hidden_TE, plan, plan.answer_tokens, timer)
        return (token_id,), prompt_logprobs

    def _prompt_logprobs(
        self, hidden_TE: Tensor, indices_T: Tensor, plan: PrefillPlan, timer: PartTimer
    ) -> TokenLogprobs:
        """Return the log-probabilities of the tokens that follow this rank's own in the prompt."""
        assert plan.prompt_logprobs is not None
        next_T = torch.from_numpy(plan.token_ids).long()[1:]
        # Nothing follows the last token.
        before_next_R = indices_T[indices_T < len(next_T)]
        with timer("sample"):
            return logprobs_in_pieces(
                self._decoder.logits,
                hidden_TE[: len(before_next_R)],
                next_T[before_next_R].to(self._device),
                plan.prompt_logprobs,
                self._decoder.config.vocab_size,
            )

    def _decode(self, plan: DecodePlan, timer: PartTimer) -> tuple[int, ...]:
        token_id, token_ids = plan.token_id, []
        for step, owner in enumerate(plan.owners):
            keeps_kv = owner == self._ring.rank
            if keeps_kv:
                self._pool.grow(plan.sequence_id, 1)
            hidden_1E = self._decoder.forward(
                torch.tensor([token_id], device=self._device),
                torch.tensor([plan.position + step], device=self._device),
                DecodeAttention(plan.sequence_id, self._pool, self._ring, timer, keeps_kv=keeps_kv),
                timer,
            )
            token_id, stop = self._choose(hidden_1E, plan, plan.index + step, timer)
            token_ids.append(token_id)
            if stop:
                break
        return tuple(token_ids)

    def _choose(
        self, hidden_1E: Tensor, plan: Plan, index: int, timer: PartTimer
    ) -> tuple[int, bool]:
        """Sample on the sampling rank; tell all ranks the token and whether it ends the answer."""
        choice = torch.zeros(2, dtype=torch.int64)
        if self._ring.rank == plan.sampling_rank:
            with timer("sample"):
                logits_V = self._decoder.logits(hidden_1E)[0]
                choice = torch.tensor(self._sampler.choose(logits_V, plan, index))
        if self._ring.size > 1:
            with timer("wait"):
                choice = choice.to(self._device)
                self._ring.broadcast(choice, plan.sampling_rank)
        token_id, stop = choice.tolist()
        return token_id, bool(stop)

    def _count_round(self) -> None:
        self._rounds_done += 1

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
