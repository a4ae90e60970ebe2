"""Write-behind: a rank's finished blocks go to its host's store while it computes on.

A thread copies rows out of their pages into the arena, computes checksums and commits.
Pages may be given to other rows meanwhile: whoever is about to write into one waits for
its copy first (`BlockWriter.wait_for`).
"""

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.messages import Lease, StoreBlocks
from actors.kv.pieces import Layout, PieceId, Record, checksum, write_header
from models.kv_codec import Encoding, encode, layer_bytes
from models.page_pool import PagePool, Spans
from models.page_table import Run

MAX_PENDING = 16384  # blocks; more are not stored
BATCH = 64  # pieces of one call of the store
PATIENCE_S = 30.0  # for the copy of a page that is about to be overwritten

_log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Order:
    """Blocks that are to be written, and where this rank's rows of them lie."""

    blocks: StoreBlocks
    run: Run  # as it was when they were complete
    page_ids: frozenset[int]  # that are read
    written: "torch.cuda.Event | None"  # after which the rows can be read
    is_void: bool = False  # pages are overwritten: what is not committed must not be


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One piece: which rows."""

    piece: PieceId
    spans: Spans


class BlockWriter:
    """One rank's writer. `submit` and `wait_for` are called by the thread that computes."""

    def __init__(
        self,
        pool: PagePool,
        arena: Arena,
        layout: Layout,
        client: StoreClient,
        *,
        owner: str,
        encoding: Encoding,
    ) -> None:
        """Start the thread."""
        self._pool = pool
        self._arena = arena
        self._layout = layout
        self._client = client
        self._owner = owner
        self._encoding = encoding
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: list[_Order] = []
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    def submit(self, blocks: StoreBlocks) -> None:
        """Have this rank's rows of some blocks written; what does not fit the queue is not."""
        table, tokens = self._pool.table, self._layout.block_tokens
        run, start = table.run(blocks.sequence_id), blocks.first_block * tokens
        first_row = run.rows_below(start)
        end_row = run.rows_below(start + len(blocks.keys) * tokens)
        with self._changed:
            waiting = sum(len(order.blocks.keys) for order in self._pending)
        if first_row == end_row or waiting > MAX_PENDING or self._client.is_lost:
            return
        written = None
        if self._stream is not None:
            written = torch.cuda.Event()
            written.record()
        rows = run.prefix(end_row, table.page_tokens)
        order = _Order(
            blocks=blocks,
            run=rows,
            page_ids=frozenset(rows.page_ids[first_row // table.page_tokens :]),
            written=written,
        )
        with self._changed:
            self._pending.append(order)
        self._orders.put(order)

    def wait_for(self, page_ids: Set[int]) -> None:
        """Return when no copy of these pages is left to make, or none that will be kept."""
        with self._changed:
            self._changed.wait_for(lambda: not self._readers(page_ids), PATIENCE_S)
            for order in self._readers(page_ids):
                order.is_void = True

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def _readers(self, page_ids: Set[int]) -> list[_Order]:
        return [order for order in self._pending if not order.page_ids.isdisjoint(page_ids)]

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            try:
                jobs = self._jobs(order)
                while not order.is_void and (batch := list(itertools.islice(jobs, BATCH))):
                    self._write(order, batch)
            except StoreLost:
                _log.warning("the KV store of this host is lost: blocks are not stored any more")
            except Exception:  # blocks that are not stored are computed again, no more
                _log.exception("blocks could not be stored")
            finally:
                with self._changed:
                    self._pending.remove(order)
                    self._changed.notify_all()

    def _jobs(self, order: _Order) -> Iterator[_Job]:
        tokens = self._layout.block_tokens
        for number, key in enumerate(order.blocks.keys, order.blocks.first_block):
            start = number * tokens
            for position, row, count in order.run.spans_between(start, start + tokens):
                first = position - start
                yield _Job(
                    piece=PieceId(key, first, first + count, self._encoding),
                    spans=self._pool.spans(order.run.page_ids, row, count),
                )

    def _write(self, order: _Order, jobs: Sequence[_Job]) -> None:
        wanted = [(job.piece, self._record(job).size_bytes) for job in jobs]
        leases: list[Lease | None] = self._client.call(
            "reserve", order.blocks.tenant, self._owner, wanted
        )
        done = [
            (lease.lease_id, self._fill(job, lease, order.written))
            for job, lease in zip(jobs, leases, strict=True)
            if lease is not None
        ]
        if done and order.is_void:
            self._client.call("abort", [lease_id for lease_id, _ in done])
        elif done:
            self._client.call("commit", done)

    def _record(self, job: _Job) -> Record:
        return Record(
            num_layers=self._layout.num_layers,
            layer_bytes=layer_bytes(
                self._encoding,
                num_tokens=job.piece.end - job.piece.start,
                num_kv_heads=self._layout.num_kv_heads,
                head_dim=self._layout.head_dim,
                dtype=self._pool.dtype,
            ),
        )

    def _fill(self, job: _Job, lease: Lease, written: "torch.cuda.Event | None") -> bytes:
        """Write a piece's record; return its seal."""
        record = self._arena.view(lease.offset_bytes, lease.size_bytes)
        where = self._record(job)
        with self._on_stream(written):
            for layer in range(where.num_layers):
                self._copy_layer(job, layer, where.layer(record, layer))
        if self._stream is not None:
            self._stream.synchronize()
        sums = [checksum(where.layer(record, layer)) for layer in range(where.num_layers)]
        return write_header(record, job.piece, self._layout, where, sums)

    @torch.inference_mode()
    def _copy_layer(self, job: _Job, layer: int, target: memoryview) -> None:
        shape = (
            2,
            self._layout.num_kv_heads,
            job.piece.end - job.piece.start,
            self._layout.head_dim,
        )
        data = torch.frombuffer(target, dtype=torch.uint8)
        if self._encoding == "raw":
            size = 2 * shape[1] * shape[2] * shape[3] * self._pool.dtype.itemsize
            rows_2KSD = data[:size].view(self._pool.dtype).view(shape)
            self._pool.read_rows(layer, job.spans, rows_2KSD)
            data[size:] = 0
        else:
            rows_2KSD = torch.empty(shape, dtype=self._pool.dtype)
            self._pool.read_rows(layer, job.spans, rows_2KSD)
            if self._stream is not None:
                self._stream.synchronize()
            encode(self._encoding, rows_2KSD, data)

    @contextlib.contextmanager
    def _on_stream(self, written: Any) -> Any:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(written)
            yield
