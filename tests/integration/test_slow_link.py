"""Pieces cross a link that the kernel holds to a rate: real packets, TCP and Flight."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slow_link_hosts import BURST_BYTES, WHERE

ROOT = Path(__file__).parents[2]
# Who is not root becomes it in a namespace of users, where the system allows that.
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
PROBE = """
PATH="$PATH:/usr/sbin:/sbin"
ip link add here type veth peer name there &&
tc qdisc add dev there root tbf rate 1mbit burst 64kb latency 1s &&
unshare --net true
"""
WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here, which makes network namespaces")
    probe = subprocess.run([*UNSHARE, "sh", "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespaces with a rate limit here: {probe.stderr.strip()}")


@contextmanager
def hosts(bytes_per_s: float, num_pieces: int) -> Iterator[subprocess.Popen[str]]:
    """Run the two hosts of `tests.slow_link_hosts`, and see that nothing of them is left."""
    process = subprocess.Popen(
        [
            *UNSHARE,
            *(sys.executable, "-m", "tests.slow_link_hosts", "here"),
            *(str(bytes_per_s), str(num_pieces)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
    assert not {"here", "there"} & {*os.listdir("/sys/class/net")}


def lives(pid: int) -> bool:
    """Return whether a process is there that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_pieces_cross_a_slow_link_whole_and_no_faster_than_it() -> None:
    """Staged, verified and equal to what was written; less than the limit would be no link."""
    bytes_per_s, num_pieces = 8e6, 8
    with hosts(bytes_per_s, num_pieces) as process:
        out, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
    seen = json.loads(out.splitlines()[-1])
    size_bytes = num_pieces * WHERE.size_bytes
    assert seen["num_equal"] == num_pieces
    assert seen["staged_bytes"] == size_bytes
    assert seen["elapsed_s"] >= (size_bytes - BURST_BYTES) / bytes_per_s


def test_nothing_is_left_of_hosts_that_were_killed() -> None:
    """In the middle of a transfer: the other host ends, and with both namespaces and link."""
    with hosts(1e5, 8) as process:
        assert process.stdout is not None
        seen = json.loads(process.stdout.readline())
        namespace = os.readlink(f"/proc/{seen['other_pid']}/ns/net")
        assert namespace != os.readlink("/proc/self/ns/net")
        process.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + WAIT_S
    while lives(seen["other_pid"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    Path(seen["arena"]).unlink()  # which the next store's sweep would do
