"""Places that a coordinator held are free for the next one, however it ended."""

import time
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from actors.placement import COORDINATOR_PREFIX, place


class _Holder:
    """Holds a place as a coordinator does."""

    def hold(self) -> None:
        place(1, "cpu", 10.0, 0.0)


def test_places_of_a_killed_coordinator_are_released_by_the_next(shared_ray: None) -> None:
    """Under Ray Serve all coordinators are of one job, and Ray itself would wait for its end."""
    names = [f"{COORDINATOR_PREFIX}{suffix}" for suffix in ("lost", "living", "next")]
    lost, living, following = [_holder(name) for name in names]
    ray.get([lost.hold.remote(), living.hold.remote()], timeout=60)
    ray.kill(lost)
    _until_gone(names[0])
    assert _held(names) == names[:2]

    ray.get(following.hold.remote(), timeout=60)

    assert _held(names) == names[1:]
    for holder in (living, following):
        ray.kill(holder)


def _holder(name: str) -> Any:
    options: dict[str, Any] = {"name": name}  # which the type hints of ray.remote do not know
    return ray.remote(num_cpus=0, **options)(_Holder).remote()


def _until_gone(name: str) -> None:
    end_s = time.monotonic() + 30.0
    while name in ray.util.list_named_actors():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _held(names: list[str]) -> list[str]:
    table = placement_group_table().values()
    return sorted(
        (e["name"] for e in table if e["name"] in names and e["state"] == "CREATED"),
        key=names.index,
    )
