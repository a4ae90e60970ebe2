"""``ringspan doctor`` on a Ray cluster of two hosts, which are processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import subprocess, sys
import ray
from ray.cluster_utils import Cluster
from actors.placement import HOST_LABEL

node = dict(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
cluster = Cluster(True, head_node_args={**node, "labels": {HOST_LABEL: "a"}})
cluster.add_node(**node, labels={HOST_LABEL: "b"})
command = [sys.executable, "-m", "cluster", "doctor", sys.argv[1], f"ray.address={cluster.address}"]
status = subprocess.run([*command, "-cp", "2", "--device", "cpu", "--json"]).returncode
ray.shutdown()
cluster.shutdown()
sys.exit(status)
"""


@pytest.mark.campaign
def test_hosts_and_the_link_between_them_are_looked_at(needle: Path) -> None:
    """Each host has an actor of its own, and two hosts meet as neighbours of a ring do."""
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(needle)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )

    assert run.returncode == 0, run.stdout + run.stderr
    told = {each["name"]: each for each in json.loads(run.stdout.splitlines()[-1])["findings"]}
    assert told["ray"]["state"] == "ok"
    assert "2 hosts, 0 GPUs; 2 ranks have a place" in told["ray"]["sentence"]
    assert "a and b exchange over gloo at" in told["link"]["sentence"]
    assert "hosts" not in told
    assert "clocks" not in told
    assert told["weights"]["state"] == "ok"
