"""Facts that need torch or Ray, each found in a process of its own: a broken library ends only it.

``python -m cluster.doctor.probes NAME ARGUMENTS`` prints one JSON object as its last line.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.errors import RingspanError

RING_BYTES = 32 * 2**20
RING_ROUNDS = 5
PEER_S = 60.0  # for the other end to come, and for each message


class ProbeFailed(Exception):
    """A probe ended without facts; the message is what it said last."""


def start_probe(name: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start a probe; its facts are `finish_probe`'s."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.doctor.probes", name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def finish_probe(process: "subprocess.Popen[str]", limit_s: float) -> dict[str, Any]:
    """Return a probe's facts.

    Raises:
        ProbeFailed: It failed, or has not ended within ``limit_s``.
    """
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ProbeFailed(f"no end after {limit_s:g} s") from None
    lines = out.strip().splitlines()
    if process.returncode == 0 and lines:
        facts: dict[str, Any] = json.loads(lines[-1])
        return facts
    told = err.strip().splitlines()
    by = f"ended by signal {-process.returncode}" if process.returncode < 0 else "no word"
    raise ProbeFailed(told[-1][:500] if told else by)


def probe(name: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Run a probe to its end; see `finish_probe`."""
    return finish_probe(start_probe(name, *arguments), limit_s)


def _torch() -> dict[str, Any]:
    """What this torch is, and the devices that it sees."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "available": torch.cuda.is_available(),
        "devices": [],
        "nccl": None,
        "reason": None,
    }
    if torch.version.cuda is None:
        return facts
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            facts["devices"].append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "capability": list(torch.cuda.get_device_capability(index)),
                    "free_bytes": free_bytes,
                    "total_bytes": total_bytes,
                }
            )
        facts["nccl"] = list(torch.cuda.nccl.version())
    except Exception as error:  # whatever torch says of a driver that is missing or too old
        facts["reason"] = str(error).strip().splitlines()[0]
    return facts


def _ring(rank: str, port_file: str, device: str) -> dict[str, Any]:
    """One of two ranks on this machine, joined as those of a cluster are."""
    import torch
    import torch.distributed as dist

    path = Path(port_file)
    if rank == "0":
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        draft = path.with_suffix(".draft")
        draft.write_text(str(store.port))
        draft.rename(path)
    else:
        deadline_s = time.monotonic() + PEER_S
        while not path.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError("the other rank did not come")
            time.sleep(0.02)
        store = dist.TCPStore("127.0.0.1", int(path.read_text()), is_master=False)
    where = torch.device(device, int(rank)) if device == "cuda" else torch.device("cpu")
    return measure_ring(store, int(rank), where)


def measure_ring(store: Any, rank: int, device: Any) -> dict[str, Any]:
    """Exchange messages between two ranks, both ways at once, and check what came."""
    import torch

    from attention.ring import connect_ring

    ring = connect_ring(store, rank, 2, device, timeout_s=PEER_S)
    outgoing = torch.full((RING_BYTES // 4,), float(rank), device=device)
    incoming = torch.empty_like(outgoing)
    seconds = []
    for _ in range(RING_ROUNDS):
        start_s = time.perf_counter()
        ring.exchange(outgoing, incoming).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    gathered = ring.all_gather(torch.tensor([float(rank)], device=device)).flatten().tolist()
    is_right = bool((incoming == 1 - rank).all()) and gathered == [0.0, 1.0]
    return {"bytes_per_s": RING_BYTES / min(seconds), "is_right": is_right}


def _ray(address: str, num_ranks: str) -> dict[str, Any]:
    """Start a Ray as a command would, or join one; see `cluster.doctor.ray_probe`."""
    from cluster.doctor.ray_probe import ray_facts

    return ray_facts(address or None, int(num_ranks))


def _checkpoint(model: str, dtype: str, kv_cache_dtype: str, max_model_len: str) -> dict[str, Any]:
    """What a checkpoint is, as far as it can be told without loading it."""
    from cluster.doctor.checkpoint_probe import checkpoint_facts

    return checkpoint_facts(Path(model), dtype, kv_cache_dtype, int(max_model_len) or None)


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": _torch,
    "ring": _ring,
    "ray": _ray,
    "checkpoint": _checkpoint,
}


def main(words: Sequence[str]) -> int:
    """Run one probe; print its facts, or one line on what went wrong."""
    name, *arguments = words
    try:
        print(json.dumps(PROBES[name](*arguments)), flush=True)
    except Exception as error:
        sentence = " ".join(str(error).split())
        is_ours = isinstance(error, RingspanError)
        print(sentence if is_ours else f"{type(error).__name__}: {sentence}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
