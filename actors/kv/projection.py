"""Saved activations on their way into pages: they are projected several pieces at a time.

A product over few rows takes as long as one over many, for it reads the same weights. So
pieces, which on a ring are cut small, wait on the device until there are enough rows. On CUDA
the next pieces are copied there, on a stream of their own, while the last ones are projected.

Letters: S = rows, E = hidden size; K, J, D as in `attention`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoder import Decoder
from models.page_pool import PagePool, Spans

# Rows of one product, a larger piece alone. More on CPU would be waited for longer than it saves.
PROJECT_TOKENS = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What a rank's restores run on; None on CPU."""

    copy: "torch.cuda.Stream | None" = None
    project: "torch.cuda.Stream | None" = None


@dataclass(frozen=True, kw_only=True)
class ActivationRows:
    """Rows of one piece, in order of positions, and where their KV goes."""

    position: int  # of the first
    count: int
    spans: Spans


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Neighbours among the pieces of a restore, projected together in every layer."""

    first: int  # the first piece
    end: int  # behind the last
    num_rows: int
    spans: Spans
    cos_sin: tuple[Tensor, Tensor] | None


def on_stream(stream: "torch.cuda.Stream | None") -> contextlib.AbstractContextManager[object]:
    """Have what follows run on a stream, where there is one."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Projection:
    """The activations of one restore. For the thread that restores."""

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, pool: PagePool, pieces: Sequence[ActivationRows], streams: Streams
    ) -> None:
        """Take the pieces, in the order in which each layer's rows come."""
        self._decoder = decoder
        self._streams = streams
        with on_stream(streams.project):
            self.batches = [
                self._batch(pieces, first, end)
                for first, end in _batches(
                    [piece.count for piece in pieces], PROJECT_TOKENS[pool.device.type]
                )
            ]
        most = max((batch.num_rows for batch in self.batches), default=0)
        hidden_size = decoder.config.hidden_size
        with on_stream(streams.copy):
            self._buffers = [
                torch.empty(most, hidden_size, dtype=pool.dtype, device=pool.device)
                for _ in range(1 if streams.copy is None else 2)
            ]
        if streams.project is not None:
            for buffer in self._buffers:
                buffer.record_stream(streams.project)
        # Of each buffer, when what it held was projected.
        self._free: list[torch.cuda.Event | None] = [None] * len(self._buffers)

    def begin(self) -> None:
        """Begin with the next batch; a buffer is free for its rows before they are copied."""
        self._buffers.append(self._buffers.pop(0))
        self._free.append(self._free.pop(0))
        self._num_rows = 0
        if self._streams.copy is not None and self._free[0] is not None:
            self._streams.copy.wait_event(self._free[0])

    def put(self, rows_SE: Tensor | None, count: int) -> None:
        """Take a piece's rows, behind those before it; None: zeros. On the current stream."""
        target_SE = self._buffers[0][self._num_rows : self._num_rows + count]
        self._num_rows += count
        if rows_SE is None:
            target_SE.zero_()
        else:
            target_SE.copy_(rows_SE, non_blocking=True)

    def project(self, layer: int, batch: Batch) -> Tensor:
        """Return the keys and values ``kv_2KSD`` of what was put; on the current stream."""
        if self._streams.copy is not None and self._streams.project is not None:
            self._streams.project.wait_stream(self._streams.copy)
        inputs_SE = self._buffers[0][: batch.num_rows]
        kv_SJD = self._decoder.project_inputs(layer, inputs_SE, batch.cos_sin)
        if self._streams.project is not None:
            projected = torch.cuda.Event()
            projected.record(self._streams.project)
            self._free[0] = projected
        return kv_SJD.unflatten(1, (2, -1)).permute(1, 2, 0, 3)

    def _batch(self, pieces: Sequence[ActivationRows], first: int, end: int) -> Batch:
        positions_S = torch.cat(
            [
                torch.arange(piece.position, piece.position + piece.count)
                for piece in pieces[first:end]
            ]
        )
        return Batch(
            first=first,
            end=end,
            num_rows=len(positions_S),
            spans=[span for piece in pieces[first:end] for span in piece.spans],
            cos_sin=self._decoder.rotations(positions_S.to(self._decoder.device)),
        )


def _batches(counts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return the first and the one past the last of neighbours that have so many rows at most."""
    batches: list[tuple[int, int]] = []
    rows = 0
    for index, count in enumerate(counts):
        if batches and rows + count <= most:
            batches[-1] = batches[-1][0], index + 1
            rows += count
        else:
            batches.append((index, index + 1))
            rows = count
    return batches
