"""Arenas are shared, private to the user, and gone when their store is."""

import fcntl
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.kv.arena import SHARED_MEMORY, Arena, sweep

HOLD = """
import sys
from actors.kv.arena import Arena
arena = Arena.create(sys.argv[1], "host", 4096)
print(arena.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"test{uuid.uuid4().hex[:12]}"
    yield name
    for left in SHARED_MEMORY.glob(f"ringspan-*{name}*"):
        left.unlink()


def holder(cluster: str) -> tuple[subprocess.Popen[str], Path]:
    """Return another process that has an arena."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, cluster],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_one_mapping_writes_another_reads(cluster: str) -> None:
    """Ranks and store see the same bytes without a copy."""
    arena = Arena.create(cluster, "host", 1 << 20)
    other = Arena.attach(str(arena.path))

    arena.view(4096, 5)[:] = b"bytes"

    assert bytes(other.view(4096, 5)) == b"bytes"
    assert other.capacity_bytes == arena.capacity_bytes == 1 << 20
    other.close()
    assert arena.path.exists()
    arena.close()
    arena.close()
    assert not arena.path.exists()


def test_arena_is_private_and_takes_no_memory_yet(cluster: str) -> None:
    """Another user must not read a tenant's KV; a large arena must start at once."""
    arena = Arena.create(cluster, "a/b c", 1 << 30)
    status = arena.path.stat()

    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 < 1 << 20
    assert arena.path.name == f"ringspan-{os.getuid()}-{cluster}-a_b_c-{os.getpid()}.arena"
    arena.close()


def test_views_stay_within_the_arena(cluster: str) -> None:
    """A wrong offset must not silently give a shorter view."""
    arena = Arena.create(cluster, "host", 4096)
    for offset, size in [(4096, 1), (0, 4097), (-64, 64), (64, -64)]:
        with pytest.raises(ValueError, match="not within the arena"):
            arena.view(offset, size)
    arena.close()


def test_closing_leaves_views_in_use_readable(cluster: str) -> None:
    """A thread that still sends a piece must not crash the process at shutdown."""
    arena = Arena.create(cluster, "host", 4096)
    view = arena.view(0, 64)
    view[:5] = b"bytes"
    arena.close()
    assert bytes(view[:5]) == b"bytes"
    assert not arena.path.exists()


def test_arena_that_does_not_fit_is_refused(cluster: str) -> None:
    """To touch memory that is not there would kill the process without a word."""
    total = os.statvfs(SHARED_MEMORY)
    with pytest.raises(OSError, match="does not fit into"):
        Arena.create(cluster, "host", total.f_blocks * total.f_frsize + (1 << 20))
    assert not list(SHARED_MEMORY.glob(f"ringspan-*{cluster}*"))


def test_what_other_arenas_were_promised_counts(cluster: str) -> None:
    """Two arenas that each fit, but not together, would both fail when they fill."""
    total = os.statvfs(SHARED_MEMORY)
    most = int(total.f_bavail * total.f_frsize * 0.6)
    first = Arena.create(cluster, "first", most)
    with pytest.raises(OSError, match="does not fit into"):
        Arena.create(cluster, "second", most)
    first.close()
    Arena.create(cluster, "second", most).close()


def test_second_arena_of_one_name_is_refused(cluster: str) -> None:
    """Two stores must not write into one arena."""
    arena = Arena.create(cluster, "host", 4096)
    with pytest.raises(FileExistsError, match="exists already"):
        Arena.create(cluster, "host", 4096)
    assert arena.path.exists()
    arena.close()


def test_only_arenas_of_dead_stores_are_swept(cluster: str) -> None:
    """A killed store leaves its memory; a living one must keep it."""
    own = Arena.create(cluster, "own", 4096)
    process, path = holder(cluster)
    try:
        assert path not in sweep()
        assert path.exists()
        process.kill()
        process.wait()
        assert path.exists()
        assert path in sweep()
        assert not path.exists()
        assert own.path.exists()
    finally:
        process.kill()
        process.communicate()
        own.close()


def test_sweep_as_an_arena_is_made_takes_nothing(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a file and locking it there is a moment in which it looks dead."""
    flock, swept = fcntl.flock, list[Path]()

    def sweep_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        swept.extend(sweep())
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    arena = Arena.create(cluster, "host", 4096)
    assert arena.path in swept
    assert os.path.samefile(arena.path, f"/proc/self/fd/{arena._fd}")
    assert arena.path not in sweep()
    arena.close()


def test_sweep_leaves_an_arena_made_under_its_hands(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead one is removed by another, and a new store has made one of the same name."""
    dead = SHARED_MEMORY / f"ringspan-{os.getuid()}-{cluster}-host-{os.getpid()}.arena"
    dead.touch()
    flock, made = fcntl.flock, list[Arena]()

    def replace_first(fd: int, operation: int) -> None:
        if os.path.exists(dead) and os.path.samestat(os.fstat(fd), dead.stat()) and not made:
            monkeypatch.setattr(fcntl, "flock", flock)
            dead.unlink()
            made.append(Arena.create(cluster, "host", 4096))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    assert dead not in sweep()
    assert made[0].path == dead
    assert dead.exists()
    made[0].close()


def test_arena_that_is_gone_cannot_be_attached(cluster: str) -> None:
    """The rank then knows that its store is gone."""
    arena = Arena.create(cluster, "host", 4096)
    arena.close()
    with pytest.raises(FileNotFoundError):
        Arena.attach(arena.path)
