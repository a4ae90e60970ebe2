"""Steps of several sequences with cached rows, drawn at random, and what comes of them.

What a rank holds of earlier tokens, where its pages lie and how long the sequences
are differs from step to step. The oracle is attention by its definition, in float64.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention import PagedRows, Ring, RingAttention, RingSequence, ThreadRanks, Zigzag
from attention.paged import pages_shape, store_rows
from attention.ring import PendingExchange
from attention.timing import PartTimer
from tests.reference import TOLERANCES, causal_mask, random_qkv, softmax_attention

PAGE, D = 4, 16
CPU = torch.device("cpu")
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class StepSequence:
    """A whole sequence: cached tokens, each on a rank drawn at random, then new ones."""

    num_new: int
    first_rank: int
    rank_of_cached: tuple[int, ...]

    def on_ring(self, num_ranks: int) -> RingSequence:
        held = tuple(map(self.rank_of_cached.count, range(num_ranks)))
        zigzag = Zigzag(
            num_tokens=self.num_new,
            num_ranks=num_ranks,
            start=len(self.rank_of_cached),
            first_rank=self.first_rank,
        )
        return RingSequence(zigzag, held)


@dataclass(frozen=True)
class Step:
    """Several sequences, and how they lie in memory."""

    sequences: tuple[StepSequence, ...]
    heads: tuple[int, int] = (4, 2)  # of queries, of keys
    neighbours: bool = False
    piece_rows: int = 1000
    dtype: torch.dtype = torch.float32

    def qkv(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all of a sequence's tokens."""
        sequence = self.sequences[index]
        length = len(sequence.rank_of_cached) + sequence.num_new
        heads, kv_heads = self.heads
        return random_qkv(
            length,
            length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=D,
            dtype=self.dtype,
            seed=index,
        )

    def expected(self, index: int) -> Tensor:
        """Return the new tokens' output in float64."""
        q, k, v = self.qkv(index)
        first = len(self.sequences[index].rank_of_cached)
        return softmax_attention(q[first:], k, v, causal_mask(len(q))[first:])[0]

    def cached(self, rank: int) -> list[PagedRows]:
        """Return a rank's earlier rows; whatever no row was written to is nan."""
        places = list(range(40))
        if not self.neighbours:
            random.Random(rank).shuffle(places)
        _, kv_heads = self.heads
        shape = pages_shape(CPU, num_pages=40, page_tokens=PAGE, num_kv_heads=kv_heads, head_dim=D)
        pages = torch.full((2, *shape), torch.nan, dtype=self.dtype)
        rows = []
        for index, sequence in enumerate(self.sequences):
            mine = [i for i, holder in enumerate(sequence.rank_of_cached) if holder == rank]
            page_ids = [places.pop(0) for _ in range(-(-len(mine) // PAGE))]
            for of_what, source in zip(pages, self.qkv(index)[1:], strict=True):
                store_rows(of_what, page_ids, 0, source[mine])
            rows.append(PagedRows(pages[0], pages[1], page_ids, len(mine)))
        return rows

    def share(self, ring: Ring) -> tuple[list[RingSequence], Tensor, Tensor]:
        """Return the step as a rank knows it, with its new queries, and keys and values."""
        sequences = [sequence.on_ring(ring.size) for sequence in self.sequences]
        queries, kvs = [], []
        for index, sequence in enumerate(sequences):
            own = sequence.zigzag.positions(ring.rank)
            q, k, v = self.qkv(index)
            queries.append(q[own])
            kvs.append(torch.cat([k, v], dim=1)[own])
        return sequences, torch.cat(queries), torch.cat(kvs)

    def run(self, algorithm: type[RingAttention], ring: Ring) -> tuple[Tensor, Tensor]:
        """Return a rank's output of two layers that are alike."""
        sequences, q_THD, kv_TJD = self.share(ring)
        attend = algorithm(
            sequences,
            ring,
            PartTimer(CPU),
            piece_bytes=self.piece_rows * 2 * self.heads[1] * D * q_THD.element_size(),
        )
        cached = self.cached(ring.rank)
        return attend(q_THD, kv_TJD, cached), attend(q_THD, kv_TJD, cached)

    def check(self, algorithm: type[RingAttention], ranks: ThreadRanks) -> None:
        """Assert that every row of every rank is right, and the same in each layer."""
        results = ranks.run(lambda ring: self.run(algorithm, ring))
        shares = [
            [sequence.on_ring(len(results)).zigzag.indices(rank) for sequence in self.sequences]
            for rank in range(len(results))
        ]
        for (out, again), indices in zip(results, shares, strict=True):
            assert out.dtype is torch.float32
            assert torch.equal(out, again)
            parts = out.split([len(rows) for rows in indices])
            for index, (part, rows) in enumerate(zip(parts, indices, strict=True)):
                tolerances = EXACT if self.dtype is torch.float32 else TOLERANCES[self.dtype]
                expected = self.expected(index)[rows]
                torch.testing.assert_close(part.double(), expected, **tolerances)


def steps(num_ranks: int) -> st.SearchStrategy[Step]:
    """Any step: also sequences of one token, fewer than 2N, and none cached at all."""
    rank = st.integers(0, num_ranks - 1)
    uneven = st.lists(rank, max_size=30) | st.integers(0, 25).map(lambda n: [0] * n)
    sequence = st.builds(
        StepSequence, num_new=st.integers(1, 18), first_rank=rank, rank_of_cached=uneven.map(tuple)
    )
    return st.builds(
        Step,
        sequences=st.lists(sequence, min_size=1, max_size=3).map(tuple),
        heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
        neighbours=st.booleans(),
        piece_rows=st.sampled_from([1, 3, 8, 1000]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    )


class WatchedRing:
    """A ring that keeps what is sent, and how many exchanges are under way."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.rank = ring.rank
        self.size = ring.size
        self.sent: list[tuple[int, int]] = []  # bytes, hops
        self.under_way = 0

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        self.sent.append((outgoing.nbytes, hops))
        self.under_way += 1
        return _Watched(self._ring.exchange(outgoing, incoming, hops), self)

    def all_gather(self, part: Tensor) -> Tensor:
        raise AssertionError("attention over the ring gathers nothing")


class _Watched:
    def __init__(self, pending: PendingExchange, ring: WatchedRing) -> None:
        self._pending = pending
        self._ring = ring

    def wait(self) -> None:
        self._pending.wait()
        self._ring.under_way -= 1


class WatchingTimer(PartTimer):
    """A timer that keeps how many exchanges are under way whenever attention is computed."""

    def __init__(self, ring: WatchedRing) -> None:
        super().__init__(CPU)
        self._ring = ring
        self.under_way: list[int] = []

    def __call__(self, part: str) -> PartTimer:
        if part == "attention":
            self.under_way.append(self._ring.under_way)
        return super().__call__(part)
