"""Time and memory of work on a device."""

import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.rows import Row, append_row, describe
from benchmarks.shapes import GB


class RowWriter:
    """Measures a section's pieces: appends a row for each to a file, and prints it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Take the file, which need not exist."""
        self._path = path
        self._device = device

    def write(self, row: Row) -> None:
        """Add a row."""
        append_row(self._path, row)
        print("    " + describe(row), flush=True)

    def measure(self, labels: Row, work: Callable[[], Row]) -> bool:
        """Add a row of labels and of what ``work`` finds; return whether it did not fail.

        A failure of one size must not lose the others: its row says why.
        """
        _forget_peak(self._device)
        start_s = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # whatever a kernel, an allocation or a check raises
            traceback.print_exc()
            self.write(labels | {"error": _sentence(error)})
            return False
        peak = _peak_bytes(self._device)
        memory = {} if peak is None else {"peak_gb": round(peak / GB, 2)}
        wall = {"wall_s": round(time.perf_counter() - start_s, 2)}
        self.write(labels | found | memory | wall)
        return True


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call, after one that warms up; on CUDA between two events."""
    work()
    synchronize(device)
    return statistics.median(_once_s(work, device) for _ in range(repeats))


def _once_s(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _forget_peak(device: torch.device) -> None:
    """Give cached memory back, and begin to look for a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that tensors have taken since `_forget_peak`; None on CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
