"""The coordinator's side of the KV stores: what they have of a prompt, and brought near.

Whatever goes wrong with a store means that it has nothing: then it is computed.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.kv.messages import (
    Found,
    Lease,
    RestorePart,
    StoredPrefix,
    Tier,
    Wanted,
    rank_of_block,
)
from actors.kv.pieces import PieceId
from actors.offload import Lookup

OWNER = "coordinator"
Travelling = Callable[[Found], Found]  # to another host, in `kv_store.remote_dtype`
PAUSE_S = 30.0  # in which a store that failed is not asked: a prompt waits for it once
LEAST_BYTES_PER_S = 20e6  # a store slower than that is not waited for


class StoreHandle(Protocol):
    """One host's store, as the coordinator reaches it."""

    host: str
    flight_address: str

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of `actors.kv.store.KVStore`.

        Raises:
            Exception: The store is gone, or did not answer in time.
        """


@dataclass(frozen=True)
class Source:
    """One part of a block, and the host that has it."""

    piece: PieceId
    start: int  # within the block
    end: int
    host: str
    tier: Tier  # as seen from the host that needs it
    size_bytes: int


class StoreFinder:
    """Finds prefixes in all hosts' stores and has them staged in arenas."""

    def __init__(
        self,
        stores: Sequence[StoreHandle],
        rank_hosts: Sequence[str],
        *,
        block_tokens: int,
        timeout_s: float,
        travelling: Travelling = lambda found: found,
    ) -> None:
        """Take the stores, the host of every rank, and what a piece becomes on its way."""
        self._travelling = travelling
        self._stores = {store.host: store for store in stores}
        self._rank_hosts = rank_hosts
        self._block_tokens = block_tokens
        self._timeout_s = timeout_s
        self._asked_again_s: dict[str, float] = {}  # when a store that failed is, by host

    async def find(self, lookup: Lookup) -> StoredPrefix | None:
        """Return what there is of a prompt, leased in the arenas of the ranks that need it."""
        start_s = time.perf_counter()
        keys = list(lookup.keys)
        answers = await asyncio.gather(
            *(self._call(host, "find", keys, timeout_s=self._timeout_s) for host in self._stores)
        )
        found = {host: answer or [] for host, answer in zip(self._stores, answers, strict=True)}
        blocks = self._cover(lookup, found)
        found_s = time.perf_counter()
        if not blocks:
            return None
        leases = await self._stage(lookup, blocks)
        times_s = found_s - start_s, time.perf_counter() - found_s
        stored = self._prefix(lookup, blocks, leases, *times_s)
        if stored is not None:
            return stored
        await self._release_all({h: [x.lease_id for x in of.values()] for h, of in leases.items()})
        return None

    async def release(self, stored: StoredPrefix) -> None:
        """Return the leases of a prefix."""
        await self._release_all(stored.leases)

    async def _release_all(self, leases: Mapping[str, Sequence[int]]) -> None:
        await asyncio.gather(
            *(
                self._call(host, "release", list(ids), timeout_s=self._timeout_s)
                for host, ids in leases.items()
                if ids
            )
        )

    def _cover(
        self, lookup: Lookup, found: Mapping[str, Sequence[Found]]
    ) -> list[tuple[str, list[Source]]]:
        """Return host and sources of the first blocks, up to one that is not whole."""
        first = lookup.start // self._block_tokens
        by_key: dict[bytes, list[tuple[str, Found]]] = {}
        for host, of_host in found.items():
            for each in of_host:
                by_key.setdefault(each.piece.key, []).append((host, each))
        blocks = []
        for index, key in enumerate(lookup.keys):
            rank = rank_of_block(first + index, lookup.home, len(self._rank_hosts))
            host = self._rank_hosts[rank]
            near = [
                (of, each if of == host else self._travelling(each))
                for of, each in by_key.get(key, ())
            ]
            sources = cover_block(near, host, self._block_tokens)
            if sources is None:
                break
            blocks.append((host, sources))
        return blocks

    async def _stage(
        self, lookup: Lookup, blocks: Sequence[tuple[str, Sequence[Source]]]
    ) -> dict[str, dict[PieceId, Lease]]:
        """Have pieces brought into the arenas of the hosts that need them; return their leases."""
        wanted: dict[str, dict[PieceId, Wanted]] = {}
        for host, sources in blocks:
            for source in sources:
                address = None if source.host == host else self._stores[source.host].flight_address
                wanted.setdefault(host, {})[source.piece] = Wanted(
                    piece=source.piece, size_bytes=source.size_bytes, flight_address=address
                )
        staged = await asyncio.gather(
            *(self._stage_on(host, list(of.values()), lookup.tenant) for host, of in wanted.items())
        )
        return dict(zip(wanted, staged, strict=True))

    async def _stage_on(
        self, host: str, wanted: list[Wanted], tenant: bytes
    ) -> dict[PieceId, Lease]:
        num_bytes = sum(each.size_bytes for each in wanted)
        timeout_s = self._timeout_s + num_bytes / LEAST_BYTES_PER_S
        leases = await self._call(host, "stage", wanted, tenant, OWNER, timeout_s=timeout_s)
        return {lease.piece: lease for lease in leases or () if lease is not None}

    def _prefix(
        self,
        lookup: Lookup,
        blocks: Sequence[tuple[str, Sequence[Source]]],
        leases: Mapping[str, Mapping[PieceId, Lease]],
        find_s: float,
        stage_s: float,
    ) -> StoredPrefix | None:
        """Return what was staged without a gap, None if that is nothing."""
        parts: list[RestorePart] = []
        tiers: Counter[Tier] = Counter()
        end = lookup.start
        for index, (host, sources) in enumerate(blocks):
            if any(source.piece not in leases[host] for source in sources):
                break
            block_start = lookup.start + index * self._block_tokens
            rank = rank_of_block(
                block_start // self._block_tokens, lookup.home, len(self._rank_hosts)
            )
            for source in sources:
                part_end = min(block_start + source.end, lookup.tokens)
                if part_end <= block_start + source.start:
                    continue
                parts.append(
                    RestorePart(
                        rank=rank,
                        start=block_start + source.start,
                        end=part_end,
                        block_start=block_start,
                        lease=leases[host][source.piece],
                        tier=source.tier,
                    )
                )
                tiers[source.tier] += part_end - parts[-1].start
                end = part_end
        if end == lookup.start:
            return None
        return StoredPrefix(
            start=lookup.start,
            end=end,
            home=lookup.home,
            parts=tuple(parts),
            leases={h: tuple(lease.lease_id for lease in of.values()) for h, of in leases.items()},
            tokens_by_tier=dict(tiers),
            find_s=find_s,
            stage_s=stage_s,
        )

    async def _call(self, host: str, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a store; None where it is gone or too slow, and for a while after."""
        if time.perf_counter() < self._asked_again_s.get(host, 0.0):
            return None
        try:
            return await self._stores[host].call(method, *args, timeout_s=timeout_s)
        except Exception:  # whatever it is, the cluster goes on without that store
            self._asked_again_s[host] = time.perf_counter() + PAUSE_S
            return None


def cover_block(
    found: Sequence[tuple[str, Found]], host: str, block_tokens: int
) -> list[Source] | None:
    """Return sources that cover a block for ``host``, the nearest ones; None if there is a gap."""
    sources: list[Source] = []
    position = 0
    while position < block_tokens:
        here = [(of, each) for of, each in found if each.piece.start <= position < each.piece.end]
        if not here:
            return None
        of, best = min(here, key=lambda pair: (_distance(host, *pair), -pair[1].piece.end))
        tier: Tier = best.tier if of == host else "remote"
        sources.append(Source(best.piece, position, best.piece.end, of, tier, best.size_bytes))
        position = best.piece.end
    return sources


def _distance(host: str, of: str, found: Found) -> int:
    """Own memory, another host's memory, own disk, another host's disk."""
    return 2 * (found.tier == "disk") + (of != host)
