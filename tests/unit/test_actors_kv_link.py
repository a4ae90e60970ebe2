"""A link brings what was asked for, at its rate, or says within its patience that it is lost."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.kv import link_process
from actors.kv.arena import SHARED_MEMORY, Arena
from actors.kv.link import DirectLink, Link, LinkLost, ThrottledLink, open_link
from actors.kv.link_process import MAX_PIECE_BYTES, Order
from tests.faulty_links import (
    CorruptingLink,
    DelayedLink,
    FaultyLink,
    LosingLink,
    ReorderingLink,
)

MiB = 2**20
FAST = 50e9  # bytes/s: more than any machine that runs these tests copies
SLOW = 1e3  # nothing of a MiB comes while a test runs
WAIT_S = 20.0  # for what happens at once unless something is broken
RANGES = [(at * 1000, 1000) for at in range(100)]

HOLD = """
import sys
from actors.kv.arena import Arena
from actors.kv.link import ThrottledLink
arena = Arena.create(sys.argv[1], "host", 2**20)
link = ThrottledLink(arena, 1e3)
views = link.fetch([(0, 2**20)])
import threading; threading.Thread(target=lambda: next(views), daemon=True).start()
print(link.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 8 * MiB)
    arena.view(0, 8 * MiB)[:] = random.Random(0).randbytes(8 * MiB)
    yield arena
    arena.close()


Throttled = Callable[[float], ThrottledLink]


@pytest.fixture
def throttled(arena: Arena) -> Iterator[Throttled]:
    links: list[ThrottledLink] = []

    def throttled(bytes_per_s: float) -> ThrottledLink:
        links.append(ThrottledLink(arena, bytes_per_s))
        return links[-1]

    yield throttled
    for link in links:
        link.close()


def lives(pid: int) -> bool:
    """Return whether a process is there that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def num_landings(pid: int) -> int:
    """Return how many landing memories a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:ringspan-link")


def wait_until(what: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def odd_ranges(seed: int, count: int) -> list[tuple[int, int]]:
    """Return ranges of any size and offset, of which some are empty and some overlap."""
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 63, 4096, 65537, rng.randrange(2 * MiB)]) for _ in range(count)]
    return [(rng.randrange(8 * MiB - size + 1), size) for size in sizes]


@pytest.mark.parametrize("bytes_per_s", [None, FAST, 200e6])
def test_bytes_come_as_they_are_in_the_arena(arena: Arena, bytes_per_s: float | None) -> None:
    """Whatever their sizes, which may grow from one fetch to the next, and in their order."""
    link = open_link(arena, bytes_per_s)
    asked_bytes = 0
    for seed in range(3):
        ranges = odd_ranges(seed, 20)
        views = link.fetch(iter(ranges))
        for offset_bytes, size_bytes in ranges:
            assert next(views) == arena.view(offset_bytes, size_bytes)
            asked_bytes += size_bytes
        assert next(views, None) is None
    assert link.moved_bytes == asked_bytes
    assert link.is_simulated == (bytes_per_s is not None)
    assert link.bytes_per_s == bytes_per_s
    link.close()


def test_nothing_asked_for_is_nothing(arena: Arena, throttled: Throttled) -> None:
    """A rank that has no part of a restore still runs through it."""
    assert list(throttled(FAST).fetch([])) == []
    assert list(DirectLink(arena).fetch([])) == []


@pytest.mark.parametrize("bytes_per_s", [None, FAST])
def test_a_range_beyond_the_arena_is_refused_before_any_moves(
    arena: Arena, bytes_per_s: float | None
) -> None:
    """A wrong lease must not become other bytes, nor be noticed after half a restore."""
    link = open_link(arena, bytes_per_s)
    for bad in [(8 * MiB, 1), (-1, 1), (0, -1)]:
        with pytest.raises(ValueError, match="not within the arena"):
            link.fetch([(0, 5), bad])
    assert link.moved_bytes == 0
    link.close()


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(arena: Arena, bytes_per_s: float) -> None:
    """Such a link would never bring anything."""
    with pytest.raises(ValueError, match="bytes/s"):
        ThrottledLink(arena, bytes_per_s)


