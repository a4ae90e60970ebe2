"""What goes to the KV stores and what comes back: the scheduler's part. No Ray, no clock.

Blocks that are complete are noted and go with the next plan, for the ranks to write
behind it. A prompt whose beginning is not on the ranks is looked up before it begins:
whoever drives the scheduler takes the lookups, asks the stores, and reports what they
have. Prefixes that are not needed any more are given back.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.kv.messages import (
    RestoreOrder,
    RestorePart,
    StoreBlocks,
    StoredPrefix,
    parts_behind,
)
from actors.messages import TokenIds
from actors.running import Entry, Running

# What a restore may take before it counts as lost: so much, and so many times what was predicted.
LEAST_PATIENCE_S, LATE = 5.0, 4.0
PATIENCE_S = 120.0  # where nothing was predicted


class BlockKeys(Protocol):
    """Keys of blocks, by which stores know them."""

    block_tokens: int

    def keys(self, salt: str, token_ids: TokenIds, known: Sequence[bytes]) -> list[bytes]:
        """Return the keys of all full blocks, of which the first ones are known."""

    def tenant(self, salt: str) -> bytes:
        """Return the tag under which a tenant's blocks are counted."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A prompt of which the stores may have more than the ranks."""

    entry: Entry
    tokens: int  # that are wanted at most
    start: int  # those before it are on the ranks, or begin the block of one that is not
    home: int | None
    keys: tuple[bytes, ...]  # of the blocks from ``start`` on
    tenant: bytes


class Offload:
    """What is to be stored, looked up and given back. Not thread-safe."""

    def __init__(self, keys: BlockKeys, restore_min_tokens: int) -> None:
        """Begin with nothing; prefixes of fewer than ``restore_min_tokens`` are not looked up."""
        self._keys = keys
        self._restore_min_tokens = restore_min_tokens
        self._stores: list[StoreBlocks] = []
        self._lookups: list[Lookup] = []
        self._returned: list[StoredPrefix] = []
        self._orders: list[RestoreOrder] = []

    def note(self, running: Running, accepted: TokenIds) -> None:
        """Have those blocks stored that are complete with the accepted tokens."""
        first, block_tokens = running.stored_blocks, self._keys.block_tokens
        last = len(accepted) // block_tokens
        if last <= first:
            return
        keys = self._keys_of(running.entry, accepted)
        running.stored_blocks = last
        self._stores.append(
            StoreBlocks(
                sequence_id=running.sequence_id,
                first_block=first,
                keys=tuple(keys[first:last]),
                tenant=self._keys.tenant(running.generation.cache_salt),
            )
        )

    def wants(self, entry: Entry, context: TokenIds, matched: int) -> bool:
        """Return whether a prompt is to be looked up before it begins."""
        return (
            not entry.was_looked_up
            and entry.coming is None
            and entry.shares
            and entry.generation.prompt_logprobs is None
            and len(context) - 1 - matched >= self._restore_min_tokens
        )

    def ask(self, entry: Entry, context: TokenIds, matched: int, home: int | None) -> None:
        """Look up a prompt of which so many tokens are on the ranks."""
        block_tokens = self._keys.block_tokens
        first = matched // block_tokens
        entry.was_looked_up = True
        self._lookups.append(
            Lookup(
                entry=entry,
                tokens=len(context) - 1,
                start=first * block_tokens,
                home=home,
                keys=tuple(self._keys_of(entry, context)[first:]),
                tenant=self._keys.tenant(entry.generation.cache_salt),
            )
        )

    def _keys_of(self, entry: Entry, token_ids: TokenIds) -> list[bytes]:
        """Return the keys of an answer's first blocks, of these tokens at least."""
        if len(entry.keys) < len(token_ids) // self._keys.block_tokens:
            entry.keys = self._keys.keys(entry.generation.cache_salt, token_ids, entry.keys)
        return entry.keys

    def order(
        self, sequence_id: int, stored: StoredPrefix, computed: int
    ) -> tuple[RestorePart, ...]:
        """Have what lies behind ``computed`` of a prefix brought to the ranks; return its parts."""
        parts = parts_behind(stored, computed)
        predicted_s = stored.choice.predicted_s
        patience_s = PATIENCE_S if predicted_s is None else LEAST_PATIENCE_S + LATE * predicted_s
        self._orders.append(
            RestoreOrder(sequence_id=sequence_id, parts=parts, patience_s=patience_s)
        )
        return parts

    def give_back(self, stored: StoredPrefix | None) -> None:
        """Need a prefix no more."""
        if stored is not None:
            self._returned.append(stored)

    def take_stores(self) -> tuple[StoreBlocks, ...]:
        """Return what is to be stored since the last call."""
        stores, self._stores = tuple(self._stores), []
        return stores

    def take_orders(self, running: Container[int]) -> tuple[RestoreOrder, ...]:
        """Return what is to be brought to the ranks, of sequences that run still."""
        orders, self._orders = self._orders, []
        return tuple(order for order in orders if order.sequence_id in running)

    @property
    def has_news(self) -> bool:
        """Whether the ranks are to be told of anything to store or to bring back."""
        return bool(self._stores or self._orders)

    def take_lookups(self) -> list[Lookup]:
        """Return what is to be looked up since the last call."""
        lookups, self._lookups = self._lookups, []
        return lookups

    def take_returned(self) -> list[StoredPrefix]:
        """Return the prefixes that were given back since the last call."""
        returned, self._returned = self._returned, []
        return returned
