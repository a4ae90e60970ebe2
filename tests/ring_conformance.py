"""What every implementation of `Ring` must do.

Each check is a function ``(ring, device)`` that all ranks of a ring call at
once, so that one suite serves threads, processes and CUDA. Rings under test
should cut messages at `PIECE_BYTES`: some messages here are shorter and some
longer. A ring of one rank exchanges with nobody, so only `COLLECTIVE_CHECKS`
apply to it.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from attention.ring import PendingExchange, Ring

Check = Callable[[Ring, torch.device], None]

PIECE_BYTES = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


def message(
    sender: int, length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return numbers that differ by sender and place and are exact in every dtype."""
    return ((torch.arange(length) * 7 + sender * 31) % 251).to(device, dtype)


def neighbours(ring: Ring) -> tuple[int, int]:
    """Return the previous and the next rank."""
    return (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size


def check_exchange_rotates(ring: Ring, device: torch.device) -> None:
    """A rank sends to the next and receives from the previous: after N turns all is at home."""
    travelling = message(ring.rank, 5, device)
    for turn in range(1, ring.size + 1):
        incoming = torch.full_like(travelling, -1.0)
        ring.exchange(travelling, incoming).wait()
        assert torch.equal(incoming, message((ring.rank - turn) % ring.size, 5, device))
        travelling = incoming


def check_exchange_of_unequal_sizes(ring: Ring, device: torch.device) -> None:
    """Shares differ by rank, and the share of rank 0 here is empty."""
    previous, _ = neighbours(ring)
    incoming = torch.full((3 * previous, 2), -1.0, device=device)
    ring.exchange(message(ring.rank, 6 * ring.rank, device).view(-1, 2), incoming).wait()
    assert torch.equal(incoming, message(previous, 6 * previous, device).view(-1, 2))


def check_exchange_of_nothing(ring: Ring, device: torch.device) -> None:
    """A chunk that is empty on all ranks neither blocks nor shifts what comes after it."""
    previous, _ = neighbours(ring)
    empty = torch.empty(0, 4, device=device)
    ring.exchange(empty, torch.empty_like(empty)).wait()
    incoming = torch.full((3,), -1.0, device=device)
    ring.exchange(message(ring.rank, 3, device), incoming).wait()
    assert torch.equal(incoming, message(previous, 3, device))


def check_long_messages_arrive_whole(ring: Ring, device: torch.device) -> None:
    """Pieces arrive in order, a last piece that is not full included; so does one exact piece."""
    previous, _ = neighbours(ring)
    for length in (PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 10_001):
        incoming = torch.full((length,), -1.0, device=device)
        ring.exchange(message(ring.rank, length, device), incoming).wait()
        assert torch.equal(incoming, message(previous, length, device))


def check_pending_exchanges_keep_their_order(ring: Ring, device: torch.device) -> None:
    """Several exchanges may be under way; each gets its own message, whichever is awaited first."""
    previous, _ = neighbours(ring)
    lengths = (3, 2_000, 1, 1_500)
    outgoing = [message(ring.rank + 10 * i, n, device) for i, n in enumerate(lengths)]
    incoming = [torch.full((n,), -1.0, device=device) for n in lengths]
    pending = [ring.exchange(out, into) for out, into in zip(outgoing, incoming, strict=True)]
    for exchange in reversed(pending):
        exchange.wait()
    for i, length in enumerate(lengths):
        assert torch.equal(incoming[i], message(previous + 10 * i, length, device))


def all_hops(ring: Ring) -> list[int]:
    """Return every way round the ring that leads to another rank, and one past a whole turn."""
    others = range(1, ring.size)
    return [*others, *(-hops for hops in others), ring.size + 1]


def check_exchange_over_any_hops(ring: Ring, device: torch.device) -> None:
    """Partials go back to their query's rank, however far round the ring and either way."""
    for hops in all_hops(ring):
        source = (ring.rank - hops) % ring.size
        incoming = torch.full((5 + source,), -1.0, device=device)
        ring.exchange(message(ring.rank, 5 + ring.rank, device), incoming, hops).wait()
        assert torch.equal(incoming, message(source, 5 + source, device))


def check_exchanges_over_all_hops_at_once(ring: Ring, device: torch.device) -> None:
    """Messages of all lengths to all ranks are under way together, empty ones too.

    As in pass-Q: a partial may go to the rank that the next queries go to.
    """
    pending: list[tuple[PendingExchange, Tensor, Tensor]] = []
    kept: list[Tensor] = []
    for turn, length in enumerate((3, 0, 2_500, 1)):
        for hops in all_hops(ring):
            source = (ring.rank - hops) % ring.size
            outgoing = message(ring.rank + turn, length, device)
            kept.append(outgoing)  # not before it has gone may its memory be used anew
            incoming = torch.full((length,), -1.0, device=device)
            expected = message(source + turn, length, device)
            pending.append((ring.exchange(outgoing, incoming, hops), incoming, expected))
    for exchange, _, _ in reversed(pending):
        exchange.wait()
    for _, incoming, expected in pending:
        assert torch.equal(incoming, expected)


def check_exchange_with_oneself_is_refused(ring: Ring, device: torch.device) -> None:
    """A send that waits for its own rank would wait for ever."""
    for hops in (0, ring.size, -ring.size):
        try:
            ring.exchange(torch.zeros(1, device=device), torch.zeros(1, device=device), hops)
        except ValueError:
            continue
        raise AssertionError(f"{hops} hops in a ring of {ring.size} were taken")


def check_buffers_may_be_reused_after_wait(ring: Ring, device: torch.device) -> None:
    """What was sent may be overwritten after `wait`, though the peer reads it late.

    The message is larger than the sockets' buffers, so that a late reader does
    leave some of it with the sender.
    """
    previous, _ = neighbours(ring)
    outgoing, incoming = (torch.empty(400_000, device=device) for _ in range(2))
    for turn in range(3):
        outgoing.fill_(100.0 * turn + ring.rank)
        if turn % ring.size == ring.rank:
            time.sleep(0.1)
        ring.exchange(outgoing, incoming).wait()
        outgoing.fill_(-1.0)
        assert torch.equal(incoming, torch.full_like(incoming, 100.0 * turn + previous))


def check_exchange_of_every_dtype(ring: Ring, device: torch.device) -> None:
    """KV travels in the model's dtype; no bit may change."""
    previous, _ = neighbours(ring)
    for dtype in DTYPES:
        for length in (9, 5_000):
            incoming = torch.zeros(length, dtype=dtype, device=device)
            ring.exchange(message(ring.rank, length, device, dtype), incoming).wait()
            assert torch.equal(incoming, message(previous, length, device, dtype))


def check_exchange_of_a_slice(ring: Ring, device: torch.device) -> None:
    """The buffer for arriving keys is as long as the longest part; the rest is not written."""
    previous, _ = neighbours(ring)
    buffer = torch.full((10, 2, 3), -1.0, device=device)
    ring.exchange(message(ring.rank, 24, device).view(4, 2, 3), buffer[:4]).wait()
    assert torch.equal(buffer[:4], message(previous, 24, device).view(4, 2, 3))
    assert bool((buffer[4:] == -1.0).all())


def check_all_gather_stacks_by_rank(ring: Ring, device: torch.device) -> None:
    """All ranks get the same stack in order of rank, so that all merge to the same bits."""
    for dtype in DTYPES:
        gathered = ring.all_gather(message(ring.rank, 12, device, dtype).view(3, 4))
        parts = [message(rank, 12, device, dtype).view(3, 4) for rank in range(ring.size)]
        assert torch.equal(gathered, torch.stack(parts))


def check_all_gather_of_a_view(ring: Ring, device: torch.device) -> None:
    """A part need not be contiguous: kernels return transposed results."""
    gathered = ring.all_gather(message(ring.rank, 12, device).view(3, 4).t())
    for rank in range(ring.size):
        assert torch.equal(gathered[rank], message(rank, 12, device).view(3, 4).t())


def check_calls_may_be_mixed(ring: Ring, device: torch.device) -> None:
    """A decode step gathers partials and then tokens, a prefill exchanges: nothing gets crossed."""
    previous, _ = neighbours(ring)
    for turn in range(5):
        gathered = ring.all_gather(message(ring.rank + turn, 4, device))
        tokens = ring.all_gather(message(ring.rank + turn, 1, device, torch.int64))
        incoming = torch.full((4,), -1.0, device=device)
        if ring.size > 1:
            ring.exchange(message(ring.rank + turn, 4, device), incoming).wait()
            assert torch.equal(incoming, message(previous + turn, 4, device))
        assert torch.equal(gathered[-1], message(ring.size - 1 + turn, 4, device))
        assert torch.equal(tokens[0], message(turn, 1, device, torch.int64))


EXCHANGE_CHECKS: tuple[Check, ...] = (
    check_exchange_rotates,
    check_exchange_of_unequal_sizes,
    check_exchange_of_nothing,
    check_long_messages_arrive_whole,
    check_pending_exchanges_keep_their_order,
    check_exchange_over_any_hops,
    check_exchanges_over_all_hops_at_once,
    check_exchange_with_oneself_is_refused,
    check_buffers_may_be_reused_after_wait,
    check_exchange_of_every_dtype,
    check_exchange_of_a_slice,
)
COLLECTIVE_CHECKS: tuple[Check, ...] = (
    check_all_gather_stacks_by_rank,
    check_all_gather_of_a_view,
    check_calls_may_be_mixed,
)
