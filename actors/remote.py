"""The Ray actors: plain classes made remote, with their resources. The only `ray.remote` calls."""

import secrets
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from actors.coordinator import Coordinator
from actors.kv.messages import StoreSpec
from actors.kv.ray_store import NAMESPACE, KVStoreActor, store_name
from actors.messages import WorkerSpec
from actors.placement import COORDINATOR_PREFIX, Place
from actors.ranks import CONTROL
from actors.worker import GPUWorker
from configs import Config

# Requests of all doors, and room for cancel and status: see configs.ServerConfig.max_requests.
COORDINATOR_CALLS = 4800
STORE_THREADS = 4  # of a KV store: one may bring pieces from a disk while others are served


def create_coordinator(config: Config) -> Any:
    """Start the coordinator's process and return its handle."""
    # Options that the type hints of ray.remote do not know for classes.
    options: dict[str, Any] = {
        "name": COORDINATOR_PREFIX + secrets.token_hex(8),
        "namespace": NAMESPACE,
        "max_concurrency": COORDINATOR_CALLS,
    }
    actor = ray.remote(num_cpus=0, max_restarts=0, **options)(Coordinator)
    return actor.remote(config, create_worker, create_store)


def create_store(spec: StoreSpec, group: PlacementGroup, where: Place) -> Any:
    """Start one host's KV store in its bundle, under a name, and return its handle."""
    # Options that the type hints of ray.remote do not know yet.
    options: dict[str, Any] = {
        "name": store_name(spec.cluster, spec.host),
        "namespace": NAMESPACE,
        "max_concurrency": STORE_THREADS,
    }
    actor = ray.remote(
        num_cpus=0,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=where.bundle
        ),
        **options,
    )(KVStoreActor)
    return actor.remote(spec)


def create_worker(spec: WorkerSpec, group: PlacementGroup, where: Place) -> Any:
    """Start one rank's process in its bundle and return its handle."""
    # An option that the type hints of ray.remote do not know yet.
    threads: dict[str, Any] = {"concurrency_groups": {CONTROL: 2}}
    actor = ray.remote(
        num_cpus=0,
        num_gpus=1 if spec.device == "cuda" else 0,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=where.bundle
        ),
        **threads,
    )(GPUWorker)
    return actor.remote(spec)


def create_plain(kind: type, *arguments: Any) -> Any:
    """Start a process with one object of a class that is no part of a cluster, as benchmarks do."""
    return ray.remote(num_cpus=0, max_restarts=0)(kind).remote(*arguments)


def create_on(node_id: str, kind: type, *arguments: Any) -> Any:
    """Start a process as `create_plain` does, on one node of the Ray cluster."""
    # A strategy that the type hints of ray.remote do not know.
    where: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=where)(kind)
    return actor.remote(*arguments)
