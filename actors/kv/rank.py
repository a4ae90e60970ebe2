"""A rank's part in the KV store: its host's arena, what it writes there and what it reads."""

import logging

import torch

from actors.kv.arena import Arena
from actors.kv.client import Store, StoreClient
from actors.kv.loader import BlockLoader
from actors.kv.messages import StoreInfo
from actors.kv.pieces import Layout
from actors.kv.writer import BlockWriter
from models.kv_codec import Encoding
from models.page_pool import PagePool

_PORTABLE = 1  # cudaHostRegisterPortable

_log = logging.getLogger(__name__)


class RankStore:
    """One rank's writer and loader over its host's arena."""

    def __init__(
        self,
        pool: PagePool,
        store: Store,
        info: StoreInfo,
        layout: Layout,
        *,
        rank: int,
        encoding: Encoding,
    ) -> None:
        """Map the arena; on CUDA have it pinned, so that copies run beside computation."""
        arena = Arena.attach(info.arena_path)
        if pool.device.type == "cuda":
            _pin(arena)
        client = StoreClient(store)
        self.writer = BlockWriter(
            pool, arena, layout, client, owner=f"rank-{rank}", encoding=encoding
        )
        self.loader = BlockLoader(pool, arena, layout, client, rank)
        pool.before_write = self.writer.wait_for


def _pin(arena: Arena) -> None:
    memory = torch.frombuffer(arena.buffer, dtype=torch.uint8)
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
    if int(status) != 0:
        _log.warning(
            "the arena of %d bytes cannot be pinned (CUDA error %d): copies are slower; raise the"
            " memlock limit, or lower kv_store.host_memory_bytes",
            memory.numel(),
            int(status),
        )
