"""Ray: whether it starts or is reached, and whether its hosts agree."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from cluster.doctor.finding import Finding, ok, problem, warning
from cluster.doctor.links import SLOW_LINK_BYTES_PER_S

MOST_SKEW_S = 1.0
COMMON = {"python": "Python", "ray": "Ray", "torch": "torch", "code": "code of ringspan (digest)"}


def judge_ray(
    facts: Mapping[str, Any], *, device: str, environment: Mapping[str, str]
) -> list[Finding]:
    """Judge the facts of the probe ``ray`` for the ranks and the device that are asked for."""
    hosts, gpus = facts["hosts"], int(facts["gpus"])
    joined = facts["address"] not in (None, "", "local")
    told = f"a Ray of its own starts in {facts['start_s']:.1f} s"
    if joined:
        told = f"joined the cluster at {facts['address']}: {len(hosts)} hosts, {gpus} GPUs"
    found = [_judge_places(facts, told, gpus, device)]
    if joined and environment.get("RAY_AUTH_MODE") != "token":
        sentence = "the cluster asks for no token: whoever reaches its ports can run code there"
        advice = "set RAY_AUTH_MODE=token and a token on every node, or keep the network closed"
        found.append(warning("ray", sentence, advice))
    for key, what in COMMON.items():
        versions = {host["name"]: host[key] for host in hosts}
        if len(set(versions.values())) > 1:
            each = ", ".join(f"{name} {version}" for name, version in versions.items())
            advice = "give all hosts the same environment (one image, or one working_dir)"
            found.append(problem("hosts", f"they differ in their {what}: {each}", advice))
    found += chain(_judge_clocks(hosts), map(_judge_link, facts["links"]))
    return found


def _judge_places(facts: Mapping[str, Any], told: str, gpus: int, device: str) -> Finding:
    num_ranks = facts["num_ranks"]
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cpu":
        return ok("ray", f"{told}; {num_ranks} ranks have a place")
    if gpus < num_ranks:
        sentence = f"{told}; -cp {num_ranks} needs {num_ranks} GPUs, and there are {gpus}"
        return problem("ray", sentence, "lower -cp, add GPUs, or pass --device cpu")
    if facts["free_gpus"] < num_ranks:
        sentence = f"{told}; {facts['free_gpus']:g} of {gpus} GPUs are free, for {num_ranks} ranks"
        return warning("ray", sentence, "wait for other jobs, or lower -cp")
    return ok("ray", f"{told}; {num_ranks} ranks have a GPU each")


def _judge_clocks(hosts: list[Mapping[str, Any]]) -> list[Finding]:
    late = {host["name"]: host["offset_s"] for host in hosts if abs(host["offset_s"]) > MOST_SKEW_S}
    if not late:
        return []
    told = ", ".join(f"{name} {offset_s:+.1f} s" for name, offset_s in late.items())
    sentence = f"clocks differ from this machine's: {told}"
    return [warning("clocks", sentence, "run chrony or another NTP client on every host")]


def _judge_link(link: Mapping[str, Any]) -> Finding:
    between = " and ".join(link["hosts"])
    advice = "open all TCP ports between the hosts, and set GLOO_SOCKET_IFNAME to their network"
    if "error" in link:
        return problem("link", f"{between} cannot exchange over gloo: {link['error']}", advice)
    if not link["is_right"]:
        return problem("link", f"between {between} comes what was not sent", "replace the network")
    told = f"{between} exchange over gloo at {link['bytes_per_s'] / 1e9:.2f} GB/s each way"
    if link["bytes_per_s"] < SLOW_LINK_BYTES_PER_S:
        return warning("link", told, "is it the network meant for it? see GLOO_SOCKET_IFNAME")
    return ok("link", told)
