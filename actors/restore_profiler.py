"""Measure what it takes to bring KV back, each part under the load that it will meet.

All ranks call `measure_restore` at once. Bytes are moved while a thread computes as a prefill
does, and layer inputs are projected while a thread moves bytes: on CPU the two share cores and
memory, and a split by rates that were measured alone costs more than it saves. What is
believed is the upper quartile, on the slowest rank: a plan that expects too much of the link
or of the device loses more than one that expects too little.

Letters: T = tokens, S = tokens of a piece; E, J, K, D as in `models.decoder`.
"""

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.keys import TAG_BYTES
from actors.kv.link import Link
from actors.kv.messages import Lease
from actors.kv.piece_sizes import encoded_layer_bytes, record_of
from actors.kv.pieces import KEY_BYTES, BadPiece, Layout, PieceId, checksum, verify_layer
from actors.stopwatch import Stopwatch, measured_curve
from attention import Ring, attend
from attention.timing import PartTimer
from models.decoder import Decoder
from models.kv_codec import Encoding, decode, encode
from models.page_pool import KVCacheDtype, PagePool, Spans
from models.rates import Affine
from models.restore_rates import RestoreRates

MiB = 2**20
PATIENCE_S = 1.0  # in all it takes about twice that
SMALL_TOKENS = 16  # of a piece, or a quarter of a block where that is less
PROJECTED_TOKENS = (16, 64, 256, 1024, 2048)  # pieces, and groups of them
LEASED_BYTES = 32 * MiB  # of the arena: no cache holds what is copied in turn
MOST_PIECES = 16  # that are leased
FETCHED = 8  # ranges at a time
MANY_LAYERS = 8  # whose pages no cache holds together
COMPUTED_TOKENS = {"cpu": 256, "cuda": 1024}  # at a time, beside what is measured
BEGIN_S = 5.0  # for the first run of what goes on beside a measurement


