"""An NCCL to preload: a file that is given, or the newest wheel's, fetched when asked for.

A torch of CUDA brings an NCCL of its own. Where that is older than 2.30, two
ranks cannot share one GPU, and the ring's tests need another one.
"""

import lzma
import subprocess
import sys
import zipfile
from pathlib import Path

LIBRARY = "libnccl.so.2"
DOWNLOAD_TIMEOUT_S = 600.0


def unpacked(given: Path, directory: Path) -> Path:
    """Return the library of a file that is one, an .xz of one, or a wheel that holds one."""
    if not given.is_file():
        raise FileNotFoundError(f"{given} is not there: --nccl-preload takes an NCCL library")
    if given.suffix not in (".xz", ".whl"):
        return given.resolve()
    target = directory / LIBRARY
    if given.suffix == ".xz":
        target.write_bytes(lzma.decompress(given.read_bytes()))
    else:
        with zipfile.ZipFile(given) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(LIBRARY))
            target.write_bytes(wheel.read(name))
    return target


def fetched(cuda: str, directory: Path) -> Path:
    """Download NVIDIA's wheel for a version of CUDA such as 13.0; return its library."""
    package = f"nvidia-nccl-cu{cuda.partition('.')[0]}>=2.30"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(directory), package]
    subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
    (wheel,) = directory.glob("nvidia_nccl*.whl")
    return unpacked(wheel, directory)
