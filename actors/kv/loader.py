"""Restore: rows come from the host's arena into a rank's pages, layer by layer.

A thread verifies and copies layer i + 1 while layer i is computed. A damaged piece gives
zeros: whatever is computed with them is void, and the coordinator has it computed anew.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.messages import RestorePart
from actors.kv.pieces import BadPiece, Layout, PieceId, Record, read_header, verify_layer
from models.kv_codec import Encoding, decode
from models.page_pool import PagePool, Spans


@dataclass
class _Source:
    """One part of a sequence, and where it goes."""

    sequence_id: int
    part: RestorePart
    spans: Spans
    record: memoryview
    where: Record | None = None  # None: damaged
    sums: Sequence[bytes] = ()
    layers: Tensor | None = (
        None  # rows ``[L, 2, K, S, D]``, a view of the record; None: encoded, or damaged
    )


class Restoring:
    """A restore under way: `wait` before a layer is used, `finish` behind the last one."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        """Begin with no layer there."""
        self._ready = [threading.Event() for _ in range(num_layers)]
        self._copied: list[torch.cuda.Event | None] = [None] * num_layers
        self._device = device
        self.damaged: dict[int, int] = {}  # the first damaged position of a sequence

    def layer_is_there(self, layer: int, copied: "torch.cuda.Event | None") -> None:
        """Say that a layer's copies are made, or (CUDA) under way until the event."""
        self._copied[layer] = copied
        self._ready[layer].set()

    def wait(self, layer: int) -> None:
        """Return when a layer can be read; on CUDA by what follows on the current stream."""
        self._ready[layer].wait()
        copied = self._copied[layer]
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def finish(self) -> Mapping[int, int]:
        """Wait for all layers; return the first damaged position of each sequence that has one."""
        for layer in range(len(self._ready)):
            self.wait(layer)
        return self.damaged


class BlockLoader:
    """One rank's loader."""

    def __init__(
        self,
        pool: PagePool,
        arena: Arena,
        layout: Layout,
        client: StoreClient | None,
        rank: int,
        *,
        verifies: bool = True,
    ) -> None:
        """Take the pages, and the arena of this rank's host.

        ``client`` is told of damaged pieces. Layers are not verified only to measure what
        that costs.
        """
        self._verifies = verifies
        self._pool = pool
        self._arena = arena
        self._layout = layout
        self._client = client
        self._rank = rank
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

    def begin(self, parts: Mapping[int, Sequence[RestorePart]]) -> Restoring:
        """Start to restore this rank's parts of some sequences, grown already by their rows."""
        sources = [
            self._source(sequence_id, part)
            for sequence_id, of in parts.items()
            for part in of
            if part.rank == self._rank
        ]
        restoring = Restoring(self._layout.num_layers, self._pool.device)
        written = None
        if self._stream is not None:
            written = torch.cuda.Event()
            written.record()  # behind what last read or wrote these pages
        thread = threading.Thread(
            target=self._run, args=(sources, restoring, written), name="kv-loader", daemon=True
        )
        thread.start()
        return restoring

    def _source(self, sequence_id: int, part: RestorePart) -> _Source:
        run, lease = self._pool.table.run(sequence_id), part.lease
        row = run.rows_below(part.start)
        return _Source(
            sequence_id,
            part,
            self._pool.spans(run.page_ids, row, part.end - part.start),
            self._arena.view(lease.offset_bytes, lease.size_bytes),
        )

    @torch.inference_mode()
    def _run(
        self,
        sources: Sequence[_Source],
        restoring: Restoring,
        written: "torch.cuda.Event | None",
    ) -> None:
        layer = 0
        try:
            if self._stream is not None and written is not None:
                self._stream.wait_event(written)
            for source in sources:
                self._read_header(source, restoring)
            for layer in range(self._layout.num_layers):
                restoring.layer_is_there(layer, self._copy_layer(layer, sources, restoring))
        except Exception:
            # Nobody waits for ever: what is not there counts as damaged.
            for source in sources:
                self._damage(source, restoring)
            for rest in range(layer, self._layout.num_layers):
                restoring.layer_is_there(rest, None)
            raise

    def _read_header(self, source: _Source, restoring: Restoring) -> None:
        lease = source.part.lease
        try:
            source.where, source.sums = read_header(
                source.record, lease.piece, self._layout, lease.seal
            )
            if lease.piece.encoding == "raw":
                source.layers = self._raw_rows(source.part, source.record, source.where)
        except (BadPiece, ValueError, RuntimeError):
            self._report(source, restoring)

    def _copy_layer(
        self, layer: int, sources: Sequence[_Source], restoring: Restoring
    ) -> "torch.cuda.Event | None":
        if self._stream is None:
            for source in sources:
                self._copy(layer, source, restoring)
            return None
        with torch.cuda.stream(self._stream):
            for source in sources:
                self._copy(layer, source, restoring)
            copied = torch.cuda.Event()
            copied.record()
        return copied

    def _copy(self, layer: int, source: _Source, restoring: Restoring) -> None:
        rows_2KSD = None
        if source.where is not None:
            data = source.where.layer(source.record, layer)
            try:
                if self._verifies:
                    verify_layer(data, source.sums[layer])
                if source.layers is None:
                    rows_2KSD = self._decoded_rows(source.part, data)
                else:
                    rows_2KSD = source.layers[layer]
            except (BadPiece, ValueError, RuntimeError):
                self._report(source, restoring)
        if rows_2KSD is None:
            part = source.part
            rows_2KSD = torch.zeros(
                2,
                self._layout.num_kv_heads,
                part.end - part.start,
                self._layout.head_dim,
                dtype=self._pool.dtype,
            )
        self._pool.write_rows(layer, source.spans, rows_2KSD)

    def _raw_rows(self, part: RestorePart, record: memoryview, where: Record) -> Tensor:
        """Return a view of a part's rows of all layers of its record, ``[L, 2, K, S, D]``."""
        piece, K, D = part.lease.piece, self._layout.num_kv_heads, self._layout.head_dim
        L, S, dtype = self._layout.num_layers, piece.end - piece.start, self._pool.dtype
        payload = torch.frombuffer(record, dtype=torch.uint8)[where.payload_offset :]
        layers = payload[: L * where.layer_bytes].view(L, -1).view(dtype)
        rows_L2KSD = layers[:, : 2 * K * S * D].unflatten(1, (2, K, S, D))
        first = part.start - part.block_start - piece.start
        return rows_L2KSD[:, :, :, first : first + part.end - part.start]

    def _decoded_rows(self, part: RestorePart, data: memoryview) -> Tensor:
        """Return a part's rows out of one layer of its piece, ``[2, K, S, D]``."""
        piece, K, D = part.lease.piece, self._layout.num_kv_heads, self._layout.head_dim
        S = piece.end - piece.start
        rows_2KSD = torch.empty(2, K, S, D, dtype=self._pool.dtype)
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        decode(cast(Encoding, piece.encoding), encoded, rows_2KSD)
        first = part.start - part.block_start - piece.start
        return rows_2KSD[:, :, first : first + part.end - part.start]

    def _report(self, source: _Source, restoring: Restoring) -> None:
        """Note a damaged piece, and have it dropped."""
        self._damage(source, restoring)
        piece: PieceId = source.part.lease.piece
        if self._client is None:
            return
        with contextlib.suppress(StoreLost):  # then nobody will read it any more
            self._client.call("drop", [piece])

    def _damage(self, source: _Source, restoring: Restoring) -> None:
        source.where = None
        known = restoring.damaged.get(source.sequence_id, source.part.start)
        restoring.damaged[source.sequence_id] = min(known, source.part.start)
