"""What one host of a Ray cluster tells of itself, and measures with another. Runs in an actor."""

import hashlib
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

from cluster.doctor.probes import measure_ring
from cluster.doctor.software import OURS, ROOT


class HostProbe:
    """One host's end of the doctor."""

    def facts(self) -> dict[str, str]:
        """Return the versions that hosts must have in common."""
        return {
            "python": platform.python_version(),
            "ray": importlib.metadata.version("ray"),
            "torch": importlib.metadata.version("torch"),
            "code": code_digest(ROOT),
        }

    def now_s(self) -> float:
        """Return what time it is here, Unix time."""
        return time.time()

    def host_store(self) -> tuple[str, int]:
        """Begin a ring of two: return where its ranks meet."""
        import ray
        import torch.distributed as dist

        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def measure(self, host: str, port: int, rank: int) -> dict[str, Any]:
        """Be one rank of it."""
        import torch
        import torch.distributed as dist

        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        return measure_ring(store, rank, torch.device("cpu"))


def code_digest(root: Path) -> str:
    """Return what differs where two hosts run different code of ours."""
    digest = hashlib.sha256()
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
