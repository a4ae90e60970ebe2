"""A rank's view of its host's store: calls that may fail, after which there is no store."""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from actors.kv.messages import Lease
from actors.kv.pieces import PieceId


class Store(Protocol):
    """What a rank asks of `actors.kv.store.KVStore`."""

    def reserve(
        self, tenant: bytes, owner: str, wanted: list[tuple[PieceId, int]]
    ) -> list[Lease | None]:
        """Return leases to write, None where a piece is there or finds no room."""

    def commit(self, done: list[tuple[int, bytes]]) -> None:
        """Say that records are written, with their seals."""

    def abort(self, lease_ids: Sequence[int]) -> None:
        """Give leases back unwritten."""

    def drop(self, pieces: Sequence[PieceId]) -> None:
        """Say that pieces are damaged."""


class StoreLost(Exception):
    """The store did not answer: it is not asked again."""


class StoreClient:
    """Calls a store until it is lost. Thread-safe as far as the store is."""

    def __init__(self, store: Store) -> None:
        """Take the store itself, or what reaches it."""
        self._store = store
        self._lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether a call failed."""
        return self._lost.is_set()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method.

        Raises:
            StoreLost: The store is gone, or does not answer.
        """
        if self._lost.is_set():
            raise StoreLost
        try:
            return getattr(self._store, method)(*args)
        except Exception as error:
            self._lost.set()
            raise StoreLost from error
