"""Where ranks run: one placement-group bundle per host, ranks numbered by host.

The decisions are pure functions; `place` is the shell that asks Ray.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from actors.errors import PlacementError

MiB = 2**20
COORDINATOR_PREFIX = "ringspan-coordinator-"  # of a coordinator's name
POLL_S = 1.0  # how often hosts are looked for that are still to join
HOST_LABEL = "ringspan.io/host"  # orders the hosts of a ring where addresses do not


@dataclass(frozen=True, kw_only=True)
class Host:
    """A Ray node as the numbering sees it."""

    node_id: str
    name: str  # the host label, or the node's address
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank runs."""

    rank: int
    bundle: int
    host: str
    ranks_on_host: int


def share_out(hosts: Sequence[Host], num_ranks: int, device: Literal["cpu", "cuda"]) -> list[int]:
    """Return the number of ranks of each bundle; a bundle is on a host of its own.

    On CUDA the hosts with most GPUs come first and as few as possible are used;
    on CPU the ranks are spread evenly, for hosts have no number of ranks of their own.

    Raises:
        PlacementError: There are more ranks than GPUs.
    """
    if device == "cpu":
        bundles = min(len(hosts), num_ranks)
        return [num_ranks // bundles + (i < num_ranks % bundles) for i in range(bundles)]
    shares: list[int] = []
    for gpus in sorted((host.gpus for host in hosts), reverse=True):
        if gpus and sum(shares) < num_ranks:
            shares.append(min(gpus, num_ranks - sum(shares)))
    if sum(shares) < num_ranks:
        raise PlacementError(
            f"context_parallel_size is {num_ranks}, but the Ray cluster has {sum(shares)} GPUs on"
            f" {len(hosts)} nodes: lower it, add GPUs, or pass --device cpu"
        )
    return shares


def number_ranks(shares: Sequence[int], bundle_hosts: Sequence[Host]) -> list[Place]:
    """Number the ranks host by host, so that ring neighbours share a host.

    Ray's bundle order follows neither node order nor anything stable, so bundles
    are ordered by host name, then by node id.
    """
    order = _by_name(bundle_hosts)
    bundles = [bundle for bundle in order for _ in range(shares[bundle])]
    return [
        Place(
            rank=rank,
            bundle=bundle,
            host=bundle_hosts[bundle].name,
            ranks_on_host=shares[bundle],
        )
        for rank, bundle in enumerate(bundles)
    ]


def settle_shares(shares: Sequence[int], bundle_hosts: Sequence[Host]) -> list[int]:
    """Give the larger shares to the hosts that come first by name.

    For bundles that are alike, as on CPU: which of them Ray put on which host is
    chance, and must not decide how many ranks the host has.
    """
    settled = [0] * len(shares)
    for bundle, share in zip(_by_name(bundle_hosts), sorted(shares, reverse=True), strict=True):
        settled[bundle] = share
    return settled


def _by_name(hosts: Sequence[Host]) -> list[int]:
    return sorted(range(len(hosts)), key=lambda i: (hosts[i].name, hosts[i].node_id))


def alive_hosts() -> list[Host]:
    """Return the nodes of the Ray cluster that are alive."""
    return [
        Host(
            node_id=node["NodeID"],
            name=node.get("Labels", {}).get(HOST_LABEL, node["NodeManagerAddress"]),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def shares_once_there(
    num_ranks: int, device: Literal["cpu", "cuda"], timeout_s: float
) -> list[int]:
    """Return the number of ranks of each bundle, waiting for hosts that are still to join.

    Raises:
        PlacementError: There are fewer GPUs than ranks after ``timeout_s``.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            return share_out(alive_hosts(), num_ranks, device)
        except PlacementError:
            if time.monotonic() >= end_s:
                raise
        time.sleep(min(POLL_S, max(end_s - time.monotonic(), 0.0)))


def release_leftovers() -> None:
    """Remove the groups whose coordinators are gone.

    Ray itself does so when the job ends that a coordinator was part of. Ray Serve's never does, and
    a coordinator that was killed would keep its GPUs from its successor.
    """
    alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    for entry in placement_group_table().values():
        name = entry["name"]
        is_ours = name.startswith(COORDINATOR_PREFIX) and entry["state"] != "REMOVED"
        if is_ours and name not in alive:
            with contextlib.suppress(ValueError):  # somebody else was faster
                ray.util.remove_placement_group(ray.util.get_placement_group(name))


def place(
    num_ranks: int,
    device: Literal["cpu", "cuda"],
    timeout_s: float,
    nodes_timeout_s: float,
) -> tuple[PlacementGroup, list[Place]]:
    """Reserve a bundle on each host and return where each rank goes.

    Raises:
        PlacementError: There are too few GPUs after ``nodes_timeout_s``, or the bundles cannot
            be had within ``timeout_s`` more.
    """
    release_leftovers()
    shares = shares_once_there(num_ranks, device, nodes_timeout_s)
    # A CPU rank claims no CPU: a bundle needs some resource, and every node has memory.
    bundles = [{"GPU": share} if device == "cuda" else {"memory": MiB} for share in shares]
    # Named as the actor that runs this: while one is there, so is the other.
    name = ray.get_runtime_context().get_actor_name() or ""
    group = placement_group(bundles, strategy="STRICT_SPREAD", name=name)
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU", "memory")}
        raise PlacementError(
            f"no place for {num_ranks} ranks on {len(shares)} hosts within {timeout_s:g} s: asked"
            f" for {bundles}, the Ray cluster has {free} free; stop other jobs or lower"
            " context_parallel_size"
        )
    node_ids = placement_group_table(group)["bundles_to_node_id"]
    by_id = {host.node_id: host for host in alive_hosts()}
    bundle_hosts = [by_id[node_ids[bundle]] for bundle in range(len(shares))]
    if device == "cpu":
        shares = settle_shares(shares, bundle_hosts)
    return group, number_ranks(shares, bundle_hosts)
