"""Ring pass-KV of a prompt's new tokens over any number of ranks equals causal attention on one."""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from attention import PagedRows, PassKVAttention, Ring, RingSequence, ThreadRanks, Zigzag
from attention.ring import PendingExchange
from attention.timing import PartTimer
from tests.reference import TOLERANCES, causal_mask, random_qkv, softmax_attention

LENGTHS = [1, 2, 3, 5, 7, 16, 63, 257]


NOTHING = [PagedRows(torch.empty(2, 0, 4, 32), torch.empty(2, 0, 4, 32), [], 0)]


def fresh(zigzag: Zigzag) -> list[RingSequence]:
    """Return a step of one sequence that has no earlier rows."""
    return [RingSequence(zigzag, (0,) * zigzag.num_ranks)]


class CountingRing:
    """A ring that keeps the shapes of the messages it sends and receives."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.messages: list[tuple[int, int]] = []

    @property
    def rank(self) -> int:
        return self._ring.rank

    @property
    def size(self) -> int:
        return self._ring.size

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        self.messages.append((outgoing.shape[0], incoming.shape[0]))
        return self._ring.exchange(outgoing, incoming, hops)

    def all_gather(self, part: Tensor) -> Tensor:
        raise AssertionError("pass-KV gathers nothing")


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 5])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    with ThreadRanks(request.param) as threads:
        yield threads


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[ThreadRanks]:
    with ThreadRanks(3) as threads:
        yield threads


@lru_cache
def causal_reference(
    num_tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, seed: int
) -> Tensor:
    q, k, v = random_qkv(
        num_tokens, num_tokens, heads=heads, kv_heads=kv_heads, dtype=dtype, seed=seed
    )
    return softmax_attention(q, k, v, causal_mask(num_tokens))[0]


def shard(
    ring: Ring, zigzag: Zigzag, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a rank's own rows as `PassKVAttention` takes them."""
    rows = zigzag.indices(ring.rank)
    return q_THD[rows], torch.cat([k_TKD, v_TKD], dim=1)[rows]


def whole(zigzag: Zigzag, shares: list[Tensor]) -> Tensor:
    """Put the ranks' rows back in order of position."""
    order = torch.cat([zigzag.indices(rank) for rank in range(len(shares))])
    out_THD = torch.empty(len(order), *shares[0].shape[1:])
    out_THD[order] = torch.cat(shares)
    return out_THD


def around(
    ranks: ThreadRanks,
    *layers: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
    wrap: Callable[[Ring], Ring] = lambda ring: ring,
) -> list[Tensor]:
    """Return each layer's full output; one object serves all layers, as in a step."""
    num_tokens = len(layers[0][0])

    def attend_layers(ring: Ring) -> list[Tensor]:
        ring = wrap(ring)
        zigzag = Zigzag(num_tokens=num_tokens, num_ranks=ring.size)
        attention = PassKVAttention(
            fresh(zigzag), ring, PartTimer(torch.device("cpu")), scale=scale
        )
        return [attention(*shard(ring, zigzag, *layer), NOTHING) for layer in layers]

    results = ranks.run(attend_layers)
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=len(results))
    return [whole(zigzag, list(shares)) for shares in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_ring_equals_causal_attention(
    ranks: ThreadRanks, num_tokens: int, dtype: torch.dtype
) -> None:
    """Any ring, any length: shorter than 2N chunks, and not divisible by them."""
    layer = random_qkv(num_tokens, num_tokens, dtype=dtype)

    (out,) = around(ranks, layer)

    assert out.dtype is torch.float32
    expected = causal_reference(num_tokens, 4, 2, dtype, 0)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 1), (8, 2)])
def test_grouped_heads_go_round(ranks: ThreadRanks, heads: int, kv_heads: int) -> None:
    """Only KV heads travel; the first half of a part is keys, the second values."""
    layer = random_qkv(33, 33, heads=heads, kv_heads=kv_heads)

    (out,) = around(ranks, layer)

    expected = causal_reference(33, heads, kv_heads, torch.float32, 0)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


def test_scale_reaches_every_round(three_ranks: ThreadRanks) -> None:
    """Own keys and others' are attended to in two places, and both need it."""
    q, k, v = random_qkv(40, 40)

    (out,) = around(three_ranks, (q, k, v), scale=0.5)

    expected, _ = softmax_attention(q, k, v, causal_mask(40), 0.5)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("num_tokens", [2, 63])
