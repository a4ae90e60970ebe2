"""Writes what is new in the arena through to disk, behind the callers' backs."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from actors.kv.disk import DiskTier
from actors.kv.host_tier import HostTier
from actors.kv.pieces import BadPiece, PieceId

log = logging.getLogger(__name__)

QUEUE_PIECES = 4096
PAUSE_S = 30.0  # after a write that failed
CLOSE_TIMEOUT_S = 10.0  # for what is queued at the end


@dataclass(kw_only=True)
class WriterCounters:
    """What became of the pieces that were to be written."""

    not_needed: int = 0  # there already, or too large for the disk tier
    gone_before_write: int = 0  # evicted, dropped or found damaged
    queue_full: int = 0
    writes_skipped: int = 0  # in the pause after one that failed
    writes_failed: int = 0


# A piece and its record, as a tier of another dtype has them.
Recode = Callable[[PieceId, memoryview], tuple[PieceId, memoryview]]


class DiskWriter:
    """A thread with a bounded queue. A disk that fails costs pieces on disk, and nothing else."""

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier,
        queue_pieces: int = QUEUE_PIECES,
        pause_s: float = PAUSE_S,
        recode: Recode | None = None,
    ) -> None:
        """Begin with `start`; ``recode`` makes what a lossy disk tier is to hold."""
        self._recode = recode
        self._host = host
        self._disk = disk
        self._pause_s = pause_s
        self._queue: queue.Queue[tuple[PieceId, bytes] | None] = queue.Queue(queue_pieces)
        self._counters = WriterCounters()  # of the thread, but for queue_full
        self._put_lock = threading.Lock()
        self._paused_until_s = 0.0
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, pieces: Sequence[tuple[PieceId, bytes]]) -> None:
        """Queue pieces, each with its tenant; never waits: a full queue skips and counts them."""
        with self._put_lock:
            for each in pieces:
                try:
                    self._queue.put_nowait(each)
                except queue.Full:
                    self._counters.queue_full += 1

    def close(self) -> None:
        """Write what is queued, for a limited time, and end the thread."""
        try:
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return  # the disk hangs; the thread ends with the process
        self._thread.join(CLOSE_TIMEOUT_S)

    def stats(self) -> dict[str, int]:
        """Return the counters, and how many pieces are ``queued`` or being written."""
        return {**asdict(self._counters), "queued": self._queue.unfinished_tasks}

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except Exception as error:  # whatever it is: the thread must live on
                # A full or broken disk is not asked again for each piece.
                self._counters.writes_failed += 1
                self._paused_until_s = time.monotonic() + self._pause_s
                log.warning(
                    "KV cannot be written to disk, trying again in %.0f s: %s",
                    self._pause_s,
                    error,
                    exc_info=not isinstance(error, OSError),
                )
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, piece: PieceId, tenant: bytes) -> None:
        if time.monotonic() < self._paused_until_s:
            self._counters.writes_skipped += 1
            return
        try:
            with self._host.reading(piece, "disk", counts_as_use=False) as record:
                on_disk = piece
                if self._recode is not None:
                    on_disk, record = self._recode(piece, record)
                written = self._disk.write(on_disk, tenant, record)
        except (KeyError, BadPiece):
            self._counters.gone_before_write += 1
            return
        if not self._host.holds(piece):
            # Dropped or cleared while it was written: then it must not be on disk either.
            self._disk.drop(on_disk)
        elif not written:
            self._counters.not_needed += 1
