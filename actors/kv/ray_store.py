"""KV stores through Ray: as the ranks of a host call theirs, and as the coordinator calls all."""

import asyncio
import contextlib
import re
from typing import Any

import ray

from actors.kv.flight import keep_freed_memory
from actors.kv.messages import Lease, StoreInfo, StoreSpec
from actors.kv.pieces import PieceId
from actors.kv.store import KVStore

NAMESPACE = "ringspan"  # of Ray names
_NAME = re.compile(r"ringspan-kv-([0-9a-f]+)-(.+)", re.DOTALL)


def store_name(cluster: str, host: str) -> str:
    """Return the Ray name of a host's store; ``cluster`` are hexadecimal digits."""
    return f"ringspan-kv-{cluster}-{host}"


def ask_running_stores(method: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Return what all stores on this Ray cluster say, by ringspan cluster and host.

    Of one that is lost, failed or did not answer it is None.
    """
    asked: dict[str, dict[str, Any]] = {}
    for each in sorted(
        ray.util.list_named_actors(all_namespaces=True), key=lambda each: str(each["name"])
    ):
        match = _NAME.fullmatch(each["name"])
        if match is None or each["namespace"] != NAMESPACE:
            continue
        with contextlib.suppress(ValueError):  # it ended since it was listed
            actor = ray.get_actor(each["name"], NAMESPACE)
            asked.setdefault(match[1], {})[match[2]] = getattr(actor, method).remote()
    references = [reference for hosts in asked.values() for reference in hosts.values()]
    if references:
        ray.wait(references, num_returns=len(references), timeout=timeout_s)
    return {
        cluster: {host: _answer(reference) for host, reference in hosts.items()}
        for cluster, hosts in asked.items()
    }


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.RayError:  # also GetTimeoutError
        return None


class KVStoreActor(KVStore):
    """A store that other hosts reach by this node's address."""

    def __init__(self, spec: StoreSpec) -> None:
        """See `KVStore`."""
        keep_freed_memory()
        super().__init__(spec, ray.util.get_node_ip_address())


class RayStore:
    """A store's actor as a rank's threads call it; see `actors.kv.client.Store`."""

    def __init__(self, actor: Any, timeout_s: float) -> None:
        """Take the actor; a call that takes longer has failed."""
        self._actor = actor
        self._timeout_s = timeout_s

    def reserve(
        self, tenant: bytes, owner: str, wanted: list[tuple[PieceId, int]]
    ) -> list[Lease | None]:
        """See `actors.kv.store.KVStore.reserve`."""
        leases: list[Lease | None] = self._call("reserve", tenant, owner, wanted)
        return leases

    def commit(self, done: list[tuple[int, bytes]]) -> None:
        """See `actors.kv.store.KVStore.commit`."""
        self._call("commit", done)

    def abort(self, lease_ids: list[int]) -> None:
        """See `actors.kv.store.KVStore.abort`."""
        self._call("abort", lease_ids)

    def drop(self, pieces: list[PieceId]) -> None:
        """See `actors.kv.store.KVStore.drop`."""
        self._call("drop", pieces)

    def _call(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._actor, method).remote(*args), timeout=self._timeout_s)


class RayStoreHandle:
    """A store's actor as the coordinator calls it; see `actors.kv.finder.StoreHandle`."""

    def __init__(self, actor: Any, info: StoreInfo) -> None:
        """Take the actor and what it said when it was up."""
        self.actor = actor
        self.host = info.host
        self.flight_address = info.flight_address

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method; see `StoreHandle.call`."""

        async def answer() -> Any:
            return await getattr(self.actor, method).remote(*args)

        return await asyncio.wait_for(answer(), timeout_s)
