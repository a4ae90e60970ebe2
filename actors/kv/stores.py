"""All hosts' KV stores of one cluster, as the coordinator brings them up, asks and ends them."""

import asyncio
import contextlib
import functools
import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup

from actors.errors import PlacementError
from actors.kv.finder import StoreFinder
from actors.kv.flight_tls import FlightTls
from actors.kv.keys import TenantKeys, default_secret_path, exactness_class, load_secret
from actors.kv.messages import StoreInfo, StoreSpec
from actors.kv.pieces import Layout
from actors.kv.ray_store import RayStore, RayStoreHandle
from actors.kv.recode import recoded_size
from actors.placement import Place
from actors.profile_file import default_directory
from actors.ranks import Ranks
from configs import Config, KVStoreConfig
from models.fingerprint import model_fingerprint
from models.kv_codec import Encoding

FLUSH_S = 5.0  # for what is under way to reach the stores, and the disks, at the end
StoreDtype = Literal["auto", "int8", "int4", "fp8"]
CreateStore = Callable[[StoreSpec, PlacementGroup, Place], Any]


class Stores:
    """The stores, the keys of what they hold, and who finds it."""

    def __init__(self, handles: Sequence[RayStoreHandle], keys: TenantKeys) -> None:
        """Take stores that are up."""
        self.keys = keys
        self.handles = handles
        self.finder: StoreFinder

    @classmethod
    async def start(
        cls,
        config: Config,
        layout: Layout,
        capacity_bytes: int,
        ranks: Ranks,
        places: Sequence[Place],
        group: PlacementGroup,
        create_store: CreateStore,
    ) -> "Stores":
        """Start a store on each host and let the ranks map its arena.

        Raises:
            PlacementError: A host has no room for its arena, or none for its disk.
            SecretError: The cluster's secret cannot be read.
        """
        token = secrets.token_hex(16)
        cluster = secrets.token_hex(4)
        by_host = {where.host: where for where in places}
        actors = {
            host: create_store(
                _spec(config, layout, capacity_bytes, host, cluster, token), group, where
            )
            for host, where in by_host.items()
        }
        keys, infos = await asyncio.gather(
            asyncio.to_thread(_keys, config, layout),
            asyncio.gather(*(_up(host, actor) for host, actor in actors.items())),
        )
        stores = cls([RayStoreHandle(actors[info.host], info) for info in infos], keys)
        stores.finder = StoreFinder(
            stores.handles,
            [where.host for where in places],
            block_tokens=config.kv_store.block_tokens,
            timeout_s=config.kv_store.timeout_s,
            travelling=functools.partial(
                recoded_size,
                layout=layout,
                encoding=_encoding(config.kv_store.remote_dtype, config),
            ),
        )
        of_host = {
            info.host: (RayStore(actors[info.host], config.kv_store.timeout_s), info)
            for info in infos
        }
        await ranks.call(
            "attach_store",
            [of_host[where.host] for where in places],
            layout,
            _encoding(config.kv_store.host_dtype, config),
            link_bytes_per_s=config.restore.link_bytes_per_s,
            timeout_s=config.ray.start_timeout_s,
        )
        return stores

    async def ask_all(self, method: str, *args: Any, timeout_s: float) -> dict[str, Any]:
        """Call a method of every store; of one that is lost the answer is None."""
        answers = await asyncio.gather(
            *(handle.call(method, *args, timeout_s=timeout_s) for handle in self.handles),
            return_exceptions=True,
        )
        return {
            handle.host: None if isinstance(answer, BaseException) else answer
            for handle, answer in zip(self.handles, answers, strict=True)
        }

    async def stop(self, ranks: Ranks) -> None:
        """Let what is finished reach the stores and disks, for a limited time, and end them."""
        with contextlib.suppress(Exception):  # ranks that are lost have nothing to flush
            await ranks.call("flush_store", FLUSH_S, timeout_s=2 * FLUSH_S)
        await self.ask_all("close", timeout_s=FLUSH_S)
        for handle in self.handles:
            ray.kill(handle.actor)


def store_bytes(config: Config, device: str) -> int:
    """Return the size of each host's arena, 0 for no store."""
    asked = config.kv_store.host_memory_bytes
    if asked is not None:
        return asked
    if device == "cpu" and config.kv_store.disk_directory is None:
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def is_lossy(config: Config) -> bool:
    """Return whether any tier may lose something: then layer inputs are not stored."""
    kv = config.kv_store
    dtypes = (config.kv_cache_dtype, kv.host_dtype, kv.remote_dtype, kv.disk_dtype)
    return any(dtype != "auto" for dtype in dtypes)


def _spec(
    config: Config, layout: Layout, capacity_bytes: int, host: str, cluster: str, token: str
) -> StoreSpec:
    kv = config.kv_store
    return StoreSpec(
        host=host,
        layout=layout,
        capacity_bytes=capacity_bytes,
        cluster=cluster,
        token=token,
        tenant_share=kv.tenant_share,
        lease_s=kv.lease_s,
        disk_directory=kv.disk_directory,
        disk_bytes=kv.disk_bytes,
        disk_dtype=_encoding(kv.disk_dtype, config),
        remote_dtype=_encoding(kv.remote_dtype, config),
        tls=_tls(kv),
    )


def _tls(kv: KVStoreConfig) -> FlightTls | None:
    if kv.ssl_certfile is None or kv.ssl_keyfile is None or kv.ssl_ca_certs is None:
        return None
    return FlightTls(
        certfile=kv.ssl_certfile,
        keyfile=kv.ssl_keyfile,
        ca_certs=kv.ssl_ca_certs,
        server_name=kv.ssl_server_name,
    )


def _encoding(dtype: StoreDtype, config: Config) -> Encoding:
    """Return how pieces are encoded in a tier: ``auto`` loses nothing that the device has."""
    lossless: Encoding = "raw" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return lossless if dtype == "auto" else dtype


def _keys(config: Config, layout: Layout) -> TenantKeys:
    kv = config.kv_store
    path = default_secret_path() if kv.secret_file is None else Path(kv.secret_file).expanduser()
    return TenantKeys(
        load_secret(path),
        # What is computed in another dtype is other KV.
        hashlib.sha256(
            model_fingerprint(Path(config.model), default_directory()) + layout.digest()
        ).digest(),
        exactness_class(
            device=config.kv_cache_dtype,
            host=kv.host_dtype,
            remote=kv.remote_dtype,
            disk=kv.disk_dtype,
        ),
        kv.block_tokens,
    )


async def _up(host: str, actor: Any) -> StoreInfo:
    try:
        info: StoreInfo = await actor.start.remote()
    except ray.exceptions.RayTaskError as error:
        raise PlacementError(f"the KV store of {host} cannot start: {error.cause}") from None
    return info
