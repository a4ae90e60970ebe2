"""The Ray actors: plain classes made remote, with their resources. The only `ray.remote` calls."""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.coordinator import Coordinator
from actors.messages import WorkerSpec
from actors.placement import Place
from actors.ranks import CONTROL
from actors.worker import GPUWorker
from configs import Config


def create_coordinator(config: Config) -> Any:
    """Start the coordinator's process and return its handle."""
    actor = ray.remote(num_cpus=0, max_restarts=0)(Coordinator)
    return actor.remote(config, create_worker)


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
