"""What a result was measured with: device, driver, versions, commit, date."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.shapes import GB
from tests.nccl_ranks import nccl_version

ROOT = Path(__file__).parents[1]
Facts = dict[str, str]


def facts(device: torch.device, commit: str | None) -> Facts:
    """Return what is known of this machine and this checkout."""
    nccl = nccl_version()
    found = {
        "device": "cpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cudnn = torch.backends.cudnn.version()
        found |= {
            "device": properties.name,
            "devices": str(torch.cuda.device_count()),
            "memory": f"{properties.total_memory / GB:.1f} GB",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": str(torch.version.cuda),
            "cudnn": str(cudnn),
            "nccl": ".".join(map(str, nccl)) if nccl else "none",
        }
    return found


def _commit() -> str:
    """Return the commit, marked where files differ from it; unknown outside of a checkout."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str:
    """Return the first line that a program prints, or unknown."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else "unknown"
