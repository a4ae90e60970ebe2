"""The disk tier keeps what it was given, within its limit, whatever happens to the disk."""

import concurrent.futures
import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.kv.disk import DiskTier
from actors.kv.disk_file import FRAMING_BYTES, FileName
from actors.kv.pieces import PieceId, verify_record
from tests.kv_records import LAYOUT, make_record, noise, piece_id

GiB = 2**30
SIZE = len(make_record(piece_id(0)))


def open_tier(directory: Path, capacity_bytes: int = GiB) -> DiskTier:
    tier = DiskTier(directory, capacity_bytes, LAYOUT)
    tier.open()
    return tier


def write(tier: DiskTier, *numbers: int, tenant: bytes = b"t") -> list[bool]:
    """Write one piece for each number."""
    return [
        tier.write(piece_id(number), tenant, make_record(piece_id(number), seed=number))
        for number in numbers
    ]


def read(tier: DiskTier, piece: PieceId) -> memoryview:
    target = memoryview(bytearray(tier.size(piece)))
    tier.read_into(piece, target)
    return target


def files(tier: DiskTier) -> list[Path]:
    return sorted(path for path in tier.directory.rglob("*") if path.is_file())


def numbers_in(tier: DiskTier, numbers: range) -> list[int]:
    return [number for number in numbers if tier.find(piece_id(number).key)]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    assert write(tier, 1, 2) == [True, True]
    assert read(tier, piece_id(2)) == make_record(piece_id(2), seed=2)
    verify_record(read(tier, piece_id(1)), piece_id(1), LAYOUT)
    stats = tier.stats()
    assert (stats["files"], stats["written"], stats["hits"]) == (2, 2, 2)
    assert stats["bytes"] == sum(path.stat().st_size for path in files(tier))


def test_a_block_is_found_with_all_its_pieces(tmp_path: Path) -> None:
    """Ranks write parts of one block, in several encodings; other blocks are not named."""
    tier = open_tier(tmp_path)
    key = noise(32, 5)
    pieces = [PieceId(key, 0, 8, "int8"), PieceId(key, 0, 8, "raw"), PieceId(key, 8, 16, "raw")]
    for layer_bytes, piece in enumerate(reversed(pieces), start=100):
        tier.write(piece, b"t", make_record(piece, layer_bytes))
    write(tier, 1)
    sizes = [len(make_record(pieces[i], 102 - i)) for i in range(3)]
    assert tier.find(key) == list(zip(pieces, sizes, strict=True))
    assert tier.find(noise(32, 6)) == []


