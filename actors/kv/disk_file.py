"""One piece on disk: an Arrow IPC file of one record, whose name tells all about it.

    TENANT.KEY.START.END.ENCODING.SIZE.OFFSET.CHECKSUM.arrow

TENANT is a tag of the tenant, SIZE and OFFSET say where in the file the record lies, and
CHECKSUM is the xxh3-128 of the whole file: a file that is damaged, cut off or swapped with
another is noticed before Arrow parses it. A file is written under another name, synced and
renamed, so that under its own name it is whole. Its writer holds a lock on it (flock) until
then; a temporary file that nobody has locked is of a dead writer.
"""

import contextlib
import fcntl
import functools
import hashlib
import mmap
import os
import re
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from actors.kv.pieces import KEY_BYTES, BadPiece, PieceId

VERSION = 1  # of files: others are not read
FRAMING_BYTES = 4096  # more than Arrow adds to a record
READ_BYTES = 2**20  # at a time: what was read is hashed while it is in the cache
_SCHEMA = pa.schema(
    [pa.field("record", pa.large_binary(), nullable=False)],
    # The padding makes the record begin at a multiple of 64 bytes: else reading it, which
    # copies to an aligned place, takes a third longer.
    metadata={"ringspan.kv": str(VERSION), "padding": " " * 46},
)
_EXTENSION = b"ARROW:extension"  # how a schema names types that run code when they are read
_NUMBER = "(0|[1-9][0-9]{0,17})"
_ENCODING = "([a-z0-9_]{1,16})"
_NAME = re.compile(
    rf"([0-9a-f]{{16}})\.([0-9a-f]{{{2 * KEY_BYTES}}})\.{_NUMBER}\.{_NUMBER}\.{_ENCODING}"
    rf"\.{_NUMBER}\.{_NUMBER}\.([0-9a-f]{{32}})\.arrow"
)
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class FileName:
    """What a file's name says."""

    tenant_tag: str
    piece: PieceId
    size_bytes: int  # of the record
    offset_bytes: int  # of the record within the file
    checksum: str  # of the whole file

    def __str__(self) -> str:
        piece = self.piece
        return (
            f"{self.tenant_tag}.{piece.key.hex()}.{piece.start}.{piece.end}.{piece.encoding}"
            f".{self.size_bytes}.{self.offset_bytes}.{self.checksum}.arrow"
        )

    @classmethod
    def parse(cls, text: str) -> "FileName | None":
        """Return what a name says; None: it is no name of ours."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        tag, key, start, end, encoding, size, offset, checksum = match.groups()
        piece = PieceId(bytes.fromhex(key), int(start), int(end), encoding)
        return cls(tag, piece, int(size), int(offset), checksum)


def tenant_tag(tenant: bytes) -> str:
    """Return what stands for a tenant in file names."""
    return hashlib.blake2b(tenant, digest_size=8).hexdigest()


def write_file(
    directory: Path, piece: PieceId, tag: str, record: memoryview
) -> tuple[FileName, int]:
    """Write a record whole, and return its file's name and bytes.

    Raises:
        ValueError: The encoding's name cannot stand in a file name.
        OSError: The disk is full or fails; nothing is left behind.
    """
    if not re.fullmatch(_ENCODING, piece.encoding):
        raise ValueError(f"an encoding's name must match {_ENCODING}, got {piece.encoding!r}")
    file, temporary = _create(directory)
    try:
        try:
            sink = _Sink(file)
            _write_arrow(sink, record)
            os.fsync(file)
            name = FileName(tag, piece, len(record), sink.offset_bytes, sink.running.hexdigest())
            # The directory is not synced: a file that a crash of the machine takes back is
            # one piece less, never a wrong one.
            os.rename(temporary, directory / str(name))
        finally:
            os.close(file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return name, sink.size_bytes


def read_file(path: str, name: FileName, target: memoryview) -> None:
    """Copy a file's record into ``target``, which has its size.

    Raises:
        BadPiece: The file is not what its name says; what ``target`` holds must not be used.
        OSError: The file is not there, or the disk fails.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        framing_bytes = os.fstat(file).st_size - name.size_bytes
        if not 0 < name.offset_bytes < framing_bytes <= FRAMING_BYTES:
            raise BadPiece("the file is cut off or too long")
        before = bytearray(name.offset_bytes)
        after = bytearray(framing_bytes - name.offset_bytes)
        running = xxhash.xxh3_128()
        at = 0
        for part in (memoryview(before), target, memoryview(after)):
            _read_hashed(file, at, part, running)
            at += len(part)
    finally:
        os.close(file)
    if running.hexdigest() != name.checksum:
        raise BadPiece("the file is damaged")
    found = _find_record(bytes(before), bytes(after), name.size_bytes)
    if found != (name.offset_bytes, name.size_bytes):
        raise BadPiece("the file's record is not where its name says")


