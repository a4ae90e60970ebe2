"""Shared memory of one host's KV store: a file in /dev/shm that its ranks map.

The store that makes an arena holds it under flock for its life, so an arena whose lock can
be taken is one whose store is gone: `sweep` removes it.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_TRIES = 8  # to make an arena that no sweep removes before it is locked
_NAME_CHARS = 64  # of the cluster and of the host, in the name of the file


class Arena:
    """A mapped file of shared memory. Views of it may be used from any thread."""

    def __init__(self, path: Path, fd: int, *, is_creator: bool) -> None:
        """Map an open file; `create` and `attach` do this. The arena owns ``fd`` from now on."""
        self.path = path
        self._fd = fd
        self._is_creator = is_creator
        self.capacity_bytes = os.fstat(fd).st_size
        self.buffer = mmap.mmap(fd, self.capacity_bytes)  # shared, to read and write

    @classmethod
    def create(cls, cluster: str, host: str, capacity_bytes: int) -> "Arena":
        """Make an arena that only this user may open; memory is taken as it is first written.

        Raises:
            ValueError: The capacity is not positive.
            OSError: Shared memory has not so much room, or an arena of this name exists.
        """
        if capacity_bytes < 1:
            raise ValueError(f"an arena must have at least 1 byte, got {capacity_bytes}")
        name = f"{_prefix()}{_sanitised(cluster)}-{_sanitised(host)}-{os.getpid()}.arena"
        path = SHARED_MEMORY / name
        fd = _create_locked(path)
        try:
            os.ftruncate(fd, capacity_bytes)
            _check_room(path, capacity_bytes)
            return cls(path, fd, is_creator=True)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise

    @classmethod
    def attach(cls, path: str | Path) -> "Arena":
        """Map the arena that another process made.

        Raises:
            FileNotFoundError: It is gone, as its store is.
            PermissionError: It is another user's.
        """
        path = Path(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # Anybody may put files there: ours are only those that we made.
            if os.fstat(fd).st_uid != os.getuid():
                raise PermissionError(f"the arena {path} is another user's: it is not read")
            return cls(path, fd, is_creator=False)
        except BaseException:
            os.close(fd)
            raise

    def view(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """Return a range of the arena, to read and write.

        Raises:
            ValueError: The range is not within the arena.
        """
        if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > self.capacity_bytes:
            raise ValueError(
                f"{size_bytes} bytes at offset {offset_bytes} are not within the arena"
                f" {self.path} of {self.capacity_bytes} bytes"
            )
        with memoryview(self.buffer) as whole:
            return whole[offset_bytes : offset_bytes + size_bytes]

    def close(self) -> None:
        """Let go of the memory; the creator also removes the file. Closing twice is no error."""
        if self._fd < 0:
            return
        if self._is_creator:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
        # A view that is still in use keeps the mapping until it goes.
        with contextlib.suppress(BufferError):
            self.buffer.close()


def sweep() -> list[Path]:
    """Remove this user's arenas whose store is gone; return which they were."""
    swept = []
    for path in SHARED_MEMORY.glob(f"{_prefix()}*.arena"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or not ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unlinked under the lock: `create` finds its new file gone and makes another.
            if _is_linked(path, fd):
                path.unlink()
                swept.append(path)
        except BlockingIOError:
            pass  # its store lives
        finally:
            os.close(fd)
    return swept


def _prefix() -> str:
    return f"ringspan-{os.getuid()}-"


def _sanitised(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:_NAME_CHARS]


def _create_locked(path: Path) -> int:
    for _ in range(_TRIES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise FileExistsError(
                f"the arena {path} exists already: this process has a KV store of this cluster"
                " and host, close it first"
            ) from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_linked(path, fd):
            return fd
        os.close(fd)  # a sweep came between
    raise OSError(errno.EAGAIN, f"the arena {path} was removed {_TRIES} times as it was made")


def _is_linked(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _check_room(path: Path, capacity_bytes: int) -> None:
    """Raise OSError where all arenas, once written to their ends, are more than there is.

    A page that shared memory has not kills the process that touches it, so what other
    arenas have not yet taken counts as taken.
    """
    promised_bytes = 0
    for other in SHARED_MEMORY.glob("ringspan-*.arena"):
        with contextlib.suppress(OSError):
            status = other.lstat()
            promised_bytes += max(status.st_size - status.st_blocks * 512, 0)
    file_system = os.statvfs(SHARED_MEMORY)
    free_bytes = file_system.f_bavail * file_system.f_frsize
    if promised_bytes > free_bytes:
        available_bytes = max(free_bytes - (promised_bytes - capacity_bytes), 0)
        raise OSError(
            errno.ENOSPC,
            f"an arena of {capacity_bytes} bytes does not fit into {SHARED_MEMORY}, which has"
            f" {available_bytes} bytes left: give the KV store less, or make {SHARED_MEMORY}"
            " larger (of a container: --shm-size)",
            str(path),
        )
