"""Write-behind: a rank's finished blocks go to its host's store while it computes on.

A thread copies rows out of their pages into the arena, computes checksums and commits.
Pages may be given to other rows meanwhile: whoever is about to write into one waits for
its copy first (`BlockWriter.wait_for`).
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.kv.activations import ActivationCapture, Captured
from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.messages import Lease, StoreBlocks
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import ACTIVATIONS, RAW, Layout, PieceId, checksum, write_header
from models.kv_codec import Encoding, encode
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
    captured: Sequence[Captured]  # activations of some of the rows, in order
    taken: "torch.cuda.Event | None"  # after which these can be read
    is_void: bool = False  # pages are overwritten: what is not committed must not be


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One piece: which rows, of pages or of activations."""

    piece: PieceId
    spans: Spans = ()
    captured: Sequence[Tensor] = ()  # ``rows_LSE``, one behind the other


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
        self.capture: ActivationCapture | None = None
        self._keeps_both = False
        self._pool = pool
        self._arena = arena
        self._layout = layout
        self._client = client
        self._owner = owner
        self._encoding = encoding
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()  # None: the end
        self._changed = threading.Condition()
        self._pending: list[_Order] = []
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    def keep_activations(self, capture: ActivationCapture | None, *, keeps_both: bool) -> None:
        """Write what ``capture`` takes as activations instead of KV, or beside it."""
        assert capture is None or self._encoding == RAW, "activations are kept only without loss"
        self.capture, self._keeps_both = capture, keeps_both

    def submit(self, blocks: StoreBlocks) -> None:
        """Have this rank's rows of some blocks written; what does not fit the queue is not."""
        table, tokens = self._pool.table, self._layout.block_tokens
        run, start = table.run(blocks.sequence_id), blocks.first_block * tokens
        first_row = run.rows_below(start)
        end = start + len(blocks.keys) * tokens
        end_row = run.rows_below(end)
        captured: list[Captured] = []
        taken = None
        if self.capture is not None:
            # From now on whoever cuts the sequence off does not reach them any more.
            captured = self.capture.take(blocks.sequence_id, start, end)
            taken = self.capture.taken()
        with self._changed:
            waiting = sum(len(order.blocks.keys) for order in self._pending)
        if first_row == end_row or waiting > MAX_PENDING or self._client.is_lost:
            self._release(captured)
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
            captured=captured,
            taken=taken,
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

    def close(self) -> None:
        """End the thread. What is not written yet never is: `flush` comes first."""
        with self._changed:
            for order in self._pending:
                order.is_void = True
        self._orders.put(None)
        self._thread.join()

    def _readers(self, page_ids: Set[int]) -> list[_Order]:
        return [order for order in self._pending if not order.page_ids.isdisjoint(page_ids)]

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                for batch in self._batches(order):
                    if order.is_void:
                        break
                    self._write(order, batch)
            except StoreLost:
                _log.warning("the KV store of this host is lost: blocks are not stored any more")
            except Exception:  # blocks that are not stored are computed again, no more
                _log.exception("blocks could not be stored")
            finally:
                self._release(order.captured)
                with self._changed:
                    self._pending.remove(order)
                    self._changed.notify_all()

    def _release(self, captured: Sequence[Captured]) -> None:
        if self.capture is not None:
            self.capture.release(captured)

    def _batches(self, order: _Order) -> Iterator[list[_Job]]:
        """Yield what is asked for in one call: never a row's KV without its activations."""
        batch: list[_Job] = []
        for jobs in self._jobs(order):
            batch += jobs
            if len(batch) >= BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _jobs(self, order: _Order) -> Iterator[list[_Job]]:
        """Yield the pieces of each span of rows that lie in one block."""
        tokens = self._layout.block_tokens
        captured: dict[int, list[Captured]] = {}
        for each in order.captured:
            captured.setdefault(each.start // tokens, []).append(each)
        for number, key in enumerate(order.blocks.keys, order.blocks.first_block):
            start = number * tokens
            for span in order.run.spans_between(start, start + tokens):
                yield self._span_jobs(order, key, start, span, captured.get(number, ()))

    def _span_jobs(
        self,
        order: _Order,
        key: bytes,
        block_start: int,
        span: tuple[int, int, int],
        captured: Sequence[Captured],
    ) -> list[_Job]:
        """Return the pieces of rows of one block, ``(position, row, count)``."""
        position, row, count = span
        end = position + count
        runs = _joined([each for each in captured if position <= each.start < end])

        def piece(first: int, end: int, encoding: str) -> PieceId:
            return PieceId(key, first - block_start, end - block_start, encoding)

        jobs = [
            _Job(
                piece=piece(first, gap_end, self._encoding),
                spans=self._pool.spans(order.run.page_ids, row + first - position, gap_end - first),
            )
            for first, gap_end in _gaps(position, end, [] if self._keeps_both else runs)
        ]
        jobs += [
            _Job(
                piece=piece(run[0].start, run[-1].end, ACTIVATIONS),
                captured=[each.rows for each in run],
            )
            for run in runs
        ]
        return jobs

    def _write(self, order: _Order, jobs: Sequence[_Job]) -> None:
        wanted = [(job.piece, record_of(job.piece, self._layout).size_bytes) for job in jobs]
        leases: list[Lease | None] = self._client.call(
            "reserve", order.blocks.tenant, self._owner, wanted
        )
        done = [
            (lease.lease_id, self._fill(job, lease, order))
            for job, lease in zip(jobs, leases, strict=True)
            if lease is not None
        ]
        if done and order.is_void:
            self._client.call("abort", [lease_id for lease_id, _ in done])
        elif done:
            self._client.call("commit", done)

    def _fill(self, job: _Job, lease: Lease, order: _Order) -> bytes:
        """Write a piece's record; return its seal."""
        record = self._arena.view(lease.offset_bytes, lease.size_bytes)
        where = record_of(job.piece, self._layout)
        layers = [where.layer(record, layer) for layer in range(where.num_layers)]
        if job.captured:
            if order.taken is not None:
                order.taken.synchronize()
            for layer, target in enumerate(layers):
                self._copy_captured(job, layer, target)
        else:
            with self._on_stream(order.written):
                for layer, target in enumerate(layers):
                    self._copy_layer(job, layer, target)
            if self._stream is not None:
                self._stream.synchronize()
        sums = [checksum(target) for target in layers]
        return write_header(record, job.piece, self._layout, where, sums)

    @torch.inference_mode()
    def _copy_captured(self, job: _Job, layer: int, target: memoryview) -> None:
        data = torch.frombuffer(target, dtype=torch.uint8)
        rows_SE = [rows_LSE[layer] for rows_LSE in job.captured]
        size = sum(each.nbytes for each in rows_SE)
        torch.cat(rows_SE, out=data[:size].view(self._pool.dtype).view(-1, rows_SE[0].shape[1]))
        data[size:] = 0

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


def _joined(captured: Sequence[Captured]) -> list[list[Captured]]:
    """Return runs of consecutive positions."""
    runs: list[list[Captured]] = []
    for each in captured:
        if runs and runs[-1][-1].end == each.start:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def _gaps(start: int, end: int, runs: Sequence[Sequence[Captured]]) -> list[tuple[int, int]]:
    """Return the ranges of positions between some runs that lie within a range."""
    borders = [start, *(at for run in runs for at in (run[0].start, run[-1].end)), end]
    return [
        (first, last)
        for first, last in zip(borders[::2], borders[1::2], strict=True)
        if first < last
    ]
