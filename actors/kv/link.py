"""The way from a host's arena to a rank, which can be slowed down to stand for another one.

`DirectLink` is the arena itself: whoever reads a view of it moves the bytes. `ThrottledLink`
has a second process (`actors.kv.link_process`) copy ranges into landing memory at a set
rate, behind the reader's back, so that any machine can stand for one with another ratio of
link to compute (rho). What is measured over it is simulated, and must be called so.
"""

import contextlib
import itertools
import math
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.kv import link_process
from actors.kv.arena import Arena
from actors.kv.link_process import Answer, Order

PLACES = 3  # of one fetch: a range that is read, one that has come, one under way
PATIENCE_S = 10.0
_SEND_S = 1  # an order that the socket has no room for after so long finds nobody who reads
_CLOSE_S = 1.0


class LinkLost(Exception):
    """The link's process is gone or stands still: the link is of no use any more."""


class Link(Protocol):
    """A way for bytes of one arena. Thread-safe: fetches at once share it, range by range."""

    @property
    def bytes_per_s(self) -> float | None:
        """The rate that it is held to; None: as fast as this machine is."""

    @property
    def is_simulated(self) -> bool:
        """Whether it is slower than this machine, to stand for another one."""

    @property
    def busy_s(self) -> float:
        """How long it has been busy since it was made."""

    @property
    def moved_bytes(self) -> int:
        """How many bytes it has moved since it was made."""

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = PATIENCE_S
    ) -> Iterator[memoryview]:
        """Yield the bytes of ranges (offset_bytes, size_bytes) of the arena, in their order.

        A view is valid until the next one is asked for; those that follow are under way
        meanwhile. Who stops midway closes the iterator, or lets go of it.

        Raises:
            ValueError: A range is not within the arena. Nothing is moved.
            LinkLost: A range has not come ``patience_s`` after the link's rate promised it, or
                the link's process is gone, or the link is closed.
        """

    def close(self) -> None:
        """End it, and every fetch. Closing twice is no error."""


def open_link(arena: Arena, bytes_per_s: float | None) -> Link:
    """Return a link of so many bytes/s, or (None) as fast as this machine is."""
    return DirectLink(arena) if bytes_per_s is None else ThrottledLink(arena, bytes_per_s)


class DirectLink:
    """Views of the arena. It is busy while a reader has one, for the reader moves the bytes."""

    bytes_per_s = None
    is_simulated = False

    def __init__(self, arena: Arena) -> None:
        """Take the arena, which somebody else closes."""
        self._arena = arena
        self._lock = threading.RLock()  # a fetch that is let go of ends within any line
        self._lent: set[object] = set()  # one for each view that a reader has
        self._since_s = 0.0  # that views are lent, if any is
        self._busy_s = 0.0
        self._moved_bytes = 0

    @property
    def busy_s(self) -> float:
        """See `Link`."""
        with self._lock:
            return self._busy_s + (time.monotonic() - self._since_s if self._lent else 0.0)

    @property
    def moved_bytes(self) -> int:
        """See `Link`."""
        return self._moved_bytes

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = PATIENCE_S
    ) -> Iterator[memoryview]:
        """See `Link`. Nothing is waited for."""
        return self._lend([self._arena.view(*each) for each in ranges])

    def close(self) -> None:
        """See `Link`: there is nothing to end."""

    def _lend(self, views: Sequence[memoryview]) -> Iterator[memoryview]:
        for view in views:
            lent = object()
            with self._lock:
                if not self._lent:
                    self._since_s = time.monotonic()
                self._lent.add(lent)
                self._moved_bytes += len(view)
            try:
                yield view
            finally:
                with self._lock:
                    self._lent.remove(lent)
                    if not self._lent:
                        self._busy_s += time.monotonic() - self._since_s