@pytest.mark.parametrize("num_ranges", [1, 16])
def test_no_more_than_the_rate_comes(throttled: Throttled, num_ranges: int) -> None:
    """The bound that a link stands for: n bytes never come sooner than in n / rate."""
    link, size_bytes = throttled(20e6), 4 * MiB
    part_bytes = size_bytes // num_ranges
    start_s = time.monotonic()
    for _ in link.fetch([(at * part_bytes, part_bytes) for at in range(num_ranges)]):
        pass
    elapsed_s = time.monotonic() - start_s
    assert elapsed_s >= (size_bytes - MAX_PIECE_BYTES) / 20e6
    assert size_bytes / 20e6 * 0.99 <= link.busy_s <= elapsed_s


def test_idle_time_is_not_saved_up(throttled: Throttled) -> None:
    """A restore after a pause must not be faster than the link that it stands for."""
    link = throttled(20e6)
    list(link.fetch([(0, 1)]))
    time.sleep(0.1)  # for which a bucket that saves would give 2 MB at once
    start_s = time.monotonic()
    list(link.fetch([(0, 2 * MiB)]))
    assert time.monotonic() - start_s >= MiB / 20e6


def test_fetches_at_once_share_the_rate(throttled: Throttled) -> None:
    """Two restores on one link take the time of both: it is one link."""
    link = throttled(20e6)
    start_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda at: list(link.fetch([(at, MiB)])), range(4)):
            pass
    assert time.monotonic() - start_s >= 3 * MiB / 20e6
    assert link.moved_bytes == 4 * MiB


def test_later_ranges_are_under_way_while_one_is_read(throttled: Throttled) -> None:
    """Otherwise link and reader would take turns, and no split could hide the one by the other."""
    link = throttled(FAST)
    views = link.fetch([(at * MiB, MiB) for at in range(8)])
    next(views)
    wait_until(lambda: link.moved_bytes == 3 * MiB)
    next(views)
    wait_until(lambda: link.moved_bytes == 4 * MiB)


def test_two_fetches_in_turn_do_not_wait_for_each_other(arena: Arena, throttled: Throttled) -> None:
    """Each has landing memory of its own: one that is not read on does not hold the others up."""
    link = throttled(FAST)
    first, second = (link.fetch([(at * 1000, 999) for at in range(9)]) for _ in range(2))
    held = next(first)
    assert [bytes(view) for view in second] == [bytes(arena.view(n * 1000, 999)) for n in range(9)]
    assert held == arena.view(0, 999)
    assert len(list(first)) == 8


def test_many_threads_get_what_they_asked_for(arena: Arena, throttled: Throttled) -> None:
    """Several restores and requests at once, some of which stop midway."""
    link = throttled(FAST)

    def read(seed: int) -> None:
        for number in range(10):
            ranges = odd_ranges(seed * 100 + number, 8)
            views = link.fetch(ranges)
            for offset_bytes, size_bytes in ranges[: 3 + number % 6]:
                assert next(views) == arena.view(offset_bytes, size_bytes)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, seed) for seed in range(8)]:
            done.result(WAIT_S)


def test_an_abandoned_fetch_frees_the_link(arena: Arena, throttled: Throttled) -> None:
    """What it had under way is dropped: at this rate it would block the link for an hour."""
    link = throttled(SLOW)
    views = link.fetch([(0, 1), (0, 4 * MiB), (0, 4 * MiB)])
    next(views)
    del views
    gc.collect()
    [view] = link.fetch([(7, 5)])
    assert view == arena.view(7, 5)
    assert link.moved_bytes < 4 * MiB


