"""KV stores without Ray: one for each of some hosts, in this process, for a `ThreadCluster`."""

import contextlib
import functools
import time
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from actors.kv.finder import StoreFinder
from actors.kv.keys import TenantKeys, exactness_class
from actors.kv.messages import StoreSpec
from actors.kv.pieces import Layout
from actors.kv.recode import recoded_size
from actors.kv.store import KVStore
from actors.worker import GPUWorker
from models.config import read_model_config
from models.kv_codec import Encoding

MiB = 2**20
SECRET = b"s" * 31 + b"t"


class _Handle:
    """A store as the coordinator reaches it."""

    def __init__(self, host: str, store: KVStore, flight_address: str) -> None:
        self.host = host
        self.flight_address = flight_address
        self._store = store

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        return getattr(self._store, method)(*args)


class ThreadStores:
    """Stores for clusters of one checkpoint; use as a context manager."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        num_hosts: int = 1,
        capacity_bytes: int = 64 * MiB,
        block_tokens: int = 16,
        restore_min_tokens: int = 1,
        disk_directory: Path | None = None,
        disk_bytes: int = 1024 * MiB,
        tenant_share: float = 1.0,
        dtypes: dict[str, Encoding] | None = None,
        activation_share: float = 0.0,
        keeps_both: bool = False,
        link_bytes_per_s: float | None = None,
        fingerprint: bytes = b"f" * 32,
    ) -> None:
        """Start the stores; host h keeps its disk in a directory of its own."""
        config = read_model_config(checkpoint)
        dtypes = dtypes or {}
        self.layout = Layout(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype="float32",
            block_tokens=block_tokens,
        )
        self.encoding: Encoding = dtypes.get("host", "raw")
        self.remote_encoding: Encoding = dtypes.get("remote", "raw")
        self.restore_min_tokens = restore_min_tokens
        self._activation_share, self._keeps_both = activation_share, keeps_both
        self._link_bytes_per_s = link_bytes_per_s
        exactness = exactness_class(**cast(dict[str, str], dtypes))
        self.keys = TenantKeys(SECRET, fingerprint, exactness, block_tokens)
        self.hosts = [f"host-{host}" for host in range(num_hosts)]
        self.stores = [
            KVStore(
                StoreSpec(
                    host=host,
                    layout=self.layout,
                    capacity_bytes=capacity_bytes,
                    cluster="test",
                    token="token",
                    tenant_share=tenant_share,
                    disk_directory=None if disk_directory is None else str(disk_directory / host),
                    disk_bytes=disk_bytes,
                    disk_dtype=dtypes.get("disk", "raw"),
                    remote_dtype=self.remote_encoding,
                )
            )
            for host in self.hosts
        ]
        self.infos = [store.start() for store in self.stores]

    def attach(self, workers: list[GPUWorker]) -> StoreFinder:
        """Give ranks their hosts' stores, the first ranks those of the first host."""
        numbers = [rank * len(self.hosts) // len(workers) for rank in range(len(workers))]
        of_ranks = [(self.stores[number], self.infos[number]) for number in numbers]
        for worker in workers:
            worker.attach_store(
                of_ranks, self.layout, self.encoding, link_bytes_per_s=self._link_bytes_per_s
            )
            worker.keep_activations(self._activation_share, self._keeps_both)
        return StoreFinder(
            [
                _Handle(host, store, info.flight_address)
                for host, store, info in zip(self.hosts, self.stores, self.infos, strict=True)
            ],
            [self.hosts[number] for number in numbers],
            block_tokens=self.layout.block_tokens,
            timeout_s=5.0,
            travelling=functools.partial(
                recoded_size, layout=self.layout, encoding=self.remote_encoding
            ),
        )

    def flip_bits(self, rng: np.random.Generator, count: int) -> None:
        """Damage the records of every arena in some places."""
        for store, info in zip(self.stores, self.infos, strict=True):
            used_bytes = store.stats()["host"]["used_bytes"]
            with Path(info.arena_path).open("r+b") as file:
                for at in rng.integers(0, max(1, used_bytes), count):
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 1 << int(rng.integers(0, 8))]))

    def check_all_returned(self) -> None:
        """Assert that no lease is left, and that directory and arena agree."""
        for store in self.stores:
            until_s = time.monotonic() + 10.0
            while store.stats()["disk"].get("queued") and time.monotonic() < until_s:
                time.sleep(0.01)  # what is written to disk is leased
            assert store.stats()["host"]["leases"] == 0
            store._host.check_invariants()

    def __enter__(self) -> "ThreadStores":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for store in self.stores:
            with contextlib.suppress(Exception):
                store.close()