def test_layers_share_the_buffers(ranks: ThreadRanks, num_tokens: int) -> None:
    """The buffers still hold the last layer's keys: none of them may leak into the next."""
    layers = [random_qkv(num_tokens, num_tokens, seed=seed) for seed in range(3)]

    outs = around(ranks, *layers)

    for seed, out in enumerate(outs):
        expected = causal_reference(num_tokens, 4, 2, torch.float32, seed)
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


def test_keys_of_this_rank_are_left_as_they_are(three_ranks: ThreadRanks) -> None:
    """They are sent from where they lie, and the page pool may read them after."""
    q, k, v = random_qkv(20, 20)

    def check(ring: Ring) -> None:
        zigzag = Zigzag(num_tokens=20, num_ranks=ring.size)
        own_q, own_kv = shard(ring, zigzag, q, k, v)
        before = own_q.clone(), own_kv.clone()
        attention = PassKVAttention(fresh(zigzag), ring, PartTimer(torch.device("cpu")))
        attention(own_q, own_kv, NOTHING)
        assert torch.equal(own_q, before[0])
        assert torch.equal(own_kv, before[1])

    three_ranks.run(check)


@pytest.mark.parametrize("num_tokens", [1, 63])
def test_a_layer_takes_one_exchange_fewer_than_ranks(ranks: ThreadRanks, num_tokens: int) -> None:
    """N - 1 transfers a layer, each of a whole share: the last part is not sent home."""
    rings: list[CountingRing] = []

    def counting(ring: Ring) -> Ring:
        rings.append(CountingRing(ring))
        return rings[-1]

    layer = random_qkv(num_tokens, num_tokens)
    around(ranks, layer, layer, wrap=counting)

    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=len(rings))
    for ring in rings:
        held = [zigzag.count((ring.rank - i) % ring.size) for i in range(ring.size)]
        assert ring.messages == 2 * list(itertools.pairwise(held))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(ranks: ThreadRanks, dtype: torch.dtype) -> None:
    """Parts are merged in an order that timing does not change, so answers repeat."""
    layer = random_qkv(63, 63, dtype=dtype)

    (first,), (second,) = (around(ranks, layer) for _ in range(2))

    assert torch.equal(first, second)


def test_every_round_is_reported(ranks: ThreadRanks) -> None:
    """A long prefill shows progress and can be cancelled between rounds."""
    layer = random_qkv(10, 10)

    def count_rounds(ring: Ring) -> tuple[int, int]:
        calls = 0

        def on_round() -> None:
            nonlocal calls
            calls += 1

        zigzag = Zigzag(num_tokens=10, num_ranks=ring.size)
        timer = PartTimer(torch.device("cpu"))
        attention = PassKVAttention(fresh(zigzag), ring, timer, on_round=on_round)
        for _ in range(2):
            attention(*shard(ring, zigzag, *layer), NOTHING)
        return calls, attention.num_rounds

    for calls, rounds in ranks.run(count_rounds):
        assert calls == 2 * rounds


@pytest.mark.parametrize("piece_bytes", [4, 100, 1000])
def test_parts_may_travel_in_pieces(piece_bytes: int) -> None:
    """A piece need not hold whole rows."""
    layer = random_qkv(17, 17, head_dim=32)

    with ThreadRanks(3, piece_bytes=piece_bytes) as ranks:
        (out,) = around(ranks, layer)

    expected = causal_reference(17, 4, 2, torch.float32, 0)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


def test_time_of_each_part_is_kept(three_ranks: ThreadRanks) -> None:
    """A step's record says where its time went."""
    layer = random_qkv(12, 12)

    def parts(ring: Ring) -> set[str]:
        zigzag, timer = Zigzag(num_tokens=12, num_ranks=ring.size), PartTimer(torch.device("cpu"))
        PassKVAttention(fresh(zigzag), ring, timer)(*shard(ring, zigzag, *layer), NOTHING)
        assert all(seconds >= 0.0 for seconds in timer.seconds().values())
        return set(timer.seconds())

    assert three_ranks.run(parts) == [{"exchange", "attention", "merge", "wait"}] * 3
