"""Both ring algorithms over several sequences with cached rows equal dense causal attention.

The steps are those of tests/ring_steps.py.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attention.paged
from attention import (
    PassKVAttention,
    PassQAttention,
    Ring,
    RingAttention,
    RingSequence,
    ThreadRanks,
    Zigzag,
)
from attention.ring_sequence import Slice, slices_between
from attention.timing import PartTimer
from tests.reference import causal_mask, softmax_attention
from tests.ring_steps import CPU, EXACT, Step, StepSequence, WatchedRing, WatchingTimer, steps

algorithms = pytest.mark.parametrize(
    "algorithm", [PassKVAttention, PassQAttention], ids=["pass_kv", "pass_q"]
)
of_rings = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    with ThreadRanks(request.param) as threads:
        yield threads


@algorithms
@of_rings
@given(data=st.data())
def test_ring_equals_dense_attention(
    ranks: ThreadRanks, algorithm: type[RingAttention], data: st.DataObject
) -> None:
    """Every new token sees all cached ones wherever they lie, and the new ones up to itself."""
    step = data.draw(steps(len(ranks.run(lambda ring: ring.rank))))

    step.check(algorithm, ranks)


RAGGED = Step(
    sequences=(
        StepSequence(13, 2, (0,) * 9 + (1,) * 21),
        StepSequence(1, 1, (2, 0, 0, 1)),
        StepSequence(40, 0, ()),
    ),
    piece_rows=7,
)


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[ThreadRanks]:
    with ThreadRanks(3) as threads:
        yield threads


@algorithms
def test_pages_read_in_blocks(
    three_ranks: ThreadRanks, algorithm: type[RingAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many queries read pages in another way than the few of the other tests."""
    monkeypatch.setattr(attention.paged, "_MANY_QUERY_ROWS", 0)
    monkeypatch.setattr(attention.paged, "_BLOCK_ROWS", 6)

    RAGGED.check(algorithm, three_ranks)


@algorithms
def test_same_bits_in_every_run(three_ranks: ThreadRanks, algorithm: type[RingAttention]) -> None:
    """The order of merges does not depend on what arrives first, nor on where pages lie."""
    apart, together = (
        Step(RAGGED.sequences, neighbours=neighbours, piece_rows=7) for neighbours in (False, True)
    )

    def outputs(step: Step) -> list[Tensor]:
        return three_ranks.run(lambda ring: step.run(algorithm, ring)[0])

    runs = [outputs(step) for step in (apart, apart, together)]

    for others in runs[1:]:
        for first, other in zip(runs[0], others, strict=True):
            assert torch.equal(first, other)


