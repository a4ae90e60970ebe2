"""The facts of a Ray cluster: one started as a command would start it, or one that runs."""

import os
import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.placement import alive_hosts
from actors.remote import create_on
from cluster.doctor.host_probe import HostProbe
from cluster.launch import connect_ray, disconnect_ray

HOSTS_S = 60.0  # for an actor on every host to start
MEASURE_S = 120.0
CLOCK_TRIES = 5


def ray_facts(address: str | None, num_ranks: int) -> dict[str, Any]:
    """Join or start a Ray and return its facts, with those of each host and link.

    Raises:
        RayUnreachable: There is none at the address.
        ray.exceptions.GetTimeoutError: A host does not answer.
    """
    start_s = time.perf_counter()
    connect_ray(address)
    try:
        # By name, as the ranks of a ring are numbered.
        hosts = sorted(alive_hosts(), key=lambda host: (host.name, host.node_id))
        facts: dict[str, Any] = {
            "address": address or os.environ.get("RAY_ADDRESS"),
            "start_s": time.perf_counter() - start_s,
            "gpus": ray.cluster_resources().get("GPU", 0),
            "free_gpus": ray.available_resources().get("GPU", 0),
            "num_ranks": num_ranks,
        }
        probes = [create_on(host.node_id, HostProbe) for host in hosts]
        told = ray.get([probe.facts.remote() for probe in probes], timeout=HOSTS_S)
        facts["hosts"] = [
            {"name": host.name, "offset_s": _clock_offset_s(probe), **of_host}
            for host, probe, of_host in zip(hosts, probes, told, strict=True)
        ]
        names = [host.name for host in hosts]
        facts["links"] = _links(names, probes) if len(probes) > 1 else []
        return facts
    finally:
        disconnect_ray()


def _clock_offset_s(probe: Any) -> float:
    """Return by how much a host's clock is ahead of ours, from the fastest of some answers."""
    tries = []
    for _ in range(CLOCK_TRIES):
        before_s = time.time()
        there_s = ray.get(probe.now_s.remote(), timeout=HOSTS_S)
        after_s = time.time()
        tries.append((after_s - before_s, there_s - (before_s + after_s) / 2))
    return float(min(tries)[1])


def _links(names: Sequence[str], probes: Sequence[Any]) -> list[dict[str, Any]]:
    """Measure each host with the next, as neighbours in a ring."""
    links = []
    pairs = list(zip(range(len(probes)), [*range(1, len(probes)), 0], strict=True))
    for one, other in pairs[: 1 if len(probes) == 2 else None]:
        link: dict[str, Any] = {"hosts": [names[one], names[other]]}
        try:
            where = ray.get(probes[one].host_store.remote(), timeout=HOSTS_S)
            ends = [probes[end].measure.remote(*where, i) for i, end in enumerate((one, other))]
            results = ray.get(ends, timeout=MEASURE_S)
            link["bytes_per_s"] = min(each["bytes_per_s"] for each in results)
            link["is_right"] = all(each["is_right"] for each in results)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            link["error"] = str(error).strip().splitlines()[-1]
        links.append(link)
    return links
