"""The disk tier: records of pieces as files, within a size limit, that outlive every process.

    DIRECTORY / digest of the layout / first byte of the key / file (`actors.kv.disk_file`)

What the layout is stands beside (`actors.kv.disk_layouts`), for whoever looks at a directory.
What is there is known from the files' names alone, read when the tier opens. Least recently
used is least recently modified: reading a file touches it. Several processes may share a
directory. Each knows the files that it found when it opened and those that it wrote, and
keeps these within its limit; a file that another one has removed is a piece less.
"""

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.kv.disk_file import (
    FRAMING_BYTES,
    FileName,
    is_temporary,
    read_file,
    remove_if_dead,
    tenant_tag,
    write_file,
)
from actors.kv.disk_layouts import write_layout
from actors.kv.pieces import (
    KEY_BYTES,
    BadPiece,
    Layout,
    PieceId,
    Record,
    checksum,
    read_header,
    verify_record,
    write_header,
)

_COUNTERS = ("hits", "misses", "written", "evicted", "bad", "vanished")


@dataclass(frozen=True)
class _File:
    path: str
    name: FileName
    file_bytes: int


@dataclass
class _Writing:
    """A file under way: room is kept for it."""

    tag: str
    reserved_bytes: int
    unwanted: bool = False  # dropped or cleared meanwhile


