"""One rank on one device, driven as a worker drives it, without Ray and without a process group."""

import torch
from torch import Tensor

from actors.choice import Chooser
from actors.device_cache import DeviceCache
from actors.scheduler import Scheduler
from actors.step_sizes import Limits
from actors.worker import GPUWorker
from attention.ring import PendingExchange
from attention.timing import PartTimer
from models.decoder import Decoder
from models.layer_attention import DecodeAttention, NewRows, PrefillAttention
from models.page_pool import PagePool
from models.rates import model_shape

PAGE_TOKENS = 256
SEQUENCE = 0
BURST_STEPS = 16


class LoneRing:
    """A `Ring` of one rank, which has nobody to exchange with."""

    rank = 0
    size = 1

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        """See `Ring.exchange`."""
        raise AssertionError("a ring of one rank has nobody to exchange with")

    def all_gather(self, part: Tensor) -> Tensor:
        """See `Ring.all_gather`."""
        return part.unsqueeze(0)


def new_pool(decoder: Decoder, num_tokens: int) -> PagePool:
    """Return a pool of pages for so many tokens of this model."""
    config = decoder.config
    return PagePool(
        num_layers=config.num_layers,
        num_pages=-(-num_tokens // PAGE_TOKENS),
        page_tokens=PAGE_TOKENS,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
    )


class OneRank:
    """A model and its pages, with one sequence at a time."""

    def __init__(self, decoder: Decoder, pool: PagePool) -> None:
        """Take a model and pages that are enough for what is asked."""
        self._decoder = decoder
        self._pool = pool
        self._ring = LoneRing()
        self.parts_s: dict[str, float] = {}  # of the last prefill

    def prefill(self, ids_T: Tensor, *, all_rows: bool = False) -> Tensor:
        """Compute a sequence anew; return the greedy token after its last token, or after all."""
        num_tokens, device = len(ids_T), self._decoder.device
        timer = PartTimer(device)
        self._grow_anew(num_tokens)
        rows = NewRows(sequence_id=SEQUENCE, first_row=0, count=num_tokens, query_rank=0)
        hidden_TE = self._decoder.forward(
            ids_T,
            torch.arange(num_tokens, device=device),
            PrefillAttention(
                [],
                [rows],
                self._pool,
                self._ring,
                None,
                timer,
                last_layer=None if all_rows else self._decoder.config.num_layers - 1,
            ),
            timer,
            keep_rows=None if all_rows else [num_tokens - 1],
        )
        greedy_T = self._decoder.logits(hidden_TE).argmax(-1)
        self.parts_s = timer.seconds()
        return greedy_T

    def fill(self, num_tokens: int) -> None:
        """Set up a sequence of so many tokens with random keys and values instead of a prefill."""
        self._grow_anew(num_tokens)
        self._pool._pages.normal_()

    def decode(self, token_id: int) -> int:
        """Compute the token after the sequence's last; return the greedy next one."""
        device, timer = self._decoder.device, PartTimer(self._decoder.device)
        position = self._pool.table.run(SEQUENCE).num_rows
        self._pool.table.grow(SEQUENCE, [(position, 1)])
        rows = NewRows(sequence_id=SEQUENCE, first_row=position, count=1)
        hidden_1E = self._decoder.forward(
            torch.tensor([token_id], device=device),
            torch.tensor([position], device=device),
            DecodeAttention([], [rows], self._pool, self._ring, timer),
            timer,
        )
        return int(self._decoder.logits(hidden_1E)[0].argmax())

    def _grow_anew(self, num_tokens: int) -> None:
        self._pool.table.release(SEQUENCE)
        self._pool.table.grow(SEQUENCE, [(0, num_tokens)])


def lone_scheduler(worker: GPUWorker) -> Scheduler:
    """Return a scheduler of one rank that computes every prompt anew."""
    cache = DeviceCache(
        num_ranks=1,
        num_pages=worker._pool.table.num_pages,
        page_tokens=PAGE_TOKENS,
        shares=False,
    )
    decoder = worker._decoder
    shape = model_shape(decoder.config, decoder.dtype.itemsize)
    return Scheduler(
        cache,
        Chooser("pass_kv", shape, None, 1),
        Limits(
            decode_block_tokens=BURST_STEPS,
            burst_steps=BURST_STEPS,
            max_num_seqs=1,
            max_num_batched_tokens=cache.rows_per_rank,
            max_queued_requests=1,
        ),
    )
