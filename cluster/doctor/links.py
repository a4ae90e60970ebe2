"""Messages between two ranks on this machine."""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding, ok, problem, warning
from cluster.doctor.probes import RING_BYTES, ProbeFailed, finish_probe, start_probe

LIMIT_S = 120.0
SLOW_BYTES_PER_S = 100e6  # between two processes of one machine
SLOW_LINK_BYTES_PER_S = 100e6  # between two hosts: less than a gigabit network gives


def check_ring(num_gpus: int) -> Finding:
    """Join two ranks and exchange 32 MiB both ways: over NCCL with two GPUs or more, else gloo."""
    device = "cuda" if num_gpus >= 2 else "cpu"
    with tempfile.TemporaryDirectory() as directory:
        port_file = str(Path(directory) / "port")
        ranks = [start_probe("ring", str(rank), port_file, device) for rank in range(2)]
        try:
            # The one that fails first knows why; the other would only miss it.
            facts = [finish_probe(rank, LIMIT_S) for rank in _failed_first(ranks)]
        except ProbeFailed as error:
            return _failed(device, str(error))
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
    return judge_ring(facts[0], facts[1], device)


def judge_ring(one: Mapping[str, Any], other: Mapping[str, Any], device: str) -> Finding:
    """Judge what two ranks have measured."""
    backend = "NCCL" if device == "cuda" else "gloo"
    if not (one["is_right"] and other["is_right"]):
        return _failed(device, "what came is not what was sent")
    rate = min(one["bytes_per_s"], other["bytes_per_s"])
    told = (
        f"two ranks of this machine exchange {RING_BYTES // 2**20} MiB over {backend} at"
        f" {rate / 1e9:.2f} GB/s each way"
    )
    if rate < SLOW_BYTES_PER_S:
        return warning("ring", told, "is the machine busy, or a firewall in the loopback's way?")
    return ok("ring", told)


def _failed_first(ranks: "Sequence[subprocess.Popen[str]]") -> "list[subprocess.Popen[str]]":
    """Wait until all ranks have ended or one has failed; the one that has failed comes first."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        ends = [rank.poll() for rank in ranks]
        if None not in ends or any(ends):
            break
        time.sleep(0.05)
    return sorted(ranks, key=lambda rank: not rank.poll())


def _failed(device: str, why: str) -> Finding:
    backend = "NCCL" if device == "cuda" else "gloo"
    sentence = f"two ranks of this machine cannot exchange over {backend}: {why}"
    advice = "set NCCL_DEBUG=INFO and try again" if device == "cuda" else "see the network above"
    return problem("ring", sentence, advice)
