"""Restore: rows come from the host's arena into a rank's pages, layer by layer.

A thread for each sequence verifies what comes over the link and copies it into the pages, or,
of saved activations, projects it into them, while steps of this and other sequences are
computed: layer i + 1 while layer i is, or over many steps. A damaged piece, and what did not
come in time, gives zeros: whatever is computed with them is void, and the coordinator has it
computed anew.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from actors.kv.arena import Arena
from actors.kv.client import StoreClient, StoreLost
from actors.kv.link import DirectLink, Link
from actors.kv.messages import RestorePart, RestoreTimes
from actors.kv.pieces import BadPiece, Layout, verify_layer
from actors.kv.projection import ActivationRows, Batch, Projection, Streams, on_stream
from actors.kv.source import Source
from attention.timing import PartTimer
from models.decoder import Decoder
from models.page_pool import PagePool

PATIENCE_S = 30.0  # in which nothing comes: then nothing more is waited for

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Nobody wants the rest."""


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
        decoder: Decoder | None = None,
        link: Link | None = None,
        verifies: bool = True,
    ) -> None:
        """Take the pages, and the arena of this rank's host.

        ``client`` is told of damaged pieces; ``decoder`` projects activations, where any are
        stored. Layers are not verified only to measure what that costs.
        """
        self.pool = pool
        self.arena = arena
        self.layout = layout
        self.client = client
        self.decoder = decoder
        self.link = link or DirectLink(arena)
        self.verifies = verifies
        self._rank = rank
        self.streams = Streams()
        if pool.device.type == "cuda":
            self.streams = Streams(
                copy=torch.cuda.Stream(pool.device), project=torch.cuda.Stream(pool.device)
            )

    def begin(
        self, sequence_id: int, parts: Sequence[RestorePart], *, patience_s: float = PATIENCE_S
    ) -> "Restoring":
        """Start to restore this rank's parts of a sequence, grown already by their rows.

        Where they go is settled now: the sequence may grow on meanwhile.
        """
        run = self.pool.table.run(sequence_id)
        sources = []
        for part in parts:
            if part.rank == self._rank:
                row = run.rows_below(part.start)
                spans = self.pool.spans(run.page_ids, row, part.end - part.start)
                sources.append(
                    Source(part=part, layout=self.layout, dtype=self.pool.dtype, spans=spans)
                )
        return Restoring(self, sources, patience_s)


