"""The zigzag cut: every token once, in order, and the same work for every rank."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Sight, Zigzag

lengths = st.integers(1, 2000)
rings = st.integers(1, 8)
fast = settings(deadline=None, max_examples=100)


@fast
@given(lengths, rings, st.integers(0, 10**9))
def test_every_token_is_on_exactly_one_rank(num_tokens: int, num_ranks: int, start: int) -> None:
    """A token on no rank is forgotten, one on two ranks counts twice; any length must do."""
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, start=start)

    held = torch.cat([zigzag.positions(rank) for rank in range(num_ranks)])

    assert sorted(held.tolist()) == list(range(start, start + num_tokens))
    assert held.dtype is torch.int64


@fast
@given(lengths, rings)
def test_positions_ascend_on_each_rank(num_tokens: int, num_ranks: int) -> None:
    """A rank's attention to its own keys is causal in local order: that needs ascending ones."""
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks)

    for rank in range(num_ranks):
        positions = zigzag.positions(rank).tolist()
        assert all(a < b for a, b in itertools.pairwise(positions))


@fast
@given(lengths, rings)
def test_lengths_and_counts_say_what_indices_hold(num_tokens: int, num_ranks: int) -> None:
    """Buffers are sized by `count`, and a part is cut at `lengths`."""
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks)

    for rank in range(num_ranks):
        indices = zigzag.indices(rank)
        first, second = zigzag.lengths(rank)
        early, late = (zigzag.bounds(chunk) for chunk in (rank, 2 * num_ranks - 1 - rank))
        assert zigzag.count(rank) == first + second == len(indices)
        assert indices[:first].tolist() == list(range(*early))
        assert indices[first:].tolist() == list(range(*late))


@fast
@given(lengths, rings)
def test_chunks_are_even(num_tokens: int, num_ranks: int) -> None:
    """Chunk lengths differ by one token at most, so no rank waits, and nothing is padded."""
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks)

    chunks = [length for rank in range(num_ranks) for length in zigzag.lengths(rank)]
    counts = [zigzag.count(rank) for rank in range(num_ranks)]

    assert max(chunks) - min(chunks) <= 1
    assert max(counts) - min(counts) <= 2


@fast
@given(st.integers(1, 40), rings)
def test_every_round_is_the_same_work_for_all_ranks(chunk: int, num_ranks: int) -> None:
    """A ring is as fast as its slowest rank in each round.

    Counted from positions alone: the pairs (query, key) of a rank and the part it
    has in a round. With chunks of c tokens the first round is c * (2c + 1) pairs
    for all, each later one 2 c^2.
    """
    zigzag = Zigzag(num_tokens=2 * num_ranks * chunk, num_ranks=num_ranks)
    positions = [zigzag.positions(rank) for rank in range(num_ranks)]

    for transfer in range(num_ranks):
        work = {
            int((positions[(rank - transfer) % num_ranks][None] <= positions[rank][:, None]).sum())
            for rank in range(num_ranks)
        }
        assert work == {chunk * (2 * chunk + 1) if transfer == 0 else 2 * chunk**2}


@fast
@given(lengths, rings, st.data())
def test_cut_may_begin_at_any_rank(num_tokens: int, num_ranks: int, data: st.DataObject) -> None:
    """The ranks change places and nothing else: every token once, shares even."""
    first_rank = data.draw(st.integers(0, num_ranks - 1))
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, start=7, first_rank=first_rank)
    plain = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, start=7)

    for role in range(num_ranks):
        rank = (first_rank + role) % num_ranks
        assert zigzag.role(rank) == role
        assert torch.equal(zigzag.positions(rank), plain.positions(role))
        assert zigzag.lengths(rank) == plain.lengths(role)
    held = torch.cat([zigzag.indices(rank) for rank in range(num_ranks)])
    counts = [zigzag.count(rank) for rank in range(num_ranks)]
    assert sorted(held.tolist()) == list(range(num_tokens))
    assert max(counts) - min(counts) <= 2


@fast
@given(st.integers(1, 60), rings, st.data())
def test_sight_is_the_causal_mask(num_tokens: int, num_ranks: int, data: st.DataObject) -> None:
    """What a rank's queries see of a rank's keys follows from positions alone."""
    first_rank = data.draw(st.integers(0, num_ranks - 1))
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, first_rank=first_rank)

    for query_rank, key_rank in itertools.product(range(num_ranks), repeat=2):
        sight = zigzag.sees(query_rank, key_rank)
        queries, keys = zigzag.indices(query_rank), zigzag.indices(key_rank)
        seen = torch.zeros(len(queries), len(keys), dtype=torch.bool)
        seen[sight.first_query :, : sight.num_keys] = True
        if sight.causal:
            assert sight == Sight(first_query=0, num_keys=len(keys), causal=True)
            seen = seen.tril()
        assert torch.equal(seen, keys[None] <= queries[:, None])


@fast
@given(lengths, rings, st.data())
def test_last_token_is_on_the_named_rank(
    num_tokens: int, num_ranks: int, data: st.DataObject
) -> None:
    """The next token is sampled from the last one's logits, on the rank that has them."""
    first_rank = data.draw(st.integers(0, num_ranks - 1))
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, first_rank=first_rank)

    assert zigzag.last_token_rank == first_rank
    assert zigzag.indices(zigzag.last_token_rank)[-1].item() == num_tokens - 1


def test_start_shifts_positions_and_not_indices() -> None:
    """A later chunk of a prompt indexes its own tokens, but is rotated by its position."""
    zigzag = Zigzag(num_tokens=8, num_ranks=2, start=100)

    assert zigzag.indices(0).tolist() == [0, 1, 6, 7]
    assert zigzag.positions(0).tolist() == [100, 101, 106, 107]
    assert zigzag.positions(1).tolist() == [102, 103, 104, 105]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_prompt_shorter_than_the_chunks(num_ranks: int) -> None:
    """With one token, rank 0 holds it and the others nothing; no chunk is longer than one."""
    one = Zigzag(num_tokens=1, num_ranks=num_ranks)
    few = Zigzag(num_tokens=2 * num_ranks - 1, num_ranks=num_ranks)

    assert [one.count(rank) for rank in range(num_ranks)] == [1] + [0] * (num_ranks - 1)
    assert {length for rank in range(num_ranks) for length in few.lengths(rank)} == {0, 1}


@pytest.mark.parametrize("wrong", [{"num_tokens": 0}, {"num_ranks": 0}, {"start": -1}])
def test_impossible_cuts_are_refused(wrong: dict[str, int]) -> None:
    """An empty prompt must be refused where it comes in, and not give nan later."""
    with pytest.raises(ValueError, match="needs tokens, ranks and a start >= 0"):
        Zigzag(**({"num_tokens": 4, "num_ranks": 2} | wrong))


@pytest.mark.parametrize("first_rank", [-1, 2])
def test_first_rank_is_one_of_the_ring(first_rank: int) -> None:
    """The last token's rank samples: it must exist."""
    with pytest.raises(ValueError, match="first rank must be one of its ranks"):
        Zigzag(num_tokens=4, num_ranks=2, first_rank=first_rank)