def test_a_piece_is_written_once(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    assert write(tier, 1, 1) == [True, False]
    assert len(files(tier)) == 1


def test_what_is_not_there_is_a_miss(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with pytest.raises(KeyError):
        tier.size(piece_id(1))
    with pytest.raises(KeyError):
        tier.read_into(piece_id(1), memoryview(bytearray(SIZE)))
    assert tier.stats()["misses"] == 1


def test_a_target_of_another_size_is_refused(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, 1)
    with pytest.raises(ValueError, match=f"record's {SIZE} bytes, got 7"):
        tier.read_into(piece_id(1), memoryview(bytearray(7)))


def test_a_restarted_tier_finds_everything(tmp_path: Path) -> None:
    write(open_tier(tmp_path), *range(20))
    tier = open_tier(tmp_path)
    assert tier.stats()["files"] == 20
    for number in range(20):
        assert read(tier, piece_id(number)) == make_record(piece_id(number), seed=number)


def test_others_of_this_machine_see_nothing(tmp_path: Path) -> None:
    """KV tells what was said; and whoever could write a file there could pass it off as KV."""
    old = os.umask(0)
    try:
        tier = open_tier(tmp_path / "tier")
        write(tier, 1)
    finally:
        os.umask(old)
    for path in [tmp_path / "tier", tier.directory, *tier.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_directory_that_others_can_change_is_not_trusted(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", GiB, LAYOUT)
    (tmp_path / "elsewhere").mkdir()
    tier.directory.parent.mkdir()
    tier.directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="this user's own"):
        tier.open()


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 4 * (SIZE + FRAMING_BYTES))
    write(tier, 0, 1, 2, 3)
    read(tier, piece_id(0))
    write(tier, 4, 5)
    assert numbers_in(tier, range(6)) == [0, 3, 4, 5]
    assert len(files(tier)) == 4
    assert tier.stats()["evicted"] == 2


def test_what_was_used_last_is_known_after_a_restart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, 0, 1, 2, 3)
    for number in (3, 1, 0, 2):
        read(tier, piece_id(number))
    tier = open_tier(tmp_path, 2 * SIZE + FRAMING_BYTES)
    assert numbers_in(tier, range(4)) == [0, 2]
    assert len(files(tier)) == 2


def test_the_limit_holds_at_every_moment(tmp_path: Path) -> None:
    """Also while several threads write at once: room is kept for what is under way."""
    limit = 5 * (SIZE + FRAMING_BYTES)
    tier = open_tier(tmp_path, limit)
    stop = threading.Event()
    seen = []

    def watch() -> None:
        while not stop.is_set():
            seen.append(tier.stats()["bytes"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write(tier, number), range(100)))
    stop.set()
    watcher.join()
    assert max(seen) <= limit
    on_disk = files(tier)
    assert sum(path.stat().st_size for path in on_disk) == tier.stats()["bytes"] <= limit
    assert len(on_disk) == tier.stats()["files"]


def test_what_is_larger_than_the_tier_evicts_nothing(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 3 * SIZE)
    write(tier, 1)
    assert not tier.write(piece_id(2), b"t", make_record(piece_id(2), 4 * SIZE))
    assert numbers_in(tier, range(3)) == [1]


def test_a_tenants_pieces_are_cleared_alone(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, 1, 2, tenant=b"a")
    write(tier, 3, tenant=b"b")
    tier.clear(b"a")
    assert numbers_in(tier, range(4)) == [3]
    tier.clear()
    assert files(tier) == []
    assert tier.stats()["bytes"] == 0


def test_a_dropped_piece_is_gone(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, 1, 2)
    tier.drop(piece_id(1))
    tier.drop(piece_id(1))
    assert numbers_in(tier, range(3)) == [2]
    assert len(files(tier)) == 1


@pytest.mark.parametrize("how", ["drop", "clear", "clear tenant"])
def test_what_is_cleared_while_it_is_written_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    tier = open_tier(tmp_path)
    act: dict[str, Callable[[], object]] = {
        "drop": lambda: tier.drop(piece_id(1)),
        "clear": tier.clear,
        "clear tenant": lambda: tier.clear(b"t"),
    }
    monkeypatch.setattr(os, "fsync", lambda file: act[how]())
    assert write(tier, 1) == [False]
    assert (files(tier), tier.find(piece_id(1).key)) == ([], [])


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The piece is not stored, and the tier goes on when there is room again."""
    tier = open_tier(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left") as raised:
            write(tier, 1)
    assert raised.value.errno == errno.ENOSPC
    assert files(tier) == []
    assert tier.stats()["bytes"] == 0
    assert write(tier, 1) == [True]


def test_a_write_that_the_kernel_cuts_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:1000]))
    tier = open_tier(tmp_path)
    write(tier, 1)
    assert read(tier, piece_id(1)) == make_record(piece_id(1), seed=1)


_WRITE_BEYOND_A_LIMIT = """
import resource, signal, sys
from pathlib import Path
from tests.kv_records import LAYOUT, make_record, piece_id
from actors.kv.disk import DiskTier
assert "torch" not in sys.modules and "ray" not in sys.modules
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tier = DiskTier(Path(sys.argv[1]), 2**30, LAYOUT)
tier.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    tier.write(piece_id(1), b"t", make_record(piece_id(1), 10000))
except OSError as error:
    print("refused:", error.strerror)
print("small:", tier.write(piece_id(2), b"t", make_record(piece_id(2), 1000)))
"""


def test_a_file_that_the_kernel_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real limit, in a process of its own, which needs neither torch nor Ray."""
    done = subprocess.run(
        [sys.executable, "-c", _WRITE_BEYOND_A_LIMIT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["refused: File too large", "small: True"], done.stderr
    assert len(files(open_tier(tmp_path))) == 1


def test_one_of_many_writers_of_a_piece_writes_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = [won for [won] in pool.map(lambda number: write(tier, number), [1, 2, 3, 4] * 8)]
    assert sum(written) == len(files(tier)) == 4
    assert tier.verify() == {"verified": 4, "bad": 0, "vanished": 0}


def _write_and_read(directory: Path, seed: int) -> None:
    """Write pieces that another process writes too, with other bytes, and read them all."""
    tier = open_tier(directory, 8 * (SIZE + FRAMING_BYTES))
    for number in [*range(12)] * 4:
        piece = piece_id(number)
        tier.write(piece, b"t", make_record(piece, seed=seed))
        for each in range(12):
            try:
                record = read(tier, piece_id(each))
            except KeyError:
                continue
            verify_record(record, piece_id(each), LAYOUT)
    assert tier.stats()["bad"] == 0


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    """Each evicts what the other would read: pieces vanish, but none is ever wrong."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        for done in [pool.submit(_write_and_read, tmp_path, seed) for seed in (1, 2)]:
            done.result(timeout=60)
    tier = open_tier(tmp_path)
    assert tier.verify()["bad"] == 0
    assert len(files(tier)) == tier.stats()["files"]  # of two files of one piece one is left


def test_files_may_vanish(tmp_path: Path) -> None:
    """A user with rm takes pieces away, not the tier."""
    tier = open_tier(tmp_path)
    write(tier, 1, 2, 3)
    Path(tier._files[piece_id(1)].path).unlink()
    with pytest.raises(KeyError):
        read(tier, piece_id(1))
    assert tier.find(piece_id(1).key) == []
    shutil.rmtree(tier.directory)
    assert tier.verify() == {"verified": 0, "bad": 0, "vanished": 2}
    assert tier.stats()["bytes"] == 0
    assert write(tier, 1) == [True]
    assert stat.S_IMODE(tier.directory.stat().st_mode) == 0o700


def test_a_piece_that_vanishes_under_a_reader_is_still_read(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    write(tier, 1)
    real = os.open

    def open_and_remove(path: str, flags: int, mode: int = 0o777) -> int:
        file = real(path, flags, mode)
        os.unlink(path)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_and_remove)
        assert read(tier, piece_id(1)) == make_record(piece_id(1), seed=1)
    assert files(tier) == []


def test_leftovers_of_dead_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """A writer that lives holds a lock on its file; other people's files are their own."""
    tier = open_tier(tmp_path)
    write(tier, 1)
    shard = files(tier)[0].parent
    (shard / files(tier)[0].name.replace("raw", "int8")).mkdir()
    dead = shard / ".0123456789abcdef.tmp"
    strangers = [tier.directory / "notes.txt", shard / ".tmp", shard / "x.arrow", tmp_path / "y"]
    for path in [dead, *strangers]:
        path.write_text("text")
    real = os.fsync

    def open_another(file: int) -> None:
        assert open_tier(tmp_path).stats()["files"] == 1
        real(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", open_another)
        assert write(tier, 2) == [True]
    assert not dead.exists()
    assert all(path.exists() for path in strangers)
    assert open_tier(tmp_path).verify() == {"verified": 2, "bad": 0, "vanished": 0}


def test_a_tier_of_20000_files_opens_at_once(tmp_path: Path) -> None:
    """From the names alone; under 5 s is asked, on a machine that does other things too."""
    empty = DiskTier(tmp_path, GiB, LAYOUT)
    for first in range(256):
        (empty.directory / f"{first:02x}").mkdir(parents=True)
    for number in range(20_000):
        piece = piece_id(number)
        name = FileName("0" * 16, piece, 100, 368, "0" * 32)
        (empty.directory / piece.key[:1].hex() / str(name)).touch()
    start_s = time.monotonic()
    tier = open_tier(tmp_path)
    assert time.monotonic() - start_s < 5
    assert tier.stats()["files"] == 20_000
    assert tier.find(piece_id(19_999).key) == [(piece_id(19_999), 100)]


@pytest.mark.parametrize("encoding", ["", "a/b", "Raw", "x" * 17, "a.b"])
def test_an_encoding_that_no_file_name_can_have_is_refused(tmp_path: Path, encoding: str) -> None:
    tier = open_tier(tmp_path)
    piece = piece_id(1, encoding=encoding)
    with pytest.raises(ValueError, match="encoding"):
        tier.write(piece, b"t", make_record(piece_id(1)))
