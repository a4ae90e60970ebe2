"""What Ringspan needs of its manifests: places, memory, ports and files that agree with each other.

All objects of one overlay are looked at together, for a Service must find the pods of a RayService.
"""

import argparse
import importlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from configs import Config, ConfigError, load
from k8s.operator_rules import cluster_spec, groups, serve_config

GiB = 2**30
# Beside shared memory: Ray's own processes and the coordinator, and what a rank holds on its host.
POD_HEAP_BYTES = 1 * GiB
RANK_HEAP_BYTES = 4 * GiB
GPU = "nvidia.com/gpu"
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}
Objects = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The pods of the head, or of one group of workers."""

    name: str
    replicas: int
    labels: dict[str, str]
    parameters: dict[str, str]  # of `ray start`
    resources: dict[str, str]  # Ray's, as the manifest gives them
    pod: dict[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        """Ray's own container, which is always the first."""
        first: dict[str, Any] = self.pod["containers"][0]
        return first

    @property
    def gpus(self) -> int:
        """Of one pod."""
        return int(self.limits.get(GPU, 0))

    @property
    def limits(self) -> dict[str, Any]:
        """Of one pod's container."""
        found: dict[str, Any] = (self.container.get("resources") or {}).get("limits") or {}
        return found

    def has_path(self, path: str) -> bool:
        """Return whether a path lies on something that is mounted."""
        mounts = [PurePosixPath(m["mountPath"]) for m in self.container.get("volumeMounts") or []]
        return any(PurePosixPath(path).is_relative_to(mount) for mount in mounts)


def group_list(document: dict[str, Any]) -> list[Group]:
    """Return the groups of a RayCluster, RayJob or RayService."""
    return [
        Group(
            name=name,
            replicas=group.get("replicas", 1),
            # KubeRay's own, by which Services choose.
            labels={**_labels(group["template"]), "ray.io/group": name},
            parameters=group.get("rayStartParams") or {},
            resources=group.get("resources") or {},
            pod=group["template"]["spec"],
        )
        for name, group in groups(cluster_spec(document)).items()
    ]


def quantity(text: object) -> int:
    """Return a quantity of Kubernetes, such as 512Gi, as a whole number."""
    word = str(text)
    unit = word.lstrip("0123456789.")
    return int(Decimal(word.removesuffix(unit)) * _UNITS[unit] if unit else Decimal(word))


def cluster_errors(objects: Objects) -> Iterator[str]:
    """Say what is wrong with an overlay's objects, a sentence each, beginning with the object."""
    for document in objects:
        if not document["apiVersion"].startswith("ray.io/"):
            continue
        where = f"{document['kind']} {document['metadata']['name']}"
        for group in group_list(document):
            yield from (f"{where}: group {group.name}: {e}" for e in _pod_errors(group))
            yield from (f"{where}: group {group.name}: {e}" for e in _shm_errors(group))
        yield from (f"{where}: {error}" for error in _served_errors(document, objects))


def _labels(template: dict[str, Any]) -> dict[str, str]:
    return (template.get("metadata") or {}).get("labels") or {}


def _pod_errors(group: Group) -> Iterator[str]:
    """What a pod may do: run as nobody in particular, and reach nothing."""
    security = group.pod.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield "securityContext.runAsNonRoot is not true"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "securityContext.seccompProfile is not RuntimeDefault"
    if group.pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false, and no pod needs the Kubernetes API"
    for container in [*group.pod["containers"], *group.pod.get("initContainers", [])]:
        own = container.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation is not false"
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            yield f"{container['name']}: capabilities.drop has no ALL"
        resources = container.get("resources") or {}
        if not {"cpu", "memory"} <= {*(resources.get("limits") or {})}:
            yield f"{container['name']}: resources.limits has no cpu or no memory"
    if group.gpus and group.container["resources"].get("requests") != group.limits:
        yield "requests and limits of a pod with GPUs must be the same, or it may be evicted"


def _shm_errors(group: Group, arena_bytes: int = 0, ranks: int = 0) -> Iterator[str]:
    """Whether shared memory holds what will lie there, and the pod's memory all together."""
    object_store = group.parameters.get("object-store-memory")
    if object_store is None:
        yield "rayStartParams has no object-store-memory: Ray would take 30 % of the memory"
        return
    names = [m["name"] for m in group.container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    shm = [v["emptyDir"] for v in group.pod.get("volumes", []) if v["name"] in names]
    if not shm or shm[0].get("medium") != "Memory" or "sizeLimit" not in shm[0]:
        yield "/dev/shm is no emptyDir of medium Memory with a sizeLimit"
        return
    shm_bytes, needed_bytes = quantity(shm[0]["sizeLimit"]), arena_bytes + int(object_store)
    if needed_bytes > shm_bytes:
        yield (
            f"/dev/shm has {shm_bytes / GiB:g} GiB, but kv_store.host_memory_bytes and"
            f" object-store-memory are {needed_bytes / GiB:g} GiB together"
        )
    total_bytes = needed_bytes + POD_HEAP_BYTES + ranks * RANK_HEAP_BYTES
    if total_bytes > quantity(group.limits.get("memory", 0)):
        yield (
            f"limits.memory is {group.limits.get('memory')}, but shared memory and"
            f" {ranks} ranks need {total_bytes / GiB:g} GiB"
        )


def _served_errors(document: dict[str, Any], objects: Objects) -> Iterator[str]:
    """What is wrong with what the objects are to run."""
    found = group_list(document)
    try:
        if document["kind"] == "RayJob":
            yield from _config_errors(entrypoint_config(document["spec"]["entrypoint"]), found)
        if document["kind"] == "RayService":
            for application in serve_config(document)["applications"]:
                config = application_config(application)
                yield from _config_errors(config, found)
                yield from _server_errors(config, application, found, objects)
    except (ConfigError, ValueError) as error:
        yield str(error)


def application_config(application: dict[str, Any]) -> Config:
    """Return the configuration that an application of Ray Serve is built with.

    Raises:
        ConfigError: A key or a value that does not exist, or no builder at ``import_path``.
    """
    module, _, builder = application["import_path"].partition(":")
    try:
        known = callable(getattr(importlib.import_module(module), builder, None))
    except ImportError:
        known = False
    if not known:
        raise ConfigError(f"import_path {application['import_path']} names nothing to build from")
    arguments = {k: v for k, v in application["args"].items() if k != "ray_actor_options"}
    dotted = [f"{key}={value}" for key, value in arguments.items() if "." in key]
    values = {key: value for key, value in arguments.items() if "." not in key}
    return load(values=values, overrides=dotted)


def entrypoint_config(entrypoint: str) -> Config:
    """Return the configuration of a ``ringspan generate`` command line.

    Raises:
        ValueError: It is another command, or has a flag or a key that does not exist.
    """
    from cluster import generate  # torch and Ray take seconds
    from cluster.arguments import cluster_options

    parser = argparse.ArgumentParser(prog="ringspan", exit_on_error=False)
    generate.add_command(parser.add_subparsers(dest="command", required=True))
    words = shlex.split(entrypoint)
    try:
        options, rest = parser.parse_known_args(words[1:])
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"spec.entrypoint: {error}") from None
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if words[0] != "ringspan" or unknown:
        raise ValueError(f"spec.entrypoint: {unknown[0] if unknown else words[0]} is not known")
    given = cluster_options(options)
    overrides = [*given.pop("overrides"), *rest]
    return load(given.pop("config_file"), {"model": str(options.model), **given}, overrides)


