"""A rank's part in the KV store: its host's arena, what it writes there and what it reads."""

import logging

import torch

from actors.kv.activations import ActivationCapture
from actors.kv.arena import Arena
from actors.kv.client import Store, StoreClient
from actors.kv.link import open_link
from actors.kv.loader import BlockLoader
from actors.kv.messages import StoreInfo
from actors.kv.pieces import Layout
from actors.kv.writer import BlockWriter
from models.decoder import Decoder
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
        decoder: Decoder | None = None,
        link_bytes_per_s: float | None = None,
    ) -> None:
        """Map the arena; on CUDA have it pinned, so that copies run beside computation.

        ``decoder`` makes KV of activations. ``link_bytes_per_s`` slows the way out of the
        arena down; None: it is as fast as it goes.
        """
        arena = Arena.attach(info.arena_path)
        if pool.device.type == "cuda":
            _pin(arena)
        client = StoreClient(store)
        self.writer = BlockWriter(
            pool, arena, layout, client, owner=f"rank-{rank}", encoding=encoding
        )
        self.link = open_link(arena, link_bytes_per_s)
        self.loader = BlockLoader(
            pool, arena, layout, client, rank, decoder=decoder, link=self.link
        )
        pool.before_write = self.writer.wait_for
        self.arena, self.client, self.layout, self.encoding = arena, client, layout, encoding
        self._pool = pool

    @property
    def capture(self) -> ActivationCapture | None:
        """Who takes the inputs of layers that are stored; None: KV is stored."""
        return self.writer.capture

    def keep_activations(self, share: float, *, keeps_both: bool) -> None:
        """Store a share of the blocks from now on as activations, or beside KV where both."""
        capture = None
        if share > 0.0:
            capture = ActivationCapture(
                num_layers=self.layout.num_layers,
                hidden_size=self.layout.hidden_size,
                dtype=self._pool.dtype,
                device=self._pool.device,
                block_tokens=self.layout.block_tokens,
                share=share,
            )
        self.writer.keep_activations(capture, keeps_both=keeps_both)

    def close(self) -> None:
        """End the threads, and let go of the arena. No restore may be under way."""
        self.writer.close()
        self.link.close()
        if self._pool.device.type == "cuda":
            torch.cuda.cudart().cudaHostUnregister(_address(self.arena))
        self.arena.close()


def _address(arena: Arena) -> int:
    return torch.frombuffer(arena.buffer, dtype=torch.uint8).data_ptr()


def _pin(arena: Arena) -> None:
    size_bytes = len(arena.buffer)
    status = torch.cuda.cudart().cudaHostRegister(_address(arena), size_bytes, _PORTABLE)
    if int(status) != 0:
        _log.warning(
            "the arena of %d bytes cannot be pinned (CUDA error %d): copies are slower; raise the"
            " memlock limit, or lower kv_store.host_memory_bytes",
            size_bytes,
            int(status),
        )
