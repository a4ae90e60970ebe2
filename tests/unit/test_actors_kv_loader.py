"""A restore writes its own rows and no others, as long as it is wanted and no longer."""

import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from actors.kv import projection
from actors.kv.arena import Arena
from actors.kv.link import Link
from actors.kv.loader import BlockLoader
from actors.kv.messages import Lease, RestorePart
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import ACTIVATIONS, RAW, Layout, PieceId, checksum, write_header
from models.config import read_model_config
from models.decoder import Decoder
from models.page_pool import PagePool
from models.weights import load_weights
from tests.checkpoints import write_llama_checkpoint

CPU = torch.device("cpu")
BLOCK, PAGE, BOUND_S = 16, 8, 20.0
UNTOUCHED = 77.0


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), num_key_value_heads=4, num_hidden_layers=3
    )
    config = read_model_config(directory)
    return Decoder(config, load_weights(directory, config, device=CPU, dtype=torch.float32))


class Stored:
    """Random inputs of a sequence of tokens, pieces of them in an arena, and pages for their KV."""

    def __init__(self, decoder: Decoder, arena: Arena, num_tokens: int = 5 * BLOCK) -> None:
        config = decoder.config
        self.decoder, self.arena = decoder, arena
        self.layout = Layout(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype="float32",
            block_tokens=BLOCK,
        )
        self.pool = PagePool(
            num_layers=config.num_layers,
            num_pages=64,
            page_tokens=PAGE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self.pool._pages.fill_(UNTOUCHED)
        rng = torch.Generator().manual_seed(0)
        self.inputs_LTE = torch.randn(
            config.num_layers, num_tokens, config.hidden_size, generator=rng
        )
        cos_sin = decoder.rotations(torch.arange(num_tokens))
        self.kv_L2KTD = torch.stack(
            [
                decoder.project_inputs(layer, inputs_TE, cos_sin)
                .unflatten(1, (2, -1))
                .permute(1, 2, 0, 3)
                for layer, inputs_TE in enumerate(self.inputs_LTE)
            ]
        )
        self._used_bytes = 0

    def part(
        self, start: int, end: int, encoding: str = RAW, *, skip: int = 0, rank: int = 0
    ) -> RestorePart:
        """Write a piece of these positions; the part leaves out its first rows."""
        block_start = start // BLOCK * BLOCK
        piece = PieceId(
            bytes([start // BLOCK]) * 32, start - block_start, end - block_start, encoding
        )
        where = record_of(piece, self.layout)
        record = self.arena.view(self._used_bytes, where.size_bytes)
        sums = []
        for layer in range(self.layout.num_layers):
            values = self.kv_L2KTD[layer, :, :, start:end]
            if encoding == ACTIVATIONS:
                values = self.inputs_LTE[layer, start:end]
            data = where.layer(record, layer)
            torch.frombuffer(data, dtype=torch.float32).copy_(values.flatten())
            sums.append(checksum(data))
        lease = Lease(
            lease_id=self._used_bytes,
            piece=piece,
            offset_bytes=self._used_bytes,
            size_bytes=where.size_bytes,
            seal=write_header(record, piece, self.layout, where, sums),
        )
        self._used_bytes += -(-where.size_bytes // 64) * 64
        return RestorePart(
            rank=rank,
            start=start + skip,
            end=end,
            block_start=block_start,
            lease=lease,
            tier="host",
        )

    def loader(self, link: Link | None = None) -> BlockLoader:
        return BlockLoader(
            self.pool, self.arena, self.layout, None, 0, decoder=self.decoder, link=link
        )

    def grow(self, sequence_id: int, parts: Sequence[RestorePart]) -> None:
        spans = [(part.start, part.end - part.start) for part in parts if part.rank == 0]
        self.pool.table.grow(sequence_id, spans)

    def rows(self, layer: int, sequence_id: int) -> Tensor:
        """Return what lies in the pages of a sequence, ``kv_2KSD``."""
        run = self.pool.table.run(sequence_id)
        out_2KSD = torch.empty(
            2, self.layout.num_kv_heads, run.num_rows, self.layout.head_dim, dtype=torch.float32
        )
        spans = self.pool.spans(run.page_ids, 0, run.num_rows)
        self.pool.read_rows(layer, spans, out_2KSD)
        return out_2KSD

    def assert_restored(self, layer: int, sequence_id: int, parts: Sequence[RestorePart]) -> None:
        positions = [p for part in parts if part.rank == 0 for p in range(part.start, part.end)]
        torch.testing.assert_close(
            self.rows(layer, sequence_id),
            self.kv_L2KTD[layer][:, :, positions],
            rtol=1e-5,
            atol=1e-5,
        )

    def assert_untouched(self, layer: int, sequence_id: int) -> None:
        assert (self.rows(layer, sequence_id) == UNTOUCHED).all()


@pytest.fixture
def stored(decoder: Decoder) -> Iterator[Stored]:
    arena = Arena.create(f"test{uuid.uuid4().hex[:12]}", "host", 1 << 22)
    yield Stored(decoder, arena)
    arena.close()


class GatedLink:
    """Gives as many ranges as it is told to, in memory that the next one overwrites."""

    bytes_per_s = None
    is_simulated = True
    busy_s = 0.0
    moved_bytes = 0

    def __init__(self, arena: Arena, fails_after: int | None = None) -> None:
        self._arena = arena
        self._gate = threading.Semaphore(0)
        self._fails_after = fails_after
        self.asked = threading.Semaphore(0)  # once for each range that was asked for

    def let_through(self, count: int) -> None:
        self._gate.release(count)

    def close(self) -> None:
        pass

    def fetch(
        self, ranges: Iterable[tuple[int, int]], patience_s: float = BOUND_S
    ) -> Iterator[memoryview]:
        landing = bytearray(1 << 20)
        for number, (offset_bytes, size_bytes) in enumerate(ranges):
            self.asked.release()
            if number == self._fails_after:
                raise ConnectionError("the link is gone")
            assert self._gate.acquire(timeout=BOUND_S)
            landing[:size_bytes] = self._arena.view(offset_bytes, size_bytes)
            with memoryview(landing) as whole, whole[:size_bytes] as view:
                yield view
            landing[:] = b"\xff" * len(landing)


def mixed_parts(stored: Stored) -> list[RestorePart]:
    """Pieces of both kinds in any order; blocks cut by ranks, the last by the prompt's end."""
    return [
        stored.part(0, 16),
        stored.part(16, 20, ACTIVATIONS),
        stored.part(20, 32, ACTIVATIONS),
        stored.part(32, 39),
        stored.part(39, 48, ACTIVATIONS),
        stored.part(48, 64, ACTIVATIONS, skip=5),
        stored.part(64, 80),
    ]


@pytest.mark.parametrize("project_tokens", [1, 10, 16, 1000])
def test_pieces_of_both_kinds_come_where_they_belong(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, project_tokens: int
) -> None:
    """Alone or several in one product; beside rows of others, which stay."""
    monkeypatch.setitem(projection.PROJECT_TOKENS, "cpu", project_tokens)
    parts = mixed_parts(stored)
    stored.pool.table.grow(9, [(0, 5)])
    stored.grow(1, parts)
    stored.pool.table.grow(9, [(5, 5)])

    restoring = stored.loader().begin(1, parts)
    stored.pool.table.grow(1, [(80, 30)])  # it goes on beside the restore
    damaged, times = restoring.finish()

    assert damaged is None
    assert (times.kv_tokens, times.activation_tokens) == (16 + 7 + 16, 16 + 9 + 11)
    assert times.link_bytes == 3 * 4 * (39 * 128 + 41 * 64)
    stored.assert_untouched(0, 9)
    stored.pool.table.truncate(1, 80)
    for layer in range(3):
        stored.assert_restored(layer, 1, parts)


def test_a_layer_is_there_before_the_next_ones(stored: Stored) -> None:
    """The step computes it while they come."""
    parts = mixed_parts(stored)
    stored.grow(1, parts)
    link = GatedLink(stored.arena)
    restoring = stored.loader(link).begin(1, parts, patience_s=BOUND_S)
    for layer in range(3):
        link.let_through(len(parts))

        restoring.wait(layer)

        stored.assert_restored(layer, 1, parts)
        if layer < 2:
            stored.assert_untouched(layer + 1, 1)
    assert restoring.finish()[0] is None


def test_restores_of_two_sequences_do_not_meet(stored: Stored) -> None:
    """One waits for its link while the other one comes and is used."""
    parts = mixed_parts(stored)
    gate = GatedLink(stored.arena)
    stored.grow(1, parts)
    slow = stored.loader(gate).begin(1, parts, patience_s=BOUND_S)
    gate.let_through(9)
    stored.grow(2, parts)

    assert stored.loader().begin(2, parts).finish()[0] is None
    stored.assert_restored(2, 2, parts)
    gate.let_through(100)
    assert slow.finish()[0] is None

    for sequence_id in (1, 2):
        for layer in range(3):
            stored.assert_restored(layer, sequence_id, parts)


def test_what_does_not_come_counts_as_damaged(stored: Stored) -> None:
    """The step goes on with zeros, and what comes later is written nowhere: others have it."""
    parts = mixed_parts(stored)
    stored.grow(1, parts)
    link = GatedLink(stored.arena)
    link.let_through(len(parts) + 2)  # two of activations, which go first
    restoring = stored.loader(link).begin(1, parts, patience_s=BOUND_S)
    restoring.wait(0)
    for _ in range(len(parts) + 3):
        assert link.asked.acquire(timeout=BOUND_S)
    restoring._patience_s = 0.0

    restoring.wait(1)
    damaged, times = restoring.finish()

    assert damaged == 0
    assert (times.kv_tokens, times.activation_tokens) == (0, 0)
    stored.assert_restored(0, 1, parts)
    assert not stored.rows(2, 1).any()
    stored.pool._pages.fill_(UNTOUCHED)
    link.let_through(100)
    restoring._thread.join(BOUND_S)
    assert not restoring._thread.is_alive()
    for layer in range(3):
        stored.assert_untouched(layer, 1)


def test_a_link_that_is_silent_is_not_looked_at_for_ever(stored: Stored) -> None:
    """Who waits until all is there, beside other work, goes on: then `wait` gives up."""
    parts = mixed_parts(stored)
    stored.grow(1, parts)
    link = GatedLink(stored.arena)
    restoring = stored.loader(link).begin(1, parts, patience_s=BOUND_S)
    link.let_through(len(parts))
    restoring.wait(0)
    assert restoring.share == pytest.approx(1 / 3)

    restoring._patience_s = 0.0
    assert restoring.share == 1.0
    assert restoring.finish()[0] == min(part.start for part in parts)
    link.let_through(100)


def test_an_aborted_restore_writes_no_more(stored: Stored) -> None:
    """Its pages are given away with the sequence."""
    parts = mixed_parts(stored)
    stored.grow(1, parts)
    link = GatedLink(stored.arena)
    restoring = stored.loader(link).begin(1, parts, patience_s=BOUND_S)
    link.let_through(4)
    for _ in range(5):
        assert link.asked.acquire(timeout=BOUND_S)

    restoring.abort()

    stored.pool._pages.fill_(UNTOUCHED)
    link.let_through(100)
    restoring._thread.join(BOUND_S)
    assert not restoring._thread.is_alive()
    for layer in range(3):
        stored.assert_untouched(layer, 1)


@pytest.mark.parametrize("fails_after", [0, 3, 7, 20])
def test_a_link_that_is_lost_costs_what_is_missing(stored: Stored, fails_after: int) -> None:
    """Nobody waits for it for ever, and layers that were there are right."""
    parts = mixed_parts(stored)
    stored.grow(1, parts)
    link = GatedLink(stored.arena, fails_after)
    link.let_through(100)
    restoring = stored.loader(link).begin(1, parts, patience_s=BOUND_S)
    for layer in range(3):
        restoring.wait(layer)
        if layer < fails_after // len(parts):
            stored.assert_restored(layer, 1, parts)
    damaged, _ = restoring.finish()

    # Of the last layer all but the last piece, which goes last, may be there.
    assert damaged == (64 if fails_after == 20 else 0)
    assert stored.rows(2, 1).isfinite().all()
    assert not (stored.rows(2, 1) == UNTOUCHED).any()


@pytest.mark.parametrize("encoding", [RAW, ACTIVATIONS])
@pytest.mark.parametrize("where", ["header", 0, 2])
def test_a_damaged_piece_costs_itself(stored: Stored, encoding: str, where: int | str) -> None:
    """It is told where it begins; all others are right."""
    parts = [stored.part(0, 16), stored.part(16, 32, encoding, skip=3), stored.part(32, 48)]
    stored.grow(1, parts)
    lease = parts[1].lease
    record = record_of(lease.piece, stored.layout)
    at = 9
    if isinstance(where, int):
        at = record.payload_offset + where * record.layer_bytes + 9
    stored.arena.view(lease.offset_bytes, lease.size_bytes)[at] ^= 1

    damaged, times = stored.loader().begin(1, parts).finish()

    assert damaged == 19
    assert times.kv_tokens + times.activation_tokens == 32
    rows_2KSD = stored.rows(2, 1)
    good = [*range(16), *range(32, 48)]
    assert rows_2KSD.isfinite().all()
    assert not (rows_2KSD == UNTOUCHED).any()
    torch.testing.assert_close(
        rows_2KSD[:, :, [*range(16), *range(29, 45)]],
        stored.kv_L2KTD[2][:, :, good],
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_rank_without_parts_has_nothing_to_wait_for(stored: Stored) -> None:
    """All of it is another rank's."""
    restoring = stored.loader(GatedLink(stored.arena)).begin(1, [stored.part(0, 16, rank=1)])

    restoring.wait(2)
    damaged, times = restoring.finish()

    assert damaged is None
    assert (times.kv_tokens, times.link_bytes, times.link_s, times.total_s) == (0, 0, 0.0, 0.0)
    restoring.abort()


def test_keys_and_values_need_no_decoder(stored: Stored) -> None:
    """The benchmark of the tiers has none."""
    parts = [stored.part(0, 16), stored.part(16, 32)]
    stored.grow(1, parts)
    loader = BlockLoader(stored.pool, stored.arena, stored.layout, None, 0)

    assert loader.begin(1, parts).finish()[0] is None
    stored.assert_restored(1, 1, parts)