def _config_errors(config: Config, found: Sequence[Group]) -> Iterator[str]:
    """Whether there are places, memory and files for this configuration."""
    on_gpus = config.device != "cpu" and any(group.gpus for group in found)
    homes = [group for group in found if group.gpus] if on_gpus else list(found)
    gpus = sum(group.gpus * group.replicas for group in homes)
    ranks = config.context_parallel_size
    if on_gpus and ranks != gpus:
        yield f"context_parallel_size is {ranks}, but the groups have {gpus} GPUs together"
    arena_bytes = config.kv_store.host_memory_bytes
    if arena_bytes is None:
        # What a process sees of the memory is the node's, not the pod's.
        yield "kv_store.host_memory_bytes is not set: its default is a quarter of the node's memory"
    for group in homes:
        per_pod = group.gpus if on_gpus else ranks
        errors = _shm_errors(group, arena_bytes or 0, per_pod)
        yield from (f"group {group.name}: {error}" for error in errors)
    kv = config.kv_store
    everywhere = {"model": config.model, "kv_store.secret_file": kv.secret_file}
    yield from _mount_errors(everywhere, found)
    names = ("disk_directory", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    yield from _mount_errors({f"kv_store.{name}": getattr(kv, name) for name in names}, homes)


def _mount_errors(paths: dict[str, str | None], found: Sequence[Group]) -> Iterator[str]:
    for key, path in paths.items():
        for group in found:
            if path is not None and not group.has_path(path):
                yield f"{key} is {path}, of which group {group.name} mounts nothing"


def _server_errors(
    config: Config, application: dict[str, Any], found: Sequence[Group], objects: Objects
) -> Iterator[str]:
    """Whether clients reach the replica, and the replica its files."""
    wanted = (application["args"].get("ray_actor_options") or {}).get("resources") or {}
    front = [group for group in found if wanted and {*wanted} <= {*group.resources}]
    if not front:
        yield f"no group has the resources {wanted} of the replica: give one group `resources`"
        return
    server = config.server
    if server.host in ("127.0.0.1", "localhost", "::1"):
        yield f"server.host is {server.host}: only the pod itself would reach gRPC"
    if server.api_key_file is None and server.ssl_ca_certs is None:
        yield "server.api_key_file is not set: whoever reaches the Service could use the model"
    files = ("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    yield from _mount_errors({f"server.{name}": getattr(server, name) for name in files}, front)
    ports = {p.get("name"): p["containerPort"] for p in front[0].container.get("ports") or []}
    grpc_port = ports.get("grpc")
    if grpc_port != server.grpc_port:
        yield f"server.grpc_port is {server.grpc_port}, but the front pod's is {grpc_port}"
    yield from _service_errors(front[0], ports, objects)
    yield from _budget_errors(found, objects)


def _service_errors(front: Group, ports: dict[str, int], objects: Objects) -> Iterator[str]:
    services = [o for o in objects if o["kind"] == "Service"]
    reached: set[object] = set()
    for service in services:
        name, chosen = service["metadata"]["name"], service["spec"]["selector"]
        if not chosen.items() <= front.labels.items():
            yield f"Service {name} selects {chosen}, and the front pod's labels are {front.labels}"
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            reached.add(ports.get(target, target))
    for port_name in ("serve", "grpc"):
        if ports.get(port_name) not in reached:
            yield f"no Service leads to the front pod's port {port_name}"


def _budget_errors(found: Sequence[Group], objects: Objects) -> Iterator[str]:
    for budget in (o for o in objects if o["kind"] == "PodDisruptionBudget"):
        chosen = budget["spec"]["selector"]["matchLabels"]
        pods = sum(g.replicas for g in found if chosen.items() <= g.labels.items())
        if budget["spec"].get("minAvailable") != pods:
            yield (
                f"PodDisruptionBudget {budget['metadata']['name']}: minAvailable is"
                f" {budget['spec'].get('minAvailable')}, and the ring needs all {pods} pods"
            )