def test_cached_rows_travel_in_bounded_pieces(three_ranks: ThreadRanks) -> None:
    """A million cached tokens must not be one message; ranks with fewer rows send empty ones."""

    def messages(ring: Ring) -> list[tuple[int, int]]:
        watched = WatchedRing(ring)
        sequences, q_THD, kv_TJD = RAGGED.share(ring)
        attend = PassKVAttention(
            sequences, watched, PartTimer(CPU), piece_bytes=7 * kv_TJD[0].nbytes
        )
        attend(q_THD, kv_TJD, RAGGED.cached(ring.rank))
        assert watched.under_way == 0
        return [(size // kv_TJD[0].nbytes, hops) for size, hops in watched.sent]

    # Of cached rows rank 0 holds 11, rank 1 22 and rank 2 one: 2, 4 and 1 pieces of 7.
    pieces = {0: [7, 4, 0, 0], 1: [7, 7, 7, 1], 2: [1, 0, 0, 0]}
    sent = three_ranks.run(messages)
    for rank, of_rank in enumerate(sent):
        assert [hops for _, hops in of_rank] == [1] * 10
        for lap in range(4):
            own, previous = pieces[rank][lap], pieces[(rank - 1) % 3][lap]
            assert [rows for rows, _ in of_rank[2 + 2 * lap : 4 + 2 * lap]] == [own, previous]


def test_next_transfer_is_under_way_while_a_part_is_attended_to(three_ranks: ThreadRanks) -> None:
    """All but the last part of a layer is computed while something travels."""
    step = Step((StepSequence(12, 0, (0, 1, 2) * 14),))

    def under_way(ring: Ring) -> list[int]:
        watched = WatchedRing(ring)
        timer = WatchingTimer(watched)
        sequences, q_THD, kv_TJD = step.share(ring)
        attend = PassKVAttention(sequences, watched, timer, piece_bytes=7 * kv_TJD[0].nbytes)
        attend(q_THD, kv_TJD, step.cached(ring.rank))
        return timer.under_way

    # New shares and two pieces of each rank: three laps of three rounds.
    assert three_ranks.run(under_way) == [[1] * 8 + [0]] * 3


def test_partials_go_home_as_they_are_computed(three_ranks: ThreadRanks) -> None:
    """Queries take N - 1 hops forward, and each partial goes back as far as its queries came."""

    def messages(ring: Ring) -> list[int]:
        watched = WatchedRing(ring)
        sequences, q_THD, kv_TJD = RAGGED.share(ring)
        PassQAttention(sequences, watched, PartTimer(CPU))(q_THD, kv_TJD, RAGGED.cached(ring.rank))
        assert watched.under_way == 0
        return [hops for _, hops in watched.sent]

    assert three_ranks.run(messages) == [[1, 1, -1, -2]] * 3


@algorithms
@pytest.mark.parametrize("piece_rows", [1, 7, 1000])
def test_rounds_are_reported_as_often_as_promised(
    three_ranks: ThreadRanks, algorithm: type[RingAttention], piece_rows: int
) -> None:
    """Progress is a share of the rounds, which must be known before the first layer."""

    def count(ring: Ring) -> tuple[int, int]:
        calls = [0]

        def on_round() -> None:
            calls[0] += 1

        sequences, q_THD, kv_TJD = RAGGED.share(ring)
        piece_bytes = piece_rows * kv_TJD[0].nbytes
        attend = algorithm(
            sequences, ring, PartTimer(CPU), piece_bytes=piece_bytes, on_round=on_round
        )
        promised = attend.num_rounds
        attend(q_THD, kv_TJD, RAGGED.cached(ring.rank))
        return calls[0], promised

    for calls, promised in three_ranks.run(count):
        assert calls == promised


@algorithms
def test_scale_reaches_cached_and_new_keys(
    three_ranks: ThreadRanks, algorithm: type[RingAttention]
) -> None:
    """Some models scale by another number than D ** -0.5."""
    step = Step((StepSequence(9, 1, (0, 1, 1, 2, 0)),), piece_rows=1)
    q, k, v = step.qkv(0)
    expected, _ = softmax_attention(q[5:], k, v, causal_mask(14)[5:], 0.7)

    def check(ring: Ring) -> None:
        sequences, q_THD, kv_TJD = step.share(ring)
        attend = algorithm(sequences, ring, PartTimer(CPU), piece_bytes=1, scale=0.7)
        out = attend(q_THD, kv_TJD, step.cached(ring.rank))
        own = expected[sequences[0].zigzag.indices(ring.rank)]
        torch.testing.assert_close(out.double(), own, **EXACT)

    three_ranks.run(check)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 12))
def test_pieces_hold_every_row_once(counts: list[int], piece_rows: int) -> None:
    """Pieces are cut across sequences, and no row is lost or sent twice."""
    pieces = [
        list(slices_between(counts, first, first + piece_rows))
        for first in range(0, sum(counts), piece_rows)
    ]

    rows = [(s.sequence, s.first_row + i) for piece in pieces for s in piece for i in range(s[2])]
    assert rows == [(index, row) for index, count in enumerate(counts) for row in range(count)]
    assert all(sum(s.num_rows for s in piece) == piece_rows for piece in pieces[:-1])
    assert Slice(0, 0, 0) not in [s for piece in pieces for s in piece]


@pytest.mark.parametrize("cached_rows", [(), (1,), (1, 2, 3), (1, -1)])
def test_cached_rows_are_counted_for_every_rank(cached_rows: tuple[int, ...]) -> None:
    """A wrong count would be a message of a wrong length, which ends the process."""
    with pytest.raises(ValueError, match="over 2 ranks needs as many counts"):
        RingSequence(Zigzag(num_tokens=4, num_ranks=2), cached_rows)
