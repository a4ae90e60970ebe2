"""How much memory of a device is there for KV pages."""

import re
from pathlib import Path

import torch

# Pages on CPU are committed as they are written; the share leaves room for the work itself.
CPU_SHARE = 0.5


def available_kv_bytes(
    device: torch.device, gpu_memory_utilization: float, ranks_on_host: int
) -> int:
    """Return the bytes that this rank may use for KV pages, after its weights are loaded."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return max(0, int(total_bytes * gpu_memory_utilization) - (total_bytes - free_bytes))
    return int(_free_host_bytes() * CPU_SHARE) // ranks_on_host


def _free_host_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("no MemAvailable in /proc/meminfo; set kv_cache_memory_bytes")
    return int(found[1]) * 1024