class _Landing:
    """Shared memory without a name, with places for the ranges of one fetch at a time."""

    def __init__(self, number: int, place_bytes: int, handle: int) -> None:
        """Map a new file, which must be mapped by nobody but the process."""
        self.number = number
        self.place_bytes = place_bytes
        self.size_bytes = PLACES * place_bytes
        self.num_under_way = 0
        self.is_taken = True
        os.ftruncate(handle, self.size_bytes)
        self._memory = mmap.mmap(handle, self.size_bytes)

    def view(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """Return a range; it keeps the memory until it goes."""
        with memoryview(self._memory) as whole:
            return whole[offset_bytes : offset_bytes + size_bytes]


@dataclass(eq=False)
class _Asked:
    """A range that the process was asked for."""

    landing: _Landing
    offset_bytes: int  # within the landing
    size_bytes: int
    has_come: bool = False


class ThrottledLink:
    """A process that copies ranges into landing memory at no more than ``bytes_per_s``.

    It ends with this process, or with `close`; no memory has a name that could be left behind.
    """

    is_simulated = True

    def __init__(self, arena: Arena, bytes_per_s: float) -> None:
        """Start the process, and do not wait for it.

        Raises:
            ValueError: The rate is not positive and finite.
            OSError: The process cannot be started, or the arena is gone.
        """
        if not 0 < bytes_per_s < math.inf:
            raise ValueError(f"a link's bytes/s must be positive and finite, got {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._arena = arena
        # Its lock may be taken twice: a fetch that is let go of ends within any line.
        self._changed = threading.Condition(threading.RLock())
        self._asked: dict[int, _Asked] = {}  # by number, in their order; until they are answered
        self._numbers = itertools.count(1)  # of copies and of landings
        self._free: dict[int, _Landing] = {}
        self._answered_s = 0.0  # the last one, or when it was asked for where none was before it
        self._busy_s = 0.0
        self._moved_bytes = 0
        self._lost: str | None = None  # why
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            timeout = struct.pack("ll", _SEND_S, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            command = [sys.executable, "-I", "-S", link_process.__file__, repr(bytes_per_s)]
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd="/"
            )
        self._thread = threading.Thread(target=self._receive, name="kv-link", daemon=True)
        self._thread.start()
        try:
            # Opened again: who has the store's own handle has its lock too.
            handle = os.open(arena.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                self._map(link_process.ARENA, arena.capacity_bytes, handle)
            finally:
                os.close(handle)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The second process."""
        return self._process.pid

    @property
    def busy_s(self) -> float:
        """See `Link`: of the ranges that have come."""
        return self._busy_s

    @property
    def moved_bytes(self) -> int:
        """See `Link`."""
        return self._moved_bytes

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = PATIENCE_S
    ) -> Iterator[memoryview]:
        """See `Link`."""
        ranges = list(ranges)
        for each in ranges:
            self._arena.view(*each)  # raises
        return self._fetch(ranges, patience_s)

    def close(self) -> None:
        """See `Link`."""
        self._lose("it was closed")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._socket.close()

    def _fetch(self, ranges: Sequence[tuple[int, int]], patience_s: float) -> Iterator[memoryview]:
        if not ranges:
            return
        landing = self._take(max(size_bytes for _, size_bytes in ranges))
        try:
            places = itertools.cycle(range(0, landing.size_bytes, landing.place_bytes))
            rest = zip(ranges, places, strict=False)
            under_way: deque[_Asked] = deque()
            for _ in ranges:
                # The reader has done with what it got last: there is a place again.
                for (offset_bytes, size_bytes), place in itertools.islice(
                    rest, PLACES - len(under_way)
                ):
                    asked = _Asked(landing, place, size_bytes)
                    self._ask(asked, offset_bytes)
                    under_way.append(asked)
                asked = under_way.popleft()
                self._wait_for(asked, patience_s)
                yield landing.view(asked.offset_bytes, asked.size_bytes)
        finally:
            self._give_back(landing)

    def _take(self, size_bytes: int) -> _Landing:
        """Return a landing whose places have so many bytes; too small ones are replaced."""
        with self._changed:
            for landing in list(self._free.values()):
                if landing.place_bytes >= size_bytes:
                    del self._free[landing.number]
                    landing.is_taken = True
                    return landing
            if self._free:
                self._send(Order(link_process.UNMAP, self._free.popitem()[0]))
            # What is not written takes no memory.
            place_bytes = 1 << max(size_bytes - 1, mmap.PAGESIZE - 1).bit_length()
            handle = os.memfd_create("ringspan-link", os.MFD_CLOEXEC)
            try:
                landing = _Landing(next(self._numbers), place_bytes, handle)
                self._map(landing.number, landing.size_bytes, handle)
            finally:
                os.close(handle)
            return landing

    def _give_back(self, landing: _Landing) -> None:
        with self._changed:
            landing.is_taken = False
            if self._lost is not None:
                return
            if not landing.num_under_way:
                self._free[landing.number] = landing
                return
            with contextlib.suppress(LinkLost):
                self._send(Order(link_process.DROP, landing.number))

    def _map(self, number: int, size_bytes: int, handle: int) -> None:
        self._send(Order(link_process.MAP, number, size_bytes=size_bytes), [handle])

    def _ask(self, asked: _Asked, arena_offset_bytes: int) -> None:
        with self._changed:
            number, now_s = next(self._numbers), time.monotonic()
            if not self._asked:
                self._answered_s = now_s
            self._asked[number] = asked
            asked.landing.num_under_way += 1
            self._send(
                Order(
                    link_process.COPY,
                    asked.landing.number,
                    number,
                    asked.offset_bytes,
                    arena_offset_bytes,
                    asked.size_bytes,
                    now_s,
                )
            )

    def _wait_for(self, asked: _Asked, patience_s: float) -> None:
        with self._changed:
            while not asked.has_come:
                self._check()
                before = itertools.takewhile(lambda each: each is not asked, self._asked.values())
                ahead_bytes = asked.size_bytes + sum(each.size_bytes for each in before)
                now_s = time.monotonic()
                promised_s = self._answered_s + ahead_bytes / self.bytes_per_s
                if now_s >= promised_s + patience_s:
                    self._lose(
                        f"nothing has come for {now_s - self._answered_s:.1f} s, which is"
                        f" {patience_s:g} s more than {self.bytes_per_s:g} bytes/s take"
                    )
                    self._process.kill()  # else it might go on, and write where others read
                    self._check()
                self._changed.wait(promised_s + patience_s - now_s)

    def _send(self, order: Order, handles: Sequence[int] = ()) -> None:
        """Send an order, in its place behind those before."""
        with self._changed:
            self._check()
            try:
                socket.send_fds(self._socket, [order.pack()], handles)
            except BlockingIOError:
                self._lose(f"it has taken no orders for {_SEND_S} s")
                self._process.kill()
                self._check()
            except OSError:  # its end is closed, as it ends
                self._process.kill()  # else, if it is something else, it would be waited for
                self._lose(f"it ended with status {self._process.wait()}")
                self._check()

    def _check(self) -> None:
        if self._lost is not None:
            raise LinkLost(
                f"the throttled link of {self._arena.path} (process {self.pid}) is lost:"
                f" {self._lost}"
            )

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = self._lost or reason
            self._changed.notify_all()

    def _receive(self) -> None:
        """Take answers until the process has ended."""
        with contextlib.suppress(OSError):
            while data := self._socket.recv(link_process.ANSWER_BYTES):
                self._note(Answer.unpack(data))
        self._lose(f"it ended with status {self._process.wait()}")
        with self._changed:
            self._asked.clear()
            self._free.clear()

    def _note(self, answer: Answer) -> None:
        with self._changed:
            asked = self._asked.pop(answer.number)
            asked.has_come = answer.moved_bytes == asked.size_bytes
            asked.landing.num_under_way -= 1
            if not asked.landing.is_taken and not asked.landing.num_under_way:
                self._free[asked.landing.number] = asked.landing
            self._answered_s = time.monotonic()
            self._busy_s += answer.busy_s
            self._moved_bytes += answer.moved_bytes
            self._changed.notify_all()
