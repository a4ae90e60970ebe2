"""Write-behind: a rank's finished blocks go to its host's store while it computes on.

A thread copies rows out of their pages into the arena, computes checksums and commits.
Pages may be given to other rows meanwhile: whoever is about to write into one waits for
its copy first (`BlockWriter.wait_for`).
"""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.messages import Lease, StoreBlocks
from actors.kv.pieces import Layout, PieceId, Record, checksum, write_header
from models.kv_codec import Encoding, encode, layer_bytes
from models.page_pool import PagePool, Spans

MAX_PENDING = 4096  # pieces; more are not stored
BATCH = 32  # pieces of one call of the store
PATIENCE_S = 30.0  # for the copy of a page that is about to be overwritten

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One piece: which rows of which pages."""

    piece: PieceId
    tenant: bytes
    page_ids: tuple[int, ...]
    spans: Spans  # in these pages
    written: "torch.cuda.Event | None"  # after which the rows can be read


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
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._pending: Counter[int] = Counter()  # pages that are still to be read
        self._num_pending = 0
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    def submit(self, blocks: StoreBlocks) -> None:
        """Have this rank's rows of some blocks written; what does not fit the queue is not."""
        run = self._pool.table.run(blocks.sequence_id)
        tokens, capacity = self._layout.block_tokens, self._pool.table.page_tokens
        written = None
        if self._stream is not None:
            written = torch.cuda.Event()
            written.record()
        for number, key in enumerate(blocks.keys, blocks.first_block):
            start = number * tokens
            for position, row, count in run.spans_between(start, start + tokens):
                if self._num_pending >= MAX_PENDING or self._client.is_lost:
                    self.counts["skipped"] += 1
                    continue
                first = row // capacity
                job = _Job(
                    piece=PieceId(key, position - start, position - start + count, self._encoding),
                    tenant=blocks.tenant,
                    page_ids=tuple(run.page_ids[first : -(-(row + count) // capacity)]),
                    spans=self._pool.spans(run.page_ids, row, count),
                    written=written,
                )
                with self._idle:
                    self._pending.update(job.page_ids)
                    self._num_pending += 1
                self._jobs.put(job)

    def wait_for(self, page_ids: Iterable[int]) -> None:
        """Return when no copy of these pages is left to make."""
        wanted = set(page_ids)
        with self._idle:
            self._idle.wait_for(lambda: not wanted & self._pending.keys(), PATIENCE_S)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written; return whether it is."""
        with self._idle:
            return self._idle.wait_for(lambda: self._num_pending == 0, timeout_s)

    def close(self) -> None:
        """End the thread; what is left is not written."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [first]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < BATCH and (job := self._jobs.get_nowait()) is not None:
                    jobs.append(job)
            try:
                self._write(jobs)
            except StoreLost:
                _log.warning("the KV store of this host is lost: blocks are not stored any more")
            except Exception:  # blocks that are not stored are computed again, no more
                _log.exception("blocks could not be stored")
                self.counts["failed"] += len(jobs)
            finally:
                self._done(jobs)

    def _write(self, jobs: Sequence[_Job]) -> None:
        for tenant in dict.fromkeys(job.tenant for job in jobs):
            of = [job for job in jobs if job.tenant == tenant]
            wanted = [(job.piece, self._record(job).size_bytes) for job in of]
            leases: list[Lease | None] = self._client.call("reserve", tenant, self._owner, wanted)
            done = []
            for job, lease in zip(of, leases, strict=True):
                if lease is not None:
                    done.append((lease.lease_id, self._fill(job, lease)))
                    self.counts["bytes"] += lease.size_bytes
            if done:
                self._client.call("commit", done)
            self.counts["stored"] += len(done)

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

    def _fill(self, job: _Job, lease: Lease) -> bytes:
        """Write a piece's record; return its seal."""
        record = self._arena.view(lease.offset_bytes, lease.size_bytes)
        where = self._record(job)
        with self._on_stream(job.written):
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

    def _done(self, jobs: Sequence[_Job]) -> None:
        with self._idle:
            for job in jobs:
                self._pending.subtract(job.page_ids)
            self._pending += Counter()  # forget what is at zero
            self._num_pending -= len(jobs)
            self._idle.notify_all()