def test_landing_memory_comes_back(throttled: Throttled) -> None:
    """A thousand restores take the memory of one."""
    link = throttled(FAST)

    for number in range(1000):
        views = link.fetch([(0, 1000), (5, 100 + number * 100)])
        next(views)
        if number % 3:
            next(views)
        views.close()  # type: ignore[attr-defined]
    list(link.fetch([(0, 8 * MiB)]))
    assert (
        1 <= num_landings(link.pid) <= 4
    )  # those whose answers were under way when the next was taken


def expect_lost(link: ThrottledLink, patience_s: float, match: str) -> None:
    """Fetch, in a thread so that a hang fails the test, and expect it to be lost."""

    def fetch() -> None:
        for _ in link.fetch([(0, MiB)] * 8, patience_s):
            pass

    with ThreadPoolExecutor(1) as pool, pytest.raises(LinkLost, match=match):
        pool.submit(fetch).result(WAIT_S)


def test_a_killed_process_is_noticed_at_once(throttled: Throttled) -> None:
    """Before and during a fetch, long before its patience ends; the error says which and how."""
    link = throttled(SLOW)
    killer = threading.Timer(0.05, os.kill, (link.pid, signal.SIGKILL))
    killer.start()
    expect_lost(link, 3600.0, f"process {link.pid}.*status -9")
    expect_lost(link, 3600.0, "status -9")


def test_a_stopped_process_is_lost_when_patience_ends(throttled: Throttled) -> None:
    """A reader must never hang on it. It is killed: it might wake up and write into memory."""
    link = throttled(FAST)
    list(link.fetch([(0, 5)]))
    os.kill(link.pid, signal.SIGSTOP)
    start_s = time.monotonic()
    expect_lost(link, 0.2, "nothing has come for .* 0.2 s more than")
    assert time.monotonic() - start_s >= 0.2
    wait_until(lambda: not lives(link.pid))
    expect_lost(link, 3600.0, "nothing has come")


def test_all_readers_learn_that_the_link_is_lost(throttled: Throttled) -> None:
    """Also those that are more patient than the one who found out."""
    link = throttled(FAST)
    os.kill(link.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(expect_lost, link, 3600.0, "nothing has come") for _ in range(4)]
        expect_lost(link, 0.2, "nothing has come")
        for each in waiting:
            each.result(2 * WAIT_S)


def test_what_the_rate_takes_is_no_reason_to_lose_patience(throttled: Throttled) -> None:
    """A range that takes ten times the patience by the link's own rate comes."""
    link = throttled(2e6)
    [view] = link.fetch([(0, MiB)], 0.05)
    assert len(view) == MiB


def test_closing_leaves_neither_process_nor_memory(arena: Arena) -> None:
    """Also while a fetch waits, which ends; a second close is no error."""
    gc.collect()
    before = num_landings(os.getpid()), len(os.listdir("/proc/self/fd"))
    link = ThrottledLink(arena, SLOW)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(link.fetch([(0, MiB)])))
        wait_until(lambda: bool(link._asked))
        link.close()
        with pytest.raises(LinkLost, match="closed"):
            waiting.result(WAIT_S)
    link.close()
    assert not lives(link.pid)
    with pytest.raises(LinkLost, match="closed"):
        list(link.fetch([(0, 1)]))
    del waiting
    gc.collect()
    assert (num_landings(os.getpid()), len(os.listdir("/proc/self/fd"))) == before


def test_a_stopped_process_is_closed_too(arena: Arena) -> None:
    """It does not see that its parent has gone, and is killed."""
    link = ThrottledLink(arena, FAST)
    os.kill(link.pid, signal.SIGSTOP)
    link.close()
    assert not lives(link.pid)


def test_the_process_ends_with_its_parent() -> None:
    """However that dies, and in the middle of a range: nothing may be left on a machine."""
    cluster = f"test{uuid.uuid4().hex[:12]}"
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD, cluster],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert lives(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not lives(pid))
    for left in SHARED_MEMORY.glob(f"ringspan-*{cluster}*"):
        left.unlink()  # the arena, which the next store's sweep would remove