def remove_if_dead(path: Path) -> None:
    """Remove a temporary file unless its writer lives."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(file)


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is being written, or was when its writer died."""
    return _TEMPORARY.fullmatch(name) is not None


class _Sink:
    """The file as Arrow sees it: all that is written goes to the disk and into the checksum."""

    closed = False

    def __init__(self, file: int) -> None:
        self._file = file
        self.running = xxhash.xxh3_128()
        self.size_bytes = 0
        self.offset_bytes = 0  # of what was written last as a buffer: the record, after its ends

    def write(self, data: bytes | pa.Buffer) -> int:
        if isinstance(data, pa.Buffer):
            self.offset_bytes = self.size_bytes
        rest = memoryview(data)
        self.running.update(rest)
        size = len(rest)
        self.size_bytes += size
        while rest:
            rest = rest[os.write(self._file, rest) :]
        return size

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """The file is closed by whoever opened it."""


def _create(directory: Path) -> tuple[int, Path]:
    """Return a new file, locked, and its temporary path."""
    while True:
        path = directory / f".{secrets.token_hex(8)}.tmp"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            os.close(file)
            os.unlink(path)
            raise
        # A tier that opened between the two calls took it for a dead writer's.
        if os.fstat(file).st_nlink:
            return file, path
        os.close(file)


def _write_arrow(sink: _Sink, record: memoryview) -> None:
    """Write one batch of one row, without a copy of the record."""
    ends = pa.py_buffer(struct.pack("<qq", 0, len(record)))
    row = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(record)])
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), _SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([row], schema=_SCHEMA))


def _read_hashed(file: int, offset: int, target: memoryview, running: xxhash.xxh3_128) -> None:
    """Read from an offset on until ``target`` is full.

    Not from a mapping: page by page that is slower, and where the disk fails, or somebody
    cuts the file off meanwhile, it kills the process instead of raising an error.
    """
    while target:
        count = os.preadv(file, [target[:READ_BYTES]], offset)
        if not count:
            raise BadPiece("the file is cut off")
        running.update(target[:count])
        target, offset = target[count:], offset + count


@functools.lru_cache(maxsize=64)  # files of one size differ in their records alone
def _find_record(before: bytes, after: bytes, size_bytes: int) -> tuple[int, int]:
    """Return where in a file Arrow finds the record, and its bytes.

    ``before`` and ``after`` are what stands around so many bytes of record, which are not
    looked at.
    """
    if _EXTENSION in before or _EXTENSION in after:
        raise BadPiece("the file's schema has an extension type")
    file_bytes = len(before) + size_bytes + len(after)
    image = mmap.mmap(-1, file_bytes)  # of zeros, which take no memory
    image[: len(before)] = before
    image[file_bytes - len(after) :] = after
    whole = pa.py_buffer(image)
    try:
        reader = pa.ipc.open_file(whole)
        if not reader.schema.equals(_SCHEMA, check_metadata=True):
            raise BadPiece("the file has another schema")
        if reader.num_record_batches != 1 or reader.get_batch(0).num_rows != 1:
            raise BadPiece("the file does not hold one record")
        row = reader.get_batch(0).column(0)
        row.validate()
        if row.null_count:
            raise BadPiece("the file's record is null")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadPiece(f"Arrow cannot read the file: {error}") from None
    _, ends, body = row.buffers()
    first, last = struct.unpack("<qq", ends.slice(0, 16).to_pybytes())
    return body.address - whole.address + first, last - first
