"""The second process of a throttled link (`actors.kv.link`): copies ranges at a set rate.

    python -I -S link_process.py BYTES_PER_S

A script of the standard library alone, which is up in a moment. Its stdin is one end of a
socket of packets: orders come there and answers go, and when the other end is closed, by
whatever end its parent comes to, this process ends.

A token bucket that saves nothing up: range i, asked for at a_i, has come at

    c_i = max(c_{i-1}, a_i) + size_bytes_i / bytes_per_s

or later where this machine is slower than that. It is a schedule, not a sequence of sleeps:
who wakes up late makes up for it, so that nothing drifts, but never for time in which
nothing was asked for. Times are of CLOCK_MONOTONIC, which both processes read alike.
"""

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from typing import NamedTuple

ARENA = 0  # the memory that is read; those that are written have other numbers
MAP, UNMAP, COPY, DROP = b"M", b"U", b"C", b"D"
MIN_PIECE_BYTES = 64 * 2**10
MAX_PIECE_BYTES = 2**20
PIECE_S = 1e-3  # what is copied at once takes about so long, within these bounds
_ORDER = struct.Struct("<cQQQQQd")
_ANSWER = struct.Struct("<QQd")
ANSWER_BYTES = _ANSWER.size


class Order(NamedTuple):
    """What the parent wants: map or unmap a memory, copy a range, or drop the copies into one."""

    kind: bytes
    memory: int
    number: int = 0  # of the copy
    offset_bytes: int = 0  # within the memory
    arena_offset_bytes: int = 0
    size_bytes: int = 0
    asked_s: float = 0.0

    def pack(self) -> bytes:
        """Return the packet."""
        return _ORDER.pack(*self)


class Answer(NamedTuple):
    """A copy is made, or was dropped: then fewer bytes have moved than were asked for."""

    number: int
    moved_bytes: int
    busy_s: float  # since it was asked for, or the copy before it was done

    def pack(self) -> bytes:
        """Return the packet."""
        return _ANSWER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> "Answer":
        """Return what a packet says."""
        return cls(*_ANSWER.unpack(data))


class Carrier:
    """Carries out orders in their order."""

    def __init__(self, orders: socket.socket, bytes_per_s: float) -> None:
        """Take a socket whose first order maps the arena."""
        self._socket = orders
        self._bytes_per_s = bytes_per_s
        piece_bytes = int(bytes_per_s * PIECE_S)
        self._piece_bytes = min(max(piece_bytes, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        self._memories: dict[int, memoryview] = {}
        self._waiting: deque[Order] = deque()
        self._current: Order | None = None  # None: nothing is carried, or it was dropped
        self._come_s = 0.0  # when the last range had come, by the law above
        self._answered_s = 0.0  # when that was said

    def run(self) -> None:
        """Return when the other end is closed."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                if self._waiting:
                    self._carry(self._waiting.popleft())
                else:
                    self._take_order()

    def _carry(self, order: Order) -> None:
        begin_s = max(self._come_s, order.asked_s)
        arena, target = self._memories[ARENA], self._memories[order.memory]
        moved_bytes, is_wanted = 0, True
        self._current = order
        while moved_bytes < order.size_bytes and is_wanted:
            size = min(self._piece_bytes, order.size_bytes - moved_bytes)
            to, start = order.offset_bytes + moved_bytes, order.arena_offset_bytes + moved_bytes
            target[to : to + size] = arena[start : start + size]
            come_s = begin_s + (moved_bytes + size) / self._bytes_per_s
            is_wanted = self._attend(come_s)
            if is_wanted:
                moved_bytes += size
                self._come_s = come_s
        self._current = None
        now_s = time.monotonic()
        if not is_wanted:
            self._come_s = max(self._come_s, now_s)  # it was busy until it was told to stop
        busy_s = now_s - max(self._answered_s, order.asked_s)
        self._answered_s = now_s
        self._answer(Answer(order.number, moved_bytes, busy_s))

    def _attend(self, until_s: float) -> bool:
        """Take orders until a time; return early, and False, if what is carried was dropped."""
        while self._current is not None:
            left_s = max(until_s - time.monotonic(), 0.0)
            if select.select([self._socket], [], [], left_s)[0]:
                self._take_order()
            elif time.monotonic() >= until_s:
                return True
        return False

    def _take_order(self) -> None:
        data, handles, _, _ = socket.recv_fds(self._socket, _ORDER.size, 1)
        if not data:
            raise EOFError
        order = Order(*_ORDER.unpack(data))
        if order.kind == COPY:
            self._waiting.append(order)
        elif order.kind == DROP:
            self._drop(order.memory)
        elif order.kind == MAP:
            access = mmap.ACCESS_READ if order.memory == ARENA else mmap.ACCESS_WRITE
            memory = mmap.mmap(handles[0], order.size_bytes, access=access)
            self._memories[order.memory] = memoryview(memory)
            os.close(handles[0])
        else:
            del self._memories[order.memory]

    def _drop(self, memory: int) -> None:
        dropped = [order for order in self._waiting if order.memory == memory]
        self._waiting = deque(order for order in self._waiting if order.memory != memory)
        for order in dropped:
            self._answer(Answer(order.number, 0, 0.0))
        if self._current is not None and self._current.memory == memory:
            self._current = None

    def _answer(self, answer: Answer) -> None:
        self._socket.sendall(answer.pack())


def main() -> None:
    """Carry until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
    with socket.socket(fileno=0) as orders:
        Carrier(orders, float(sys.argv[1])).run()


if __name__ == "__main__":
    main()
