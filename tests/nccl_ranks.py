"""Whether this machine can hold a ring of NCCL ranks, two of them on one GPU if need be."""

import ctypes

import torch

# NCCL that knows NCCL_MULTI_RANK_GPU_ENABLE; older ones refuse a second rank on a GPU.
FIRST_SHARING_NCCL = (2, 30)

# What ranks of one GPU need of NCCL: leave to share it, no multicast, and few thread blocks, for
# the kernels of all ranks wait for each other on the same multiprocessors.
SHARED_GPU_ENVIRONMENT = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "2",
}


def nccl_version() -> tuple[int, int, int] | None:
    """Return the version of the NCCL that is loaded, a preloaded one included; None without."""
    if not torch.cuda.is_available():
        return None
    code = ctypes.c_int(0)
    try:
        # By its name: the library that torch uses, or the one that was preloaded in its place.
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):
        major, minor, patch, *_ = torch.cuda.nccl.version()
        return major, minor, patch
    return version_of(code.value)


def version_of(code: int) -> tuple[int, int, int]:
    """Return the version that NCCL writes as one number, 23007 for 2.30.7."""
    return code // 10_000, code // 100 % 100, code % 100


def why_not(num_ranks: int, devices: int, version: tuple[int, int, int] | None) -> str | None:
    """Return why a ring of NCCL ranks cannot be held by so many GPUs, or None if it can."""
    if version is None or devices == 0:
        return "no CUDA device"
    if num_ranks <= devices or version[:2] >= FIRST_SHARING_NCCL:
        return None
    found, wanted = (".".join(map(str, part)) for part in (version, FIRST_SHARING_NCCL))
    return f"{num_ranks} ranks on {devices} GPU need NCCL {wanted} or later, found {found}"