def test_the_process_imports_nothing_but_the_standard_library(throttled: Throttled) -> None:
    """It must be up in a moment, on a machine that computes."""
    link = throttled(FAST)
    list(link.fetch([(0, 5)]))
    maps = Path(f"/proc/{link.pid}/maps").read_text()
    assert "site-packages" not in maps
    code = "import sys, actors.kv.link; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_link_to_an_arena_that_is_gone_cannot_be_opened(arena: Arena) -> None:
    """And leaves no process."""
    arena.path.unlink()
    with pytest.raises(FileNotFoundError):
        ThrottledLink(arena, FAST)


def test_a_direct_link_is_busy_while_a_view_is_read(arena: Arena) -> None:
    """Whoever reads the view moves the bytes; two readers at once are not busy twice."""
    link = DirectLink(arena)
    first, second = link.fetch([(0, 5)] * 2), link.fetch([(0, 5)])
    start_s = time.monotonic()
    next(first)
    next(second)
    time.sleep(0.02)
    busy_s = link.busy_s
    assert 0.02 <= busy_s <= time.monotonic() - start_s
    del first, second
    gc.collect()
    ended_s = link.busy_s
    time.sleep(0.02)
    assert busy_s <= ended_s == link.busy_s


def test_a_good_link_passes_through_its_wrapper(arena: Arena) -> None:
    """What harms nothing changes nothing, or tests that use it would not test the link."""
    for kind in (FaultyLink, DelayedLink, LosingLink, CorruptingLink, ReorderingLink):
        inner = DirectLink(arena)
        link: Link = kind(inner, share=0.0)
        assert [bytes(v) for v in link.fetch(RANGES)] == [bytes(arena.view(*r)) for r in RANGES]
        assert (link.moved_bytes, link.is_simulated) == (100_000, False)
        assert link.busy_s == inner.busy_s


@pytest.mark.parametrize("kind", [CorruptingLink, ReorderingLink])
def test_faulty_links_do_the_harm_that_they_count(arena: Arena, kind: type[FaultyLink]) -> None:
    """A loader is tested with them: a fault that is none would prove nothing. The arena stays."""
    before = bytes(arena.view(0, 8 * MiB))
    link = kind(DirectLink(arena), share=0.3)
    pairs = zip(link.fetch(RANGES), RANGES, strict=True)
    bad = [bytes(view) != bytes(arena.view(*each)) for view, each in pairs]
    assert 0 < sum(bad) == link.num_faults < 100
    assert arena.view(0, 8 * MiB) == before


def test_a_link_that_loses_stays_lost(arena: Arena) -> None:
    """As one whose process has died."""
    link = LosingLink(DirectLink(arena), share=0.1)
    with pytest.raises(LinkLost):
        list(link.fetch(RANGES))
    assert link.num_faults == 1
    with pytest.raises(LinkLost):
        list(link.fetch(RANGES))


def test_a_delayed_link_brings_the_right_bytes_late(arena: Arena) -> None:
    """Late is not wrong."""
    link = DelayedLink(DirectLink(arena), max_delay_s=0.001)
    assert [bytes(v) for v in link.fetch(RANGES)] == [bytes(arena.view(*r)) for r in RANGES]
    assert link.num_faults == 100


def test_orders_that_nobody_takes_do_not_hang(throttled: Throttled) -> None:
    """A stopped process's socket fills up when many restores begin and are given up."""
    link = throttled(FAST)
    os.kill(link.pid, signal.SIGSTOP)

    def send() -> None:
        while True:
            link._send(Order(link_process.DROP, 1))

    with ThreadPoolExecutor(1) as pool, pytest.raises(LinkLost, match="taken no orders for 1 s"):
        pool.submit(send).result(WAIT_S)


def test_orders_to_a_process_that_has_just_ended_are_lost(throttled: Throttled) -> None:
    """The error says how it ended, whoever notices first."""
    for _ in range(5):
        link = throttled(FAST)
        os.kill(link.pid, signal.SIGKILL)
        expect_lost(link, 3600.0, "status -9")