def measure_restore(
    decoder: Decoder,
    ring: Ring,
    arena: Arena,
    layout: Layout,
    client: StoreClient,
    link: Link,
    *,
    encoding: Encoding,
    page_tokens: int = 256,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> RestoreRates | None:
    """Return the rates between this rank and its host's arena, the same on every rank.

    Pieces are in ``encoding``. None on every rank where the store of one is lost or full.
    It takes one or two seconds, of a slow model few sizes; nothing stays in the store.
    """
    stopwatch = Stopwatch(ring, decoder.device, patience_s=PATIENCE_S, upper=True)
    leases = _reserve(client, layout, encoding, owner=f"rank-{ring.rank}")
    try:
        if stopwatch.slowest(0.0 if leases else 1.0):
            return None
        pool = _pool(decoder, layout, page_tokens, kv_cache_dtype)
        profile = _Profile(decoder, stopwatch, pool, arena, layout, link, leases, encoding)
        with torch.inference_mode(), _stream(decoder.device):
            return profile.rates()
    finally:
        if leases:
            with suppress(StoreLost):
                client.call("abort", [lease.lease_id for lease in leases])


def compute_for(decoder: Decoder, seconds: float) -> None:
    """Compute as a prefill does, for a time: others measure beside it."""
    until_s, compute = time.monotonic() + seconds, _prefill(decoder)
    while time.monotonic() < until_s:
        compute()


class _Profile:
    """One rank's part of a measurement. All ranks make the same calls in the same order."""

    def __init__(
        self,
        decoder: Decoder,
        stopwatch: Stopwatch,
        pool: PagePool,
        arena: Arena,
        layout: Layout,
        link: Link,
        leases: Sequence[Lease],
        encoding: Encoding,
    ) -> None:
        self._decoder = decoder
        self._stopwatch = stopwatch
        self._pool = pool
        self._layer = itertools.cycle(range(layout.num_layers))
        self._pool_layers = _pool_layers(layout)
        block = layout.block_tokens
        small = min(SMALL_TOKENS, block // 4)
        self._small, self._large = (
            _Copies(pool, arena, layout, link, leases, encoding, tokens)
            for tokens in (small, block)
        )

    def rates(self) -> RestoreRates | None:
        """Measure everything; None where somebody wrote into the leased places meanwhile."""
        seconds = self._stopwatch.seconds
        saves, loads = [], []
        with _beside(_prefill(self._decoder), nullcontext()):
            for copies in (self._small, self._large):
                copies.fill()
                saves.append((copies.layer_bytes, seconds(copies.save)))
                loads.append((copies.layer_bytes, seconds(copies.load) / FETCHED))
        with _beside(self._large.load, _stream(self._decoder.device)):
            project = measured_curve(self._project_s, PROJECTED_TOKENS)
        if self._stopwatch.slowest(self._small.num_bad + self._large.num_bad):
            return None
        return RestoreRates(
            load=Affine.through(*loads), save=Affine.through(*saves), project=project
        )

    def _project_s(self, tokens: int) -> float:
        """One layer of so many tokens' inputs, into pages."""
        decoder, pool = self._decoder, self._pool
        device = decoder.device
        inputs_TE = torch.randn(tokens, decoder.config.hidden_size, device=device)
        inputs_TE = inputs_TE.to(decoder.dtype)
        cos_sin = decoder.rotations(torch.arange(tokens, device=device))
        spans = _spans(pool, tokens)

        def run() -> None:
            layer = next(self._layer)
            kv_TJD = decoder.project_inputs(layer, inputs_TE, cos_sin)
            kv_2KTD = kv_TJD.unflatten(1, (2, -1)).permute(1, 2, 0, 3)
            pool.write_rows(layer % self._pool_layers, spans, kv_2KTD)

        return self._stopwatch.seconds(run)


@dataclass(eq=False)
class _Range:
    """One layer of one piece in the arena, and where its rows are from."""

    offset_bytes: int
    layer: int  # of the pages
    checksum: bytes = b""


class _Copies:
    """Layers of pieces of so many tokens on their way, as writer and loader move them.

    They take turns, over more bytes than caches hold.
    """

    def __init__(
        self,
        pool: PagePool,
        arena: Arena,
        layout: Layout,
        link: Link,
        leases: Sequence[Lease],
        encoding: Encoding,
        tokens: int,
    ) -> None:
        self._pool = pool
        self._arena = arena
        self._link = link
        self._encoding = encoding
        self._shape_2KSD = (2, layout.num_kv_heads, tokens, layout.head_dim)
        self._spans = _spans(pool, tokens)
        self.layer_bytes = encoded_layer_bytes(_piece(encoding, tokens), layout)
        self.num_bad = 0  # ranges that were found to be other than they were written
        places = record_of(_piece(encoding, layout.block_tokens), layout)
        self._ranges = [
            _Range(
                lease.offset_bytes + places.payload_offset + layer * places.layer_bytes,
                layer % _pool_layers(layout),
            )
            for lease in leases
            for layer in range(layout.num_layers)
        ]
        self._turn = itertools.cycle(self._ranges)

    def fill(self) -> None:
        """Write every range once: memory that was never written is slow at first."""
        for _ in self._ranges:
            self.save()

    def save(self) -> None:
        """Copy one layer of a piece out of its pages, as `actors.kv.writer` does."""
        to = next(self._turn)
        data = self._arena.view(to.offset_bytes, self.layer_bytes)
        rows_2KSD = self._rows(data)
        self._pool.read_rows(to.layer, self._spans, rows_2KSD)
        _synchronize(self._pool.device)
        if self._encoding != "raw":
            encode(self._encoding, rows_2KSD, torch.frombuffer(data, dtype=torch.uint8))
        to.checksum = checksum(data)

    def load(self) -> None:
        """Bring one layer of some pieces into their pages, as `actors.kv.loader` does."""
        ranges = list(itertools.islice(self._turn, FETCHED))
        views = self._link.fetch([(each.offset_bytes, self.layer_bytes) for each in ranges])
        for each, data in zip(ranges, views, strict=True):
            try:
                verify_layer(data, each.checksum)
            except BadPiece:  # a lease that is over; what follows costs the same
                self.num_bad += 1
            rows_2KSD = self._rows(data)
            if self._encoding != "raw":
                decode(self._encoding, torch.frombuffer(data, dtype=torch.uint8), rows_2KSD)
            self._pool.write_rows(each.layer, self._spans, rows_2KSD)
        _synchronize(self._pool.device)  # copies must not pile up

    def _rows(self, data: memoryview) -> Tensor:
        """Return ``kv_2KSD``: these bytes themselves, or room for what they are codes of."""
        dtype = self._pool.dtype
        if self._encoding != "raw":
            return torch.empty(self._shape_2KSD, dtype=dtype)
        size_bytes = torch.Size(self._shape_2KSD).numel() * dtype.itemsize
        payload = torch.frombuffer(data, dtype=torch.uint8)[:size_bytes]
        return payload.view(dtype).view(self._shape_2KSD)


def _reserve(client: StoreClient, layout: Layout, encoding: Encoding, *, owner: str) -> list[Lease]:
    """Lease places in the arena, of nobody's blocks and in nobody's quota."""
    size_bytes = record_of(_piece(encoding, layout.block_tokens), layout).size_bytes
    count = min(max(LEASED_BYTES // size_bytes, 1), MOST_PIECES)
    wanted = [(_piece(encoding, layout.block_tokens), size_bytes) for _ in range(count)]
    try:
        leases: list[Lease | None] = client.call(
            "reserve", secrets.token_bytes(TAG_BYTES), owner, wanted
        )
    except StoreLost:
        return []
    return [lease for lease in leases if lease is not None]


def _piece(encoding: Encoding, tokens: int) -> PieceId:
    """Return a piece that nobody looks for."""
    return PieceId(secrets.token_bytes(KEY_BYTES), 0, tokens, encoding)


def _pool(
    decoder: Decoder, layout: Layout, page_tokens: int, kv_cache_dtype: KVCacheDtype
) -> PagePool:
    """Return pages to measure with: the rank's own may hold rows."""
    num_pages = -(-max(*PROJECTED_TOKENS, layout.block_tokens) // page_tokens)
    pool = PagePool(
        num_layers=_pool_layers(layout),
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
        kv_cache_dtype=kv_cache_dtype,
    )
    tokens = num_pages * page_tokens
    rows_2KSD = torch.zeros(2, layout.num_kv_heads, tokens, layout.head_dim, dtype=decoder.dtype)
    for layer in range(_pool_layers(layout)):
        pool.write_rows(layer, _spans(pool, tokens), rows_2KSD)
    return pool


def _pool_layers(layout: Layout) -> int:
    return min(layout.num_layers, MANY_LAYERS)


def _spans(pool: PagePool, tokens: int) -> Spans:
    """Return where the first rows lie, whoever has those pages."""
    return pool.spans(range(-(-tokens // pool.table.page_tokens)), 0, tokens)


def _prefill(decoder: Decoder) -> Callable[[], None]:
    """Return what computes one layer of a prompt's chunk, attention and all."""
    device, first_layer = decoder.device, decoder.first_layers(1)
    ids_T = torch.zeros(COMPUTED_TOKENS[device.type], dtype=torch.int64, device=device)

    def compute() -> None:
        first_layer.forward(ids_T, ids_T, _attend_to_chunk, PartTimer(device))
        _synchronize(device)

    return compute


def _attend_to_chunk(layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
    return attend(q_THD, *kv_TJD.chunk(2, dim=1), causal=True)[0]


def _synchronize(device: torch.device) -> None:
    """Wait for what this thread has launched."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """Use a stream of one's own, on CUDA."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


@contextmanager
def _beside(run: Callable[[], object], stream: AbstractContextManager[object]) -> Iterator[None]:
    """Have another thread do something again and again meanwhile."""
    has_begun, is_over = threading.Event(), threading.Event()

    def repeat() -> None:
        with torch.inference_mode(), stream:
            while not is_over.is_set():
                run()
                has_begun.set()

    with ThreadPoolExecutor(1, "beside-measurement") as thread:
        repeating = thread.submit(repeat)
        try:
            has_begun.wait(BEGIN_S)
            yield
        finally:
            is_over.set()
        repeating.result()
