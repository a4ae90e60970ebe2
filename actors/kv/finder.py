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
    RestoreChoice,
    RestorePart,
    StoredPrefix,
    Tier,
    Wanted,
    rank_of_block,
)
from actors.kv.pieces import ACTIVATIONS, PieceId
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


@dataclass(frozen=True)
class Block:
    """A block that the stores have whole, and the pieces that they have of it."""

    start: int  # position of its first token
    rank: int  # that is to hold it
    host: str  # of this rank
    sources: tuple[Source, ...]  # that cover it, by KV where it is there
    inputs: tuple[Source, ...]  # that cover it, by saved layer inputs where these are there

    @property
    def has_both(self) -> bool:
        """Whether there is a choice."""
        return self.sources != self.inputs


@dataclass(frozen=True)
class StoredBlocks:
    """What the stores have of a prompt, without a gap from its start on."""

    lookup: Lookup
    blocks: tuple[Block, ...]
    find_s: float

    @property
    def is_far(self) -> bool:
        """Whether any of it must be brought from a disk or another host."""
        return any(source.tier != "host" for block in self.blocks for source in block.sources)

    @property
    def end(self) -> int:
        """The position behind what is wanted of the last block."""
        last = self.blocks[-1]
        return min(self.lookup.tokens, last.start + last.sources[-1].end)


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

    async def find(self, lookup: Lookup) -> StoredBlocks | None:
        """Return what the stores have of a prompt's blocks, None if that is not even the first."""
        start_s = time.perf_counter()
        keys = list(lookup.keys)
        answers = await asyncio.gather(
            *(self._call(host, "find", keys, timeout_s=self._timeout_s) for host in self._stores)
        )
        found = {host: answer or [] for host, answer in zip(self._stores, answers, strict=True)}
        blocks = self._whole_blocks(lookup, found)
        if not blocks:
            return None
        return StoredBlocks(lookup, tuple(blocks), time.perf_counter() - start_s)

    async def stage(self, stored: StoredBlocks, choice: RestoreChoice) -> StoredPrefix | None:
        """Have what is not recomputed brought into the arenas of the ranks that need it, leased.

        What cannot be had ends the prefix there; None where nothing is left of it.
        """
        begin_s = time.perf_counter()
        blocks = [
            (block, self._sources(block, choice))
            for block in stored.blocks
            if block.start >= choice.recompute_to
        ]
        leases = await self._lease(stored.lookup, blocks)
        prefix = self._prefix(stored, choice, blocks, leases, begin_s)
        if prefix is not None:
            return prefix
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

    def _whole_blocks(self, lookup: Lookup, found: Mapping[str, Sequence[Found]]) -> list[Block]:
        """Return the first blocks, up to one that is not whole."""
        by_key: dict[bytes, list[tuple[str, Found]]] = {}
        for host, of_host in found.items():
            for each in of_host:
                by_key.setdefault(each.piece.key, []).append((host, each))
        blocks = []
        for index, key in enumerate(lookup.keys):
            start = lookup.start + index * self._block_tokens
            rank = rank_of_block(start // self._block_tokens, lookup.home, len(self._rank_hosts))
            host = self._rank_hosts[rank]
            near = tuple(
                (of, each if of == host else self._travelling(each))
                for of, each in by_key.get(key, ())
            )
            sources = cover_block(near, host, self._block_tokens)
            inputs = cover_block(near, host, self._block_tokens, prefers_activations=True)
            if sources is None or inputs is None:
                break
            blocks.append(Block(start, rank, host, tuple(sources), tuple(inputs)))
        return blocks

    def _sources(self, block: Block, choice: RestoreChoice) -> Sequence[Source]:
        takes_inputs = block.start // self._block_tokens in choice.takes_activations
        return block.inputs if takes_inputs else block.sources

    async def _lease(
        self, lookup: Lookup, blocks: Sequence[tuple[Block, Sequence[Source]]]
    ) -> dict[str, dict[PieceId, Lease]]:
        """Have pieces brought into the arenas of the hosts that need them; return their leases."""
        wanted: dict[str, dict[PieceId, Wanted]] = {}
        for block, sources in blocks:
            for source in sources:
                is_here = source.host == block.host
                wanted.setdefault(block.host, {})[source.piece] = Wanted(
                    piece=source.piece,
                    size_bytes=source.size_bytes,
                    flight_address=None if is_here else self._stores[source.host].flight_address,
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
        stored: StoredBlocks,
        choice: RestoreChoice,
        blocks: Sequence[tuple[Block, Sequence[Source]]],
        leases: Mapping[str, Mapping[PieceId, Lease]],
        begin_s: float,
    ) -> StoredPrefix | None:
        """Return what was staged without a gap, None if that is nothing."""
        lookup = stored.lookup
        parts: list[RestorePart] = []
        tiers: Counter[Tier] = Counter()
        for block, sources in blocks:
            if any(source.piece not in leases[block.host] for source in sources):
                break
            for source in sources:
                start = block.start + source.start
                end = min(block.start + source.end, lookup.tokens)
                if end <= start:
                    continue
                parts.append(
                    RestorePart(
                        rank=block.rank,
                        start=start,
                        end=end,
                        block_start=block.start,
                        lease=leases[block.host][source.piece],
                        tier=source.tier,
                    )
                )
                tiers[source.tier] += end - start
        if not parts:
            return None
        return StoredPrefix(
            start=parts[0].start,
            end=parts[-1].end,
            home=lookup.home,
            parts=tuple(parts),
            leases={h: tuple(lease.lease_id for lease in of.values()) for h, of in leases.items()},
            tokens_by_tier=dict(tiers),
            choice=choice,
            begin_s=begin_s,
            find_s=stored.find_s,
            stage_s=time.perf_counter() - begin_s,
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
    found: Sequence[tuple[str, Found]],
    host: str,
    block_tokens: int,
    *,
    prefers_activations: bool = False,
) -> list[Source] | None:
    """Return sources that cover a block for ``host``, the nearest ones; None if there is a gap.

    Of those that are as near, saved layer inputs come last, or first where they are preferred.
    """
    sources: list[Source] = []
    position = 0

    def rank(pair: tuple[str, Found]) -> tuple[int, bool, int]:
        of, each = pair
        is_preferred = (each.piece.encoding == ACTIVATIONS) == prefers_activations
        return _distance(host, of, each), not is_preferred, -each.piece.end

    while position < block_tokens:
        here = [pair for pair in found if pair[1].piece.start <= position < pair[1].piece.end]
        if not here:
            return None
        of, best = min(here, key=rank)
        tier: Tier = best.tier if of == host else "remote"
        sources.append(Source(best.piece, position, best.piece.end, of, tier, best.size_bytes))
        position = best.piece.end
    return sources


def _distance(host: str, of: str, found: Found) -> int:
    """Own memory, another host's memory, own disk, another host's disk."""
    return 2 * (found.tier == "disk") + (of != host)
