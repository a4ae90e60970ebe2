"""Clients that go away in every way there is, at both doors of a real server.

Each one's request must be gone soon, and after all of them nothing may be left: no answer, no
page, no connection, no memory.
"""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from actors.messages import Request
from cluster import Client, SamplingParams
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.upload import write_request
from tests.integration.test_http import KEY, LONG, Served

CASES = 1000
WARM_UP = 150
FREED_S = 2.0
GRACE_S = 60
SEEN_S = 20.0  # for a request to be seen under way
MORE_BYTES = 48 * 2**20  # of a process, over all cases: allocators keep some
PROMPT = "a" * 6000  # its prefill takes longer than a client needs to go
GENERATE = "/ringspan.v1.Inference/Generate"
ENDLESS = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=0.0)
SECRET = [("authorization", f"Bearer {KEY}")]
Vanish = Callable[[], None]


class Doors:
    """A running server, its addresses and its status."""

    def __init__(self, served: Served) -> None:
        """Find both doors."""
        self.served = served
        line = next(line for line in served.lines if "gRPC at" in line)
        self.rpc = line.split("gRPC at ")[1].split(";")[0].strip()
        host, port = served.url.removeprefix("http://").rsplit(":", 1)
        self.http = host, int(port)
        self.client = Client(self.rpc, api_key=KEY)

    def count(self) -> int:
        """Return how many requests are under way."""
        status = self.client.status()
        return int(status["requests"]) + status["running"] + status["waiting"]

    def wait_for(self, is_right: Callable[[int], bool], limit_s: float) -> float:
        """Wait for a count; return how long it took."""
        begin_s = time.monotonic()
        while not is_right(self.count()):
            assert time.monotonic() - begin_s < limit_s, f"{self.count()} are under way"
            time.sleep(0.01)
        return time.monotonic() - begin_s


def http_request(*, stream: bool, prompt: str) -> bytes:
    body = json.dumps({**LONG, "prompt": prompt, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """Close with RST: the server's next write fails."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Say that nothing more will be sent, and stay: as good as gone for HTTP/1.1's servers."""
    connection.shutdown(socket.SHUT_WR)


@contextmanager
def http_client(
    doors: Doors, case: str, leave: Callable[[socket.socket], None]
) -> Iterator[Vanish]:
    """Bring a request so far as the case says; give what leaves it."""
    with socket.create_connection(doors.http, timeout=60) as connection:
        if case == "upload":
            whole = http_request(stream=True, prompt=PROMPT)
            connection.sendall(whole[: len(whole) // 2])
        else:
            prompt = "a" if case == "stream" else PROMPT
            connection.sendall(http_request(stream=case != "whole", prompt=prompt))
            if case == "stream":
                told = b""
                while b'"text"' not in told:
                    told = connection.recv(65536)
                    assert told

            else:
                doors.wait_for(bool, SEEN_S)
        yield lambda: leave(connection)


@contextmanager
def rpc_client(doors: Doors, case: str, leave: str) -> Iterator[Vanish]:
    """As `http_client`, over gRPC; ``leave`` is cancel, close (of the channel) or reset."""
    with proxy(doors.rpc) as (target, cut):
        channel = grpc.insecure_channel(target if leave == "reset" else doors.rpc)
        prompt = "a" if case == "stream" else PROMPT
        sent = write_request(Request(request_id="", text=prompt, params=ENDLESS))
        gone = threading.Event()

        def upload() -> Iterator[bytes]:
            for message in sent:
                yield message.SerializeToString()
            if case == "upload":
                gone.wait(60)

        call = channel.stream_stream(GENERATE)(upload(), metadata=SECRET, timeout=120)
        try:
            if case == "stream":
                while not pb.GenerateResponse.FromString(next(call)).HasField("delta"):
                    pass
            elif case == "upload":
                time.sleep(0.05)
            else:
                doors.wait_for(bool, SEEN_S)
            yield {"cancel": call.cancel, "close": channel.close, "reset": cut}[leave]
        finally:
            gone.set()
            channel.close()


@contextmanager
def proxy(target: str) -> Iterator[tuple[str, Vanish]]:
    """A way to a server that can be cut: both connections end with RST."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(65536):
                sink.sendall(piece)
        except OSError:
            pass

    def accept() -> None:
        try:
            while True:
                near, _ = listener.accept()
                host, port = target.rsplit(":", 1)
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()
        except OSError:
            pass

    def cut() -> None:
        listener.close()
        for end in ends:
            # A close alone would wait for the thread that reads.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RD)
            end.close()
        ends.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.close()
        cut()


KINDS = [
    *(
        ("http", case, leave)
        for case in ("stream", "prefill", "upload")
        for leave in (close, reset)
    ),
    ("http", "whole", close),
    ("http", "whole", reset),
    ("http", "stream", half_close),
    ("http", "prefill", half_close),
    *(("rpc", "stream", leave) for leave in ("cancel", "close", "reset")),
    *(("rpc", "prefill", leave) for leave in ("cancel", "close", "reset")),
    ("rpc", "upload", "cancel"),
    ("rpc", "upload", "reset"),
]


def vanish(doors: Doors, kind: tuple[str, str, object]) -> float:
    """Have one client vanish; return how long its request was there without it."""
    door, case, leave = kind
    make = http_client if door == "http" else rpc_client
    with make(doors, case, leave) as go:  # type: ignore[arg-type]
        go()
        return doors.wait_for(lambda count: not count, 60.0)


def processes(doors: Doors) -> list[psutil.Process]:
    """The server, and the coordinator's process."""
    server = psutil.Process(doors.served.process.pid)
    children = server.children(recursive=True)
    return [server, *(each for each in children if "Coordinator" in " ".join(each.cmdline()))]


@pytest.fixture
def doors(needle: Path) -> Iterator[Doors]:
    served = Served(needle, "-cp", "2", "--grace-s", str(GRACE_S))
    doors = Doors(served)
    yield doors
    doors.client.close()
    served.stop()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_nothing_is_left_of_a_thousand_clients(doors: Doors) -> None:
    rng = random.Random(7)
    took_s: dict[tuple[str, str, str], list[float]] = {}
    before: list[tuple[int, int]] = []
    for index in range(CASES):
        if index == WARM_UP:
            before = [(each.num_fds(), each.memory_info().rss) for each in processes(doors)]
        kind = rng.choice(KINDS)
        name = getattr(kind[2], "__name__", str(kind[2]))
        took_s.setdefault((kind[0], kind[1], name), []).append(vanish(doors, kind))

    for name, each_s in sorted(took_s.items()):
        print(f"{' '.join(name)}: {len(each_s)} clients, freed within {max(each_s):.3f} s")
    assert max(map(max, took_s.values())) <= FREED_S
    status = doors.client.status()
    assert (status["requests"], status["running"], status["waiting"]) == (0, 0, 0)
    assert sum(each["running"] for each in status["pages"]) == 0
    for (fds, rss_bytes), process in zip(before, processes(doors), strict=True):
        now_fds, now_bytes = process.num_fds(), process.memory_info().rss
        print(f"{process.name()}: {fds} -> {now_fds} files, {rss_bytes} -> {now_bytes} bytes")
        assert now_fds <= fds + 8
        assert now_bytes <= rss_bytes + MORE_BYTES
    begin_s = time.monotonic()
    assert doors.served.stop() == 0  # without the grace: nobody is inside
    assert time.monotonic() - begin_s < GRACE_S
    assert "Traceback" not in "".join(doors.served.lines), "".join(doors.served.lines)
