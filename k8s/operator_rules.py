"""What KubeRay's operator would refuse, or leave broken, in an object that its schema allows."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
_GATES = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_TOKEN_AUTH_SINCE = (2, 52)


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """Return the Ray cluster of a RayCluster, RayJob or RayService; {}: it has none."""
    spec: dict[str, Any] = document.get("spec") or {}
    key = _CLUSTER.get(document["kind"])
    return spec if key is None else spec.get(key) or {}


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the head's group and those of workers by name."""
    workers = cluster.get("workerGroupSpecs") or []
    return {"head": cluster.get("headGroupSpec") or {}} | {g["groupName"]: g for g in workers}


def serve_config(document: dict[str, Any]) -> dict[str, Any]:
    """Return what ``serveConfigV2`` says.

    Raises:
        ValueError: It is not YAML, or not what Ray Serve takes.
    """
    from ray.serve.schema import ServeDeploySchema  # takes seconds

    try:
        config: dict[str, Any] = yaml.safe_load(document["spec"].get("serveConfigV2") or "")
        ServeDeploySchema.model_validate(config)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"spec.serveConfigV2: {' '.join(str(error).split())}") from None
    return config


def operator_errors(document: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with a RayCluster, RayJob or RayService, a sentence each."""
    kind, cluster = document["kind"], cluster_spec(document)
    name, longest = document["metadata"].get("name", ""), _LONGEST_NAME[kind]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name or "a"):
        yield f"metadata.name: {name!r} is no DNS-1035 label of at most {longest} characters"
    if kind == "RayJob":
        yield from _job_errors(document["spec"])
    yield from _version_errors(cluster)
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs") or []]
    yield from (f"group {n!r} is there twice" for n in sorted(set(names)) if names.count(n) > 1)
    for group_name, group in groups(cluster).items():
        found = _group_errors(group, cluster.get("rayVersion"))
        yield from (f"group {group_name}: {sentence}" for sentence in found)
    for key, gate in _GATES.items():
        if cluster.get(key):
            yield f"{key}: needs the operator's feature gate {gate}, which is off by default"


def _job_errors(spec: dict[str, Any]) -> Iterator[str]:
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield "spec: exactly one of rayClusterSpec and clusterSelector is needed"
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        yield "spec.entrypoint: missing"


def _version_errors(cluster: dict[str, Any]) -> Iterator[str]:
    found = re.match(r"(\d+)\.(\d+)", str(cluster.get("rayVersion") or ""))
    known = (int(found[1]), int(found[2])) if found else (0, 0)
    mode = (cluster.get("authOptions") or {}).get("mode")
    if mode == "token" and known < _TOKEN_AUTH_SINCE:
        yield "authOptions.mode token needs a rayVersion of 2.52 or later"
    if mode != "token":
        yield "authOptions.mode is not token: whoever reaches Ray's ports could run any code"


def _group_errors(group: dict[str, Any], ray_version: object) -> Iterator[str]:
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & {*parameters}:
        yield "resources are both in `resources` and in rayStartParams"
    if "labels" in parameters:
        yield "rayStartParams.labels is not supported, use `labels`"
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
    now = group.get("replicas", low)
    if not low <= now <= high:
        yield f"replicas {now} is not within {low} to {high}"
    pod = (group.get("template") or {}).get("spec") or {}
    volumes = {volume["name"] for volume in pod.get("volumes") or []}
    for container in [*(pod.get("containers") or []), *(pod.get("initContainers") or [])]:
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                yield f"{container['name']} mounts {mount['name']!r}: there is no such volume"
        image = re.search(r"/ray(?:-ml|-llm)?:(\d+\.\d+\.\d+)", container.get("image") or "")
        if image and image[1] != str(ray_version):
            yield f"image {container['image']} is not of rayVersion {ray_version}"