class Restoring:
    """A restore under way: `wait` before a layer is used, then `finish`; or `abort`."""

    def __init__(self, loader: BlockLoader, sources: Sequence[Source], patience_s: float) -> None:
        """Start the thread, if there is anything to restore."""
        self._loader = loader
        self._pool = loader.pool
        self._sources = sources
        self._patience_s = patience_s
        self._num_layers = loader.layout.num_layers
        self._changed = threading.Condition()  # guards what follows
        self._layers = 0 if sources else self._num_layers  # that are there
        self._is_lost = False
        self._copied: list[Sequence[torch.cuda.Event]] = [()] * self._num_layers
        # When anything came last, on a clock that never goes back.
        self._begun_s = self._came_s = self._ended_s = time.monotonic()
        self._writing = threading.Lock()  # held while pages are written, by whoever does
        self._is_stopped = False
        self._timer = PartTimer(self._pool.device)  # of the thread
        # On CPU steps may be computed on the same core meanwhile: what these take is not its own.
        self._project_timer = PartTimer(self._pool.device, clock=time.thread_time)
        self._projection: Projection  # where there are activations
        self._link_bytes = 0
        self._busy_from_s = self._busy_to_s = loader.link.busy_s
        self._written: torch.cuda.Event | None = None
        if self._pool.device.type == "cuda":
            self._written = torch.cuda.Event()
            self._written.record()  # behind what last read or wrote these pages
        self._thread = threading.Thread(target=self._run, name="kv-loader", daemon=True)
        if sources:
            self._thread.start()

    @property
    def share(self) -> float:
        """The share of layers that is there, 0 to 1; 1 also where nothing comes any more.

        Whoever waits for 1 before the first `wait` does not wait for ever.
        """
        is_silent = time.monotonic() > self._came_s + self._patience_s
        return 1.0 if self._is_lost or is_silent else self._layers / self._num_layers

    def wait(self, layer: int) -> None:
        """Return when a layer can be read; on CUDA by what follows on the current stream.

        Where nothing comes any more, what is missing gives zeros and counts as damaged.
        """
        with self._changed:
            while self._layers <= layer and not self._is_lost:
                left_s = self._came_s + self._patience_s - time.monotonic()
                if left_s <= 0.0:
                    break
                self._changed.wait(left_s)
            is_there = self._layers > layer
        if not is_there:
            self._give_up()
        for copied in self._copied[layer]:
            torch.cuda.current_stream(self._pool.device).wait_event(copied)

    def finish(self) -> tuple[int | None, RestoreTimes]:
        """Wait for all layers; return the first damaged position, and where the time went."""
        self.wait(self._num_layers - 1)
        good = [source for source in self._sources if not source.is_damaged]
        parts_s = self._timer.seconds()
        is_simulated = self._loader.link.is_simulated
        times = RestoreTimes(
            kv_tokens=sum(each.num_rows for each in good if not each.is_activations),
            activation_tokens=sum(each.num_rows for each in good if each.is_activations),
            link_bytes=self._link_bytes,
            link_s=self._busy_to_s - self._busy_from_s
            if is_simulated  # with what it gave to others meanwhile
            else parts_s.get("link", 0.0),
            project_s=self._project_timer.seconds().get("project", 0.0),
            total_s=self._ended_s - self._begun_s,
        )
        damaged = [source.part.start for source in self._sources if source.is_damaged]
        return min(damaged, default=None), times

    def abort(self) -> None:
        """Return when no page is written any more; `finish` is not called then.

        Raises:
            RuntimeError: A write has not ended for too long: the device hangs.
        """
        if not self._writing.acquire(timeout=self._patience_s):
            raise RuntimeError("a write of restored rows into the pages does not end")
        try:
            self._is_stopped = True
            for stream in (self._loader.streams.copy, self._loader.streams.project):
                if stream is not None:
                    stream.synchronize()
        finally:
            self._writing.release()

    def _give_up(self) -> None:
        """Go on without what is missing."""
        self.abort()
        _log.warning("restored KV did not come in time, or its link is lost: it is recomputed")
        for source in self._sources:
            source.is_damaged |= source.layers < self._num_layers
            for layer in range(source.layers, self._num_layers):
                self._pool.write_rows(layer, source.spans, source.zeros())
            source.layers = self._num_layers
        with self._changed:
            self._end(self._num_layers)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            for stream in (self._loader.streams.copy, self._loader.streams.project):
                if stream is not None and self._written is not None:
                    stream.wait_event(self._written)
            for source in self._sources:
                try:
                    source.read_header(self._loader.arena)
                except BadPiece:
                    self._report(source)
            turns = self._turns()
            with contextlib.closing(self._fetch(turns)) as views:
                for layer in range(self._num_layers):
                    for turn in turns:
                        if turn.batch is None:
                            self._copy(layer, turn.sources[0], views)
                        else:
                            self._project(layer, turn.batch, turn.sources, views)
                    self._layer_is_there(layer)
        except _Stopped:
            pass
        except Exception:
            # Nobody waits for ever: what is not there counts as damaged.
            _log.exception("restored KV is lost on its way")
            with self._changed:
                self._is_lost = True
                self._changed.notify_all()

    def _layer_is_there(self, layer: int) -> None:
        copied = []
        for stream in (self._loader.streams.copy, self._loader.streams.project):
            if stream is not None:
                copied.append(torch.cuda.Event())
                copied[-1].record(stream)
        with self._changed:
            if not self._is_stopped:
                self._copied[layer] = copied
                self._end(layer + 1)

    def _end(self, layers: int) -> None:
        """Say that so many layers are there."""
        self._layers = layers
        if layers == self._num_layers:
            self._ended_s = time.monotonic()
            self._busy_to_s = self._loader.link.busy_s
        self._changed.notify_all()

    def _turns(self) -> "list[_Turn]":
        """Return what each layer consists of, in order.

        Activations and keys and values take turns: while the one are projected, the link
        brings the others, and nothing it has brought waits long for its turn.
        """
        copied = [_Turn([source]) for source in self._sources if not source.is_activations]
        activations = [source for source in self._sources if source.is_activations]
        if not activations:
            return copied
        decoder = self._loader.decoder
        if decoder is None:
            raise ValueError("activations are restored only where the loader has a decoder")
        pieces = [
            ActivationRows(position=s.part.start, count=s.num_rows, spans=s.spans)
            for s in activations
        ]
        self._projection = Projection(decoder, self._pool, pieces, self._loader.streams)
        projected = [
            _Turn(activations[batch.first : batch.end], batch) for batch in self._projection.batches
        ]
        return _interleaved(projected, copied)

    def _fetch(self, turns: "Sequence[_Turn]") -> "_Closing":
        """Fetch every layer of every piece whose header is good, in the order of their use."""
        ranges = [
            source.layer_range(layer)
            for layer in range(self._num_layers)
            for turn in turns
            for source in turn.sources
            if source.is_read
        ]
        return _Closing(self._loader.link.fetch(ranges))

    def _project(
        self, layer: int, batch: Batch, sources: Sequence[Source], views: "_Closing"
    ) -> None:
        streams, projection = self._loader.streams, self._projection
        projection.begin()
        for source in sources:
            with on_stream(streams.copy), self._timer("link"):
                data = self._next(layer, source, views)
                rows_SE = None if data is None else source.inputs(data)
                projection.put(rows_SE, source.num_rows)
        with on_stream(streams.project), self._project_timer("project"):
            kv_2KSD = projection.project(layer, batch)
            with self._may_write():
                self._pool.write_rows(layer, batch.spans, kv_2KSD)
                for source in sources:
                    source.layers = layer + 1

    def _copy(self, layer: int, source: Source, views: "_Closing") -> None:
        with on_stream(self._loader.streams.copy), self._timer("link"):
            data = self._next(layer, source, views)
            rows_2KSD = source.zeros() if data is None else source.kv(data)
            with self._may_write():
                self._pool.write_rows(layer, source.spans, rows_2KSD)
                source.layers = layer + 1

    def _next(self, layer: int, source: Source, views: "_Closing") -> memoryview | None:
        """Return the next bytes, one layer of a piece; None where they are damaged."""
        if not source.is_read:
            return None
        copy = self._loader.streams.copy
        if copy is not None and self._loader.link.is_simulated:
            copy.synchronize()  # what the link is about to overwrite is read
        data = next(views)
        self._link_bytes += len(data)
        self._came_s = time.monotonic()
        if source.is_damaged:
            return None
        if self._loader.verifies:
            try:
                verify_layer(data, source.sums[layer])
            except BadPiece:
                self._report(source)
                return None
        return data

    @contextlib.contextmanager
    def _may_write(self) -> Iterator[None]:
        """Have the pages to write, unless nobody wants that any more."""
        with self._writing:
            if self._is_stopped:
                raise _Stopped
            yield

    def _report(self, source: Source) -> None:
        """Note a damaged piece, and have it dropped."""
        source.is_damaged = True
        if self._loader.client is None or self._is_stopped:  # then its lease may be over
            return
        with contextlib.suppress(StoreLost):  # then nobody will read it any more
            self._loader.client.call("drop", [source.part.lease.piece])


@dataclass(frozen=True)
class _Turn:
    """Pieces that are projected together, or one that is copied."""

    sources: Sequence[Source]
    batch: Batch | None = None


def _interleaved(some: "list[_Turn]", others: "list[_Turn]") -> "list[_Turn]":
    """Return both, each in its order and as evenly spread as the other."""
    places = [
        ((number + 0.5) / len(of), of[number]) for of in (some, others) for number in range(len(of))
    ]
    return [turn for _, turn in sorted(places, key=lambda place: place[0])]


class _Closing:
    """What a link gives, closed when it is wanted no more."""

    def __init__(self, views: Iterator[memoryview]) -> None:
        self._views = views

    def __next__(self) -> memoryview:
        view = next(self._views, None)
        if view is None:
            raise RuntimeError("the link has given too little")
        return view

    def close(self) -> None:
        close = getattr(self._views, "close", None)
        if close is not None:
            close()