class DiskTier:
    """Pieces of one layout on disk. Thread-safe: the lock is never held while the disk works."""

    def __init__(self, directory: Path, capacity_bytes: int, layout: Layout) -> None:
        self.directory = directory / layout.digest().hex()
        self.capacity_bytes = capacity_bytes
        self._layout = layout
        self._lock = threading.Lock()
        self._files: OrderedDict[PieceId, _File] = OrderedDict()  # least recently used first
        self._of_key: defaultdict[bytes, set[PieceId]] = defaultdict(set)
        self._writing: dict[PieceId, _Writing] = {}
        self._bytes = 0
        self._counts: Counter[str] = Counter()

    def open(self) -> None:
        """Find what is there; remove what dead writers left, and what is beyond the limit.

        Raises:
            OSError: The directory cannot be made, or is not this user's own.
        """
        _make_private(self.directory)
        write_layout(self.directory.parent, self._layout)
        found = sorted(self._scan(), key=lambda pair: pair[0])
        surplus = []
        with self._lock:
            self._files.clear()
            self._of_key.clear()
            self._bytes = 0
            for _, file in found:
                older = self._files.get(file.name.piece)
                if older is not None:  # two processes wrote one piece, with other bytes
                    self._forget(older)
                    surplus.append(older)
                self._add(file)
            surplus += self._make_room(0)
        self._remove(surplus)

    def find(self, key: bytes) -> list[tuple[PieceId, int]]:
        """Return the pieces of a block, each with its record's bytes."""
        with self._lock:
            pieces = sorted(self._of_key.get(key, ()))
            return [(piece, self._files[piece].name.size_bytes) for piece in pieces]

    def size(self, piece: PieceId) -> int:
        """Return a record's bytes.

        Raises:
            KeyError: It is not there.
        """
        with self._lock:
            return self._files[piece].name.size_bytes

    def write(self, piece: PieceId, tenant: bytes, record: memoryview) -> bool:
        """Write a record; the least recently used ones make room.

        Returns False, and writes nothing, where the piece is there already or being written,
        or where there is no room for it even in a tier that is empty but for what is being
        written.

        Raises:
            OSError: The disk is full or fails; nothing is left behind.
        """
        tag, needed_bytes = tenant_tag(tenant), len(record) + FRAMING_BYTES
        with self._lock:
            reserved_bytes = sum(each.reserved_bytes for each in self._writing.values())
            if piece in self._files or piece in self._writing:
                return False
            if reserved_bytes + needed_bytes > self.capacity_bytes:
                return False
            evicted = self._make_room(reserved_bytes + needed_bytes)
            mine = self._writing[piece] = _Writing(tag, needed_bytes)
        try:
            self._remove(evicted)
            shard = self._make_shard(piece)
            name, file_bytes = write_file(shard, piece, tag, record)
            file = _File(f"{shard}/{name}", name, file_bytes)
        except BaseException:
            with self._lock:
                del self._writing[piece]
            raise
        with self._lock:
            del self._writing[piece]
            if not mine.unwanted:
                self._add(file)
                self._counts["written"] += 1
        if mine.unwanted:
            self._remove([file])
        return not mine.unwanted

    def read_into(self, piece: PieceId, target: memoryview) -> None:
        """Copy a record into ``target``, which has its size.

        Its header is verified against the piece, and its bytes against the file's checksum.

        Raises:
            KeyError: It is not there.
            BadPiece: It is damaged, and was removed; ``target`` must not be used.
            OSError: The disk fails.
        """
        with self._lock:
            file = self._files.get(piece)
            if file is None:
                self._counts["misses"] += 1
                raise KeyError(piece)
            self._files.move_to_end(piece)
        if len(target) != file.name.size_bytes:
            raise ValueError(
                f"the target must have the record's {file.name.size_bytes} bytes, got {len(target)}"
            )
        with self._removing_bad(file):
            read_file(file.path, file.name, target)
            read_header(target, piece, self._layout)
        with contextlib.suppress(OSError):
            # Not the kernel's own clock, whose ticks are too coarse to order two reads.
            now_ns = time.time_ns()
            os.utime(file.path, ns=(now_ns, now_ns))
        with self._lock:
            self._counts["hits"] += 1

    def drop(self, piece: PieceId) -> None:
        """Remove a piece, if it is there."""
        with self._lock:
            if piece in self._writing:
                self._writing[piece].unwanted = True
            file = self._files.get(piece)
            if file is not None:
                self._forget(file)
        if file is not None:
            self._remove([file])

    def clear(self, tenant: bytes | None = None) -> int:
        """Remove all pieces of a tenant (None: of all); return how many."""
        tag = None if tenant is None else tenant_tag(tenant)
        with self._lock:
            for writing in self._writing.values():
                writing.unwanted |= tag in (None, writing.tag)
            files = [file for file in self._files.values() if tag in (None, file.name.tenant_tag)]
            for file in files:
                self._forget(file)
        self._remove(files)
        return len(files)

    def verify(self) -> dict[str, int]:
        """Read everything and remove what is bad; return how many were verified, bad, vanished.

        Raises:
            OSError: The disk fails.
        """
        with self._lock:
            files = list(self._files.values())
        counts = {"verified": 0, "bad": 0, "vanished": 0}
        for file in files:
            try:
                with self._removing_bad(file):
                    record = memoryview(bytearray(file.name.size_bytes))
                    read_file(file.path, file.name, record)
                    verify_record(record, file.name.piece, self._layout)
                counts["verified"] += 1
            except KeyError:
                counts["vanished"] += 1
            except BadPiece:
                counts["bad"] += 1
        return counts

    def measure(self, num_bytes: int) -> tuple[float, float]:
        """Return the seconds to read and to write one record of about so many bytes.

        Both as of a piece: written whole, synced and renamed; read from the disk itself, where
        the system lets go of what it has cached, and verified as for a rank. Nothing is evicted
        for it: while it is measured, the tier may be larger than its limit by so much.

        Raises:
            ValueError: ``num_bytes`` is not positive.
            BadPiece: What was read is not what was written.
            OSError: The disk is full or fails. Nothing is left behind.
        """
        piece, record = _made_up(num_bytes, self._layout)
        target = memoryview(bytearray(b"\1") * len(record))
        shard = self._make_shard(piece)
        start_s = time.perf_counter()
        name, _ = write_file(shard, piece, tenant_tag(b"nobody"), record)
        write_s = time.perf_counter() - start_s
        # Of a process that dies here a piece is left that nobody asks for: it is evicted.
        path = f"{shard}/{name}"
        try:
            _forget_cached(path)
            start_s = time.perf_counter()
            read_file(path, name, target)
            verify_record(target, piece, self._layout)
            return time.perf_counter() - start_s, write_s
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def stats(self) -> dict[str, int]:
        """Return what is there, and what was done since this object was made.

        A read is a hit, a miss, bad, or of a file that had vanished.
        """
        with self._lock:
            return {
                "files": len(self._files),
                "bytes": self._bytes,
                "capacity_bytes": self.capacity_bytes,
                **{name: self._counts[name] for name in _COUNTERS},
            }

    def _scan(self) -> Iterator[tuple[int, _File]]:
        """Yield each file with its mtime_ns; remove dead writers' files on the way."""
        for shard in _entries(self.directory):
            if not (
                re.fullmatch("[0-9a-f]{2}", shard.name) and shard.is_dir(follow_symlinks=False)
            ):
                continue
            for entry in _entries(Path(shard.path)):
                if is_temporary(entry.name):
                    remove_if_dead(Path(entry.path))
                name = FileName.parse(entry.name)
                if name is None or name.piece.key[:1].hex() != shard.name:
                    continue
                if not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime_ns, _File(entry.path, name, status.st_size)

    @contextlib.contextmanager
    def _removing_bad(self, file: _File) -> Iterator[None]:
        """Forget a file that turns out to be bad, and remove it, or that has vanished."""
        try:
            yield
        except FileNotFoundError:
            with self._lock:
                self._forget(file)
                self._counts["vanished"] += 1
            raise KeyError(file.name.piece) from None
        except BadPiece:
            with self._lock:
                self._forget(file)
                self._counts["bad"] += 1
            self._remove([file])
            raise

    def _add(self, file: _File) -> None:
        if file.name.piece in self._files:  # `open` found it while it was being written
            self._forget(self._files[file.name.piece])
        self._files[file.name.piece] = file
        self._of_key[file.name.piece.key].add(file.name.piece)
        self._bytes += file.file_bytes

    def _forget(self, file: _File) -> None:
        """Take a file from the index, unless another one has its place by now."""
        piece = file.name.piece
        if self._files.get(piece) is not file:
            return
        del self._files[piece]
        self._bytes -= file.file_bytes
        self._of_key[piece.key].discard(piece)
        if not self._of_key[piece.key]:
            del self._of_key[piece.key]

    def _make_room(self, needed_bytes: int) -> list[_File]:
        """Take the least recently used files from the index until the rest leaves room."""
        evicted = []
        while self._files and self._bytes + needed_bytes > self.capacity_bytes:
            evicted.append(next(iter(self._files.values())))
            self._forget(evicted[-1])
        self._counts["evicted"] += len(evicted)
        return evicted

    def _remove(self, files: Iterable[_File]) -> None:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)

    def _make_shard(self, piece: PieceId) -> Path:
        """Return the directory of a piece, which may have been removed with all above it."""
        shard = self.directory / piece.key[:1].hex()
        try:
            shard.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            _make_private(self.directory)
            shard.mkdir(mode=0o700, exist_ok=True)
        return shard


def _made_up(num_bytes: int, layout: Layout) -> tuple[PieceId, memoryview]:
    """Return a piece that nobody has, and its record of noise: a disk might compress others."""
    if num_bytes < 1:
        raise ValueError(f"a record to measure with must have at least 1 byte, got {num_bytes}")
    piece = PieceId(secrets.token_bytes(KEY_BYTES), 0, layout.block_tokens, "raw")
    where = Record(num_layers=layout.num_layers, layer_bytes=-(-num_bytes // layout.num_layers))
    record = memoryview(
        bytearray(where.payload_offset) + os.urandom(layout.num_layers * where.layer_bytes)
    )
    sums = [checksum(where.layer(record, layer)) for layer in range(layout.num_layers)]
    write_header(record, piece, layout, where, sums)
    return piece, record


def _forget_cached(path: str) -> None:
    """Have the system drop what it has cached of a file that is synced, where it can."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _make_private(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(
            f"{directory} must be a directory of this user's own, since KV is read from it:"
            " remove it, or choose another directory for the disk tier"
        )
    directory.chmod(0o700)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return what is in a directory; nothing where it has vanished."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
