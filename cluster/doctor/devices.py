"""What torch computes on, and by which kernels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding, gib, ok, problem, warning

DRIVER = Path("/proc/driver/nvidia/version")
FLASH_CAPABILITY = (8, 0)  # of a GPU; torch's flash attention needs Ampere
INSTALL = "install the torch build of this machine's CUDA version (see https://pytorch.org)"


def judge_torch(facts: Mapping[str, Any], *, has_driver: bool, device: str) -> list[Finding]:
    """Compare a build of torch with the driver, and say which kernels its devices will use.

    Args:
        facts: Of the probe ``torch``.
        has_driver: Whether the machine has NVIDIA's.
        device: That is asked for: auto, cpu or cuda.
    """
    version = f"torch {facts['version']}"
    if not facts["devices"]:
        return [_without_gpu(facts, version, has_driver, device)]
    nccl = ".".join(map(str, facts["nccl"] or ())) or "none"
    found = [ok("torch", f"{version} for CUDA {facts['cuda']}, NCCL {nccl}")]
    return found + [_judge_gpu(index, gpu) for index, gpu in enumerate(facts["devices"])]


def _without_gpu(facts: Mapping[str, Any], version: str, has_driver: bool, device: str) -> Finding:
    cpu = f"attention by torch's flash kernel for CPU, {facts['threads']} threads"
    if facts["cuda"] is None:
        sentence = f"{version} is a build without CUDA"
        if device == "cuda":
            return problem("torch", f"{sentence}, but --device cuda is asked for", INSTALL)
        if has_driver:
            return warning("torch", f"{sentence}, though there is an NVIDIA driver", INSTALL)
        return ok("torch", f"{sentence}; {cpu}")
    reason = facts["reason"] or "it sees no device"
    sentence = f"{version} for CUDA {facts['cuda']} cannot use a GPU: {reason}"
    if device == "cuda" or has_driver:
        advice = f"update the NVIDIA driver, or {INSTALL}; CUDA_VISIBLE_DEVICES may hide devices"
        return problem("torch", sentence, advice)
    return ok("torch", f"{sentence}; {cpu}")


def _judge_gpu(index: int, gpu: Mapping[str, Any]) -> Finding:
    capability: Sequence[int] = gpu["capability"]
    told = (
        f"{gpu['name']}, compute capability {'.'.join(map(str, capability))},"
        f" {gib(gpu['free_bytes'])} of {gib(gpu['total_bytes'])} free"
    )
    name = f"gpu {index}"
    if tuple(capability) < FLASH_CAPABILITY:
        sentence = f"{told}: too old for torch's flash attention, which 16-bit models need"
        return warning(name, sentence, "use --dtype float32 (the memory-efficient kernel)")
    if gpu["free_bytes"] < gpu["total_bytes"] / 2:
        sentence = f"{told}: others use it"
        return warning(name, sentence, "end what runs there, or lower --gpu-memory-utilization")
    return ok(name, f"{told}; flash attention in 16 bit, memory-efficient in float32")
