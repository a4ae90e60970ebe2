"""Two hosts: Ray's own test cluster, whose nodes are processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path

# The session's shared Ray is one node; a cluster of two needs a driver of its own.
DRIVER = """
import logging, os, sys
import ray
from ray.cluster_utils import Cluster
from cluster import LLM, ClusterError, PlacementError, SamplingParams
from actors.placement import HOST_LABEL

checkpoint, first, second = sys.argv[1:]
node = dict(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
cluster = Cluster(True, head_node_args={**node, "labels": {HOST_LABEL: first}})
added = cluster.add_node(**node, labels={HOST_LABEL: second}, num_gpus=1)
options = dict(overrides=[f"ray.address={cluster.address}", "device=cpu", "ring.algorithm=pass_kv"])
prompt = {"prompt_token_ids": list(range(3, 300))}
greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)

with LLM(checkpoint, context_parallel_size=3, **options) as llm:
    print("hosts", *llm.info.hosts)
    print("tokens", *llm.generate(prompt, greedy)[0].outputs[0].token_ids)

if first == "a":
    # A replaced host of the same name takes the same ranks.
    cluster.remove_node(added)
    cluster.add_node(**node, labels={HOST_LABEL: second}, num_gpus=1)
    with LLM(checkpoint, context_parallel_size=3, **options) as llm:
        print("hosts", *llm.info.hosts)
    options["overrides"] = options["overrides"][:1] + ["ray.placement_timeout_s=3"]
    try:
        LLM(checkpoint, device="cuda", **options)
    except ClusterError as error:
        print("refused:", error)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    assert ray.util.placement_group([{"GPU": 1}]).wait(30)  # somebody else's
    try:
        LLM(checkpoint, device="cuda", **options)
    except PlacementError as error:
        print("refused:", error)
ray.shutdown()
cluster.shutdown()
"""


def run(checkpoint: Path, *names: str) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, str(checkpoint), *names],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_ranks_are_numbered_by_host_and_tokens_are_the_same(llama: Path) -> None:
    """Neither the order of the nodes nor a replaced node changes which host has which ranks."""
    lines = run(llama, "a", "b")
    swapped = run(llama, "b", "a")

    assert lines[0] == lines[2] == swapped[0] == "hosts a a b"
    assert lines[1] == swapped[1]
    assert "torch" in lines[3]
    assert "sees none there: install a CUDA build of torch" in lines[3]
    assert "no place for 1 ranks on 1 hosts within 3 s" in lines[4]
    assert len(lines) == 5
