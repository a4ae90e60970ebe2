"""The file that a batch writes: a JSON object a line, each written whole as its answer comes.

It is its own journal. A line that was cut off when a run was killed is dropped by the next
run, which answers only what has no answer yet. Of several lines with one id the last one
counts; a run that comes to its end removes the others.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.batch_lines import BatchLine, id_key
from models.errors import PromptError, RingspanError


class BatchOutputError(RingspanError):
    """The output file cannot be written, or is not that of this batch."""


class BatchIndex:
    """What is asked and what is answered, by id, in a temporary database on disk.

    So that millions of lines take no memory. Nothing of it outlives the process.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE asked (key TEXT PRIMARY KEY, line INTEGER, digest TEXT) WITHOUT ROWID"
        )
        self._table.execute(
            "CREATE TABLE written (key TEXT PRIMARY KEY, digest TEXT, start INTEGER, good INTEGER)"
            " WITHOUT ROWID"
        )

    def ask(self, line: BatchLine) -> None:
        """Note a line of the input.

        Raises:
            PromptError: Another line has its id.
        """
        digest = None if line.error else line.digest()
        try:
            self._table.execute(
                "INSERT INTO asked VALUES (?, ?, ?)", (line.key, line.number, digest)
            )
        except sqlite3.IntegrityError:
            (other,) = self._row("SELECT line FROM asked WHERE key = ?", line.key)
            what = f"has the id {line.id!r}" if line.has_own_id else "has no id, and its number is"
            which = f"of line {other} too" if line.has_own_id else f"the id of line {other}"
            raise PromptError(
                f"line {line.number} {what} {which}: give every line an id of its own"
            ) from None

    def note(self, key: str, digest: str | None, start: int, *, is_good: bool) -> bool:
        """Note a line of the output that begins at byte ``start``; a later one goes before it.

        Returns whether it is the first of its id.
        """
        is_first = self._row("SELECT 1 FROM written WHERE key = ?", key) is None
        self._table.execute(
            "INSERT OR REPLACE INTO written VALUES (?, ?, ?, ?)", (key, digest, start, is_good)
        )
        return is_first

    def is_answered(self, key: str) -> bool:
        """Whether the output has the answer to what is asked now."""
        found = self._row(
            "SELECT 1 FROM asked JOIN written USING (key, digest) WHERE key = ? AND good", key
        )
        return found is not None

    def is_last(self, key: str, start: int) -> bool:
        """Whether no later line has the id of the one at ``start``."""
        return self._row("SELECT start FROM written WHERE key = ?", key) == (start,)

    def counts(self) -> dict[str, int]:
        """Return how many lines are asked, answered, changed since, or answered but not asked."""
        queries = {
            "asked": "SELECT count(*) FROM asked",
            "answered": "SELECT count(*) FROM asked JOIN written USING (key, digest) WHERE good",
            "changed": "SELECT count(*) FROM asked JOIN written USING (key)"
            " WHERE good AND asked.digest IS NOT written.digest",
            "not_asked": "SELECT count(*) FROM written WHERE key NOT IN (SELECT key FROM asked)",
        }
        return {name: self._table.execute(query).fetchone()[0] for name, query in queries.items()}

    def close(self) -> None:
        """Remove the database."""
        self._table.close()

    def _row(self, query: str, *values: object) -> Any:
        return self._table.execute(query, values).fetchone()


class BatchOutput:
    """The output file, held by one process at a time. Use it as a context manager."""

    def __init__(self, path: Path, index: BatchIndex) -> None:
        """Take the file, make it if there is none, and note in ``index`` what it has.

        Raises:
            BatchOutputError: Another run has it, it cannot be written, or it is no batch's output.
        """
        self.path = path
        self.dropped_bytes = 0  # of a line that was cut off
        self._index = index
        self._file = _open_alone(path)
        self._model: str | None = None  # that answered what is there
        self._superseded = False  # whether an id has more than one line
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def check_model(self, model: str) -> None:
        """Refuse to mix the answers of two models.

        Raises:
            BatchOutputError: What the file has is from a model of another name.
        """
        if self._model not in (None, model):
            raise BatchOutputError(
                f"{self.path} has answers of the model {self._model!r}, not of {model!r}: give"
                " another --output"
            )

    def write(self, values: Mapping[str, Any], digest: str | None, *, is_good: bool) -> None:
        """Append one line, whole: who reads the file sees all of it once this returns.

        Raises:
            BatchOutputError: It cannot be written; nothing of it is left.
        """
        line = json.dumps({**values, "digest": digest}).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise BatchOutputError(f"cannot write {self.path}: {error.strerror}") from None
        self._note(values, digest, start, is_good=is_good)

    def finish(self) -> None:
        """Keep the last line of each id alone, and have all on the disk."""
        try:
            os.fsync(self._file.fileno())
            if self._superseded:
                self._compact()
        except OSError as error:
            raise BatchOutputError(f"cannot write {self.path}: {error.strerror}") from None

    def _recover(self) -> None:
        end = 0
        for start, line in _whole_lines(self.path):
            values = self._read(line)
            self._note(values, values["digest"], start, is_good=values.get("error") is None)
            self._model = self._model or values.get("model")
            end = start + len(line)
        self.dropped_bytes = self._file.seek(0, os.SEEK_END) - end
        self._file.truncate(end)

    def _note(
        self, values: Mapping[str, Any], digest: str | None, start: int, *, is_good: bool
    ) -> None:
        is_first = self._index.note(id_key(values["id"]), digest, start, is_good=is_good)
        self._superseded |= not is_first

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not values.keys() >= {"id", "digest"}:
            raise BatchOutputError(
                f"{self.path} is no output of a batch (line {line[:60]!r}): give another --output"
            )
        return values

    def _compact(self) -> None:
        """Write the file anew without superseded lines; it is the old one or the new, whole."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}")
        kept = FileIO(handle, "r+")
        try:
            fcntl.flock(kept, fcntl.LOCK_EX)  # before anybody finds it under its name
            os.fchmod(handle, os.fstat(self._file.fileno()).st_mode & 0o777)
            for start, line in _whole_lines(self.path):
                if self._index.is_last(id_key(self._read(line)["id"]), start):
                    _write_all(kept, line)
            os.fsync(handle)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            kept.close()
            raise
        self._file.close()
        self._file = kept

    def __enter__(self) -> "BatchOutput":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line that ends, with its first byte."""
    start = 0
    with path.open("rb") as file:
        while (line := file.readline()).endswith(b"\n"):
            yield start, line
            start += len(line)


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _open_alone(path: Path) -> FileIO:
    """Open a file for appending that no other process has open this way."""
    while True:
        try:
            file = FileIO(path, "a+")
        except OSError as error:
            raise BatchOutputError(f"cannot write {path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise BatchOutputError(f"cannot write {path}: a batch needs a file that it can resume")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise BatchOutputError(
                f"another run writes {path}: wait for its end, or give another --output"
            ) from None
        # Another run may have put a new file in its place while this one was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
