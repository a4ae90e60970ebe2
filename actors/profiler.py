"""Measure what a ring does in a second: the rates from which steps are priced.

All ranks call `measure` at once. They compute at the same time and exchange
beside computation, as in a step: on CPU the ranks of a host and gloo's threads
share its cores and its memory, and a rate measured alone would promise too much.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from actors.stopwatch import Stopwatch, measured_curve
from attention import Ring, attend, merge_into
from attention.timing import PartTimer
from models.decoder import Decoder
from models.page_pool import KVCacheDtype, PagePool
from models.rates import Affine, Rates

KiB, MiB = 2**10, 2**20
# Tokens, or queries. The last ones are for fast devices; others leave them out.
SIZES = (1, 16, 64, 256, 1024, 2048, 4096, 16384)
KEYS = 2048  # of each layer, that queries attend to
JITTER_RUNS = 16
PATIENCE_S = 8.0
MANY_LAYERS = 8  # whose weights no cache holds together
SMALL_BYTES, LARGE_BYTES = 4 * KiB, 8 * MiB  # of messages
INSTANT = Affine(0.0, 1e15)  # a ring of one sends nothing


def measure(
    decoder: Decoder,
    ring: Ring,
    *,
    page_tokens: int = 256,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> Rates:
    """Return the rates of this model on this ring, the same on every rank.

    Each is the lower quartile of a few runs, on the slowest rank: what disturbs a
    machine now and then is no rate of it. It takes two to four seconds; of a slow
    model fewer sizes are measured.
    """
    profile = _Profile(decoder, ring, page_tokens, kv_cache_dtype)
    with torch.inference_mode():
        return profile.rates()


class _Profile:
    """One rank's part of a measurement. All ranks make the same calls in the same order."""

    def __init__(
        self, decoder: Decoder, ring: Ring, page_tokens: int, kv_cache_dtype: KVCacheDtype
    ) -> None:
        self._decoder = decoder
        self._config = decoder.config
        self._device = decoder.device
        self._clock = Stopwatch(ring, decoder.device, patience_s=PATIENCE_S)
        self._ring = ring
        # As in a step, each layer has keys of its own: no cache holds those of the last run.
        num_layers = min(self._config.num_layers, MANY_LAYERS)
        self._pool = PagePool(
            num_layers=num_layers,
            num_pages=-(-KEYS // page_tokens),
            page_tokens=page_tokens,
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            dtype=decoder.dtype,
            device=self._device,
            kv_cache_dtype=kv_cache_dtype,
        )
        self._pool.table.grow(0, [(0, KEYS)])
        self._layer = itertools.cycle(range(num_layers))
        self._kv_LSJD = [self._kv(KEYS) for _ in range(num_layers)]
        for layer, kv_SJD in enumerate(self._kv_LSJD):
            self._pool.store(layer, 0, 0, kv_SJD)

    def rates(self) -> Rates:
        """Measure everything."""
        seconds = self._clock.seconds
        call_s = seconds(lambda: self._attend(1, 1))
        hop = collective = INSTANT
        overlap = 0.0
        if self._ring.size > 1:
            hop = self._law(lambda message: self._exchange(message, lambda: None))
            overlap = self._overlap(hop)
            collective = self._law(self._ring.all_gather, LARGE_BYTES // self._ring.size)
        return Rates(
            linear=measured_curve(self._linear_s, SIZES),
            causal_key=measured_curve(self._causal_s, SIZES[1:], per_key=True),
            dense_key=measured_curve(
                lambda n: (seconds(lambda: self._attend(n, KEYS)) - call_s) / KEYS, SIZES[:5]
            ),
            paged_key=measured_curve(
                lambda n: (seconds(lambda: self._attend_pages(n)) - call_s) / KEYS, SIZES[:5]
            ),
            call_s=call_s,
            merge=measured_curve(self._merge_s, SIZES[1:5]),
            store=self._copying(lambda layer, kv_SJD: self._pool.store(layer, 0, 0, kv_SJD)),
            gather=self._copying(self._gather),
            hop=hop,
            returns=hop,
            collective=collective,
            overlap=overlap,
            jitter=self._jitter(),
            step_s=self._step_s(),
        )

    def _linear_s(self, tokens: int) -> float:
        """One layer of so many tokens, without attention."""
        layers = min(self._config.num_layers, MANY_LAYERS if tokens <= 16 else 1)
        decoder = self._decoder.first_layers(layers)

        def run() -> float:
            timer = PartTimer(self._device)
            self._forward(decoder, tokens, timer)
            return timer.seconds()["gemm"]

        return self._clock.quartile(run) / layers

    def _step_s(self) -> float:
        """What a step of one token does outside of its layers."""
        decoder = self._decoder.first_layers(1)

        def run() -> float:
            timer, start_s = PartTimer(self._device), time.perf_counter()
            int(decoder.logits(self._forward(decoder, 1, timer)).argmax())
            return time.perf_counter() - start_s - timer.seconds()["gemm"]

        return self._clock.quartile(run)

    def _forward(self, decoder: Decoder, tokens: int, timer: PartTimer) -> Tensor:
        ids_T = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        return decoder.forward(ids_T, ids_T, _no_attention, timer)

    def _causal_s(self, tokens: int) -> float:
        """Causal attention of so many queries, for each of as many keys."""
        q_THD, kv_TJD = self._q(tokens), self._kv(tokens)
        run_s = self._clock.seconds(lambda: attend(q_THD, *kv_TJD.chunk(2, dim=1), causal=True))
        return run_s / tokens

    def _attend(self, queries: int, keys: int) -> None:
        kv_SJD = self._kv_LSJD[next(self._layer)]
        attend(self._q(queries), *kv_SJD[:keys].chunk(2, dim=1))

    def _attend_pages(self, queries: int) -> None:
        self._pool.rows(next(self._layer), 0, KEYS).attend(self._q(queries))

    def _gather(self, layer: int, kv_SJD: Tensor) -> None:
        self._pool.rows(layer, 0, KEYS).copy_into(0, torch.empty_like(kv_SJD))

    def _merge_s(self, rows: int) -> float:
        out_THD = torch.zeros(self._q(rows).shape, device=self._device)
        lse_TH = out_THD[..., 0].clone()
        part_THD, part_lse_TH = out_THD.clone(), lse_TH.clone()
        return self._clock.seconds(lambda: merge_into(out_THD, lse_TH, part_THD, part_lse_TH))

    def _copying(self, copy: Callable[[int, Tensor], object]) -> Affine:
        """Return the law of copying a layer's rows of keys and values."""

        def copy_rows(count: int) -> None:
            layer = next(self._layer)
            copy(layer, self._kv_LSJD[layer][:count])

        one_s = self._clock.seconds(lambda: copy_rows(1))
        all_s = self._clock.seconds(lambda: copy_rows(KEYS))
        kv_SJD = self._kv_LSJD[0]
        return Affine.through((kv_SJD[:1].nbytes, one_s), (kv_SJD.nbytes, all_s))

    def _law(self, send: Callable[[Tensor], object], large_bytes: int = LARGE_BYTES) -> Affine:
        """Return the law of something that all ranks send at once."""
        small, large = self._message(SMALL_BYTES), self._message(large_bytes)
        small_s = self._clock.collective_s(lambda: send(small))
        large_s = self._clock.collective_s(lambda: send(large))
        return Affine.through((SMALL_BYTES, small_s), (large_bytes, large_s))

    def _overlap(self, hop: Affine) -> float:
        """How much of a hop fails to hide behind computation that takes as long."""

        def compute() -> None:
            self._attend(256, KEYS)

        compute_s = self._clock.seconds(compute)
        num_bytes = int((compute_s - hop.latency_s) * hop.bytes_per_s)
        message = self._message(min(max(num_bytes, SMALL_BYTES), 4 * LARGE_BYTES))
        hop_s = self._clock.collective_s(lambda: self._exchange(message, lambda: None))
        both_s = self._clock.collective_s(lambda: self._exchange(message, compute))
        shared_s = both_s - max(hop_s, compute_s)
        return min(max(shared_s / min(hop_s, compute_s), 0.0), 1.0)

    def _jitter(self) -> float:
        """By how much the slowest rank is later than the mean, where all do the same."""
        runs_s = [
            self._clock.of_all(lambda: self._attend(256, KEYS))
            for _ in range(JITTER_RUNS if self._ring.size > 1 else 1)
        ]
        mean_s = sum(map(statistics.fmean, runs_s))
        return sum(map(max, runs_s)) / mean_s - 1

    def _exchange(self, message: Tensor, compute: Callable[[], object]) -> None:
        pending = self._ring.exchange(message, torch.empty_like(message))
        compute()
        pending.wait()

    def _q(self, tokens: int) -> Tensor:
        shape = (tokens, self._config.num_heads, self._config.head_dim)
        return torch.zeros(shape, dtype=self._decoder.dtype, device=self._device)

    def _kv(self, tokens: int) -> Tensor:
        shape = (tokens, 2 * self._config.num_kv_heads, self._config.head_dim)
        return torch.zeros(shape, dtype=self._decoder.dtype, device=self._device)

    def _message(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)


def _no_attention(layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
    return q_THD.float()
