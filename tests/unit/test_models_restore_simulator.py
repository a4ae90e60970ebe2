"""The simulator: the schedules of the literature, and a second simulator that walks every event."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from models.kvpr import SplitProblem
from models.restore_simulator import Execution, Faults, Order, Piece, sending_order, simulate


def walk(
    pieces: Sequence[Piece],
    num_layers: int,
    *,
    recompute_s: float,
    suffix_s: float,
    buffers: int,
    staged_s: Sequence[float],
) -> float:
    """Return the total time, by the rules alone: from event to event, nothing repeated or skipped.

    The oracle of `simulate`. Slow, and every decision is made where it falls.
    """
    to_send = [(layer, piece) for layer in range(num_layers) for piece in range(len(pieces))]
    left_s = {job: pieces[job[1]].device_s for job in to_send}  # of projection
    missing = [len(pieces)] * num_layers
    arrived: list[tuple[int, int]] = []  # to be projected
    sending: tuple[tuple[int, int], float] | None = None  # the job, and when it is there
    now, taken, recompute, layer, suffix = 0.0, 0, recompute_s, 0, suffix_s / num_layers

    while True:
        if sending is None and to_send:
            job = to_send[0]
            piece = pieces[job[1]]
            if staged_s[job[1]] <= now and (not piece.device_s or taken < buffers):
                to_send.pop(0)
                taken += piece.device_s > 0
                sending = job, now + piece.link_s
        events = [math.inf if sending is None else sending[1]]
        events += [staged_s[to_send[0][1]]] if to_send and staged_s[to_send[0][1]] > now else []
        work = None
        if arrived:
            work = left_s[arrived[0]]
        elif recompute > 0:
            work = recompute
        elif layer < num_layers and not missing[layer]:
            work = suffix
        if work is not None:
            events.append(now + work)
        if min(events) == math.inf:
            return now
        spent_s, now = min(events) - now, min(events)
        if arrived:
            left_s[arrived[0]] -= spent_s
            if left_s[arrived[0]] <= 1e-12:
                missing[arrived.pop(0)[0]] -= 1
                taken -= 1
        elif recompute > 0:
            recompute = recompute - spent_s if recompute - spent_s > 1e-12 else 0.0
        elif work is not None:
            suffix -= spent_s
            if suffix <= 1e-12:
                layer, suffix = layer + 1, suffix_s / num_layers
        if sending is not None and sending[1] <= now:
            job, sending = sending[0], None
            if left_s[job]:
                arrived.append(job)
            else:
                missing[job[0]] -= 1


def random_pieces(rng: random.Random) -> list[Piece]:
    """Some to be projected, some not, some from another host; none at all as well."""
    return [
        Piece(
            link_s=rng.uniform(0.1, 1),
            device_s=rng.choice([0.0, rng.uniform(0.05, 2)]),
            network_s=rng.choice([0.0, rng.uniform(0, 2)]),
        )
        for _ in range(rng.randint(0, 8))
    ]


def opt_layers(split: int, chunks: int) -> Execution:
    """32 layers of OPT-6.7B (b=32, s=1024) on an A100 behind PCIe 4, 0.4 ms of other work each."""
    problem = SplitProblem(
        batch=32,
        tokens=1024,
        hidden_size=4096,
        kv_width=4096,
        link_bytes_per_s=32e9,
        flops_per_s=312e12,
    )
    activations = Piece(
        link_s=problem.activation_s * split / chunks, device_s=problem.project_s * split / chunks
    )
    rest = [Piece(link_s=problem.kv_s * (1024 - split))] if split < 1024 else []
    pieces = [activations] * chunks * (split > 0) + rest
    return simulate(pieces, 32, suffix_s=32 * 0.4e-3)


@pytest.mark.parametrize(
    ("split", "chunks", "layer_ms", "idle"),
    [(0, 1, 16.79, 0.976), (721, 1, 10.88, 0.507), (1024, 8, 8.43, 0.116)],
)
def test_opt_takes_what_the_formulas_say(
    split: int, chunks: int, layer_ms: float, idle: float
) -> None:
    """Loading alone, the serial optimum and the pipelined one, each with two buffers."""
    execution = opt_layers(split, chunks)
    assert execution.total_s / 32 == pytest.approx(layer_ms * 1e-3, abs=6e-6)
    assert execution.idle("device") == pytest.approx(idle, abs=2e-3)


def test_every_event_walked_gives_the_same_time() -> None:
    """Repeating layers, and filling gaps all at once, are exact."""
    rng = random.Random("walk")
    for _ in range(400):
        pieces, layers, buffers = random_pieces(rng), rng.randint(1, 9), rng.randint(1, 4)
        recompute_s = rng.choice([0.0, rng.uniform(0, 20)])
        suffix_s = rng.choice([0.0, rng.uniform(0, 20)])
        execution = simulate(
            pieces,
            layers,
            recompute_s=recompute_s,
            suffix_s=suffix_s,
            buffers=buffers,
            staging="piece",
        )
        staged_s = [
            end_s if piece.network_s else 0.0
            for piece, end_s in zip(
                pieces, itertools.accumulate(p.network_s for p in pieces), strict=True
            )
        ]
        walked_s = walk(
            pieces,
            layers,
            recompute_s=recompute_s,
            suffix_s=suffix_s,
            buffers=buffers,
            staged_s=staged_s,
        )
        assert execution.total_s == pytest.approx(walked_s, abs=1e-6)


def test_no_resource_is_busy_longer_than_it_takes() -> None:
    """And the total is at least what any of them, and the slowest layer, needs."""
    rng = random.Random("busy")
    for _ in range(200):
        pieces, layers = random_pieces(rng), rng.randint(1, 40)
        execution = simulate(pieces, layers, recompute_s=3.0, suffix_s=5.0)
        for resource, busy_s in execution.busy_s.items():
            assert busy_s <= execution.total_s * (1 + 1e-9)
            assert 0 <= execution.idle(resource) <= 1
        assert execution.busy_s["link"] == pytest.approx(layers * sum(p.link_s for p in pieces))
        assert execution.busy_s["device"] == pytest.approx(
            8 + layers * sum(p.device_s for p in pieces)
        )
        assert list(execution.loaded_s) == sorted(execution.loaded_s)
        assert list(execution.done_s) == sorted(execution.done_s)
        assert len(execution.loaded_s) == len(execution.done_s) == layers
        assert execution.total_s == execution.done_s[-1]


def test_nothing_to_restore_takes_the_new_tokens_alone() -> None:
    """An empty plan is no special case."""
    execution = simulate([], 4, suffix_s=2.0)
    assert execution.total_s == pytest.approx(2.0)
    assert execution.idle("link") == 1.0
    assert execution.idle("device") == 0.0
    assert simulate([], 1).total_s == 0.0


def test_new_tokens_follow_the_layers_as_they_arrive() -> None:
    """Only the last layer is computed after the last one arrived."""
    execution = simulate([Piece(link_s=1.0)], 4, suffix_s=2.0)
    assert execution.loaded_s == pytest.approx((1, 2, 3, 4))
    assert execution.done_s == pytest.approx((1.5, 2.5, 3.5, 4.5))


def test_recompute_runs_beside_loading_and_before_new_tokens() -> None:
    """New tokens attend to all that is restored."""
    execution = simulate([Piece(link_s=1.0)], 4, recompute_s=3.0, suffix_s=2.0)
    assert execution.recomputed_s == pytest.approx(3.0)
    assert execution.done_s == pytest.approx((3.5, 4.0, 4.5, 5.0))


def test_link_waits_for_a_buffer() -> None:
    """Three pieces of 1 s, projected in 3 s each: the third is sent when the first is done."""
    pieces = [Piece(link_s=1.0, device_s=3.0)] * 3 + [Piece(link_s=1.0)]
    assert simulate(pieces, 1, buffers=2).total_s == pytest.approx(10.0)
    one = simulate(pieces, 1, buffers=1)
    assert one.total_s == pytest.approx(12.0)
    assert one.idle("link") == pytest.approx(1 - 4 / 12)


def test_interleaving_keeps_the_link_busy_while_the_device_projects() -> None:
    """Sent first, slow projections stop the link at the buffers; spread out they do not."""

    def total_s(order: Order) -> float:
        pieces = [Piece(link_s=1.0, device_s=2.0)] * 6 + [Piece(link_s=1.0)] * 6
        return simulate(sending_order(pieces, order), 20).total_s

    assert total_s("activations_first") == pytest.approx(20 * (6 * 2 + 4))
    assert total_s("interleaved") == pytest.approx(20 * 12 + 1)  # the device never waits


def test_sending_order_keeps_every_piece() -> None:
    """Both orders send the same pieces, activations evenly spread in one of them."""
    project, load = Piece(link_s=1.0, device_s=1.0), Piece(link_s=1.0)
    assert sending_order([load, project, load], "activations_first") == [project, load, load]
    spread = sending_order([project, project, load, load, load, load], "interleaved")
    assert spread == [load, project, load, load, project, load]


def test_staged_whole_nothing_is_sent_before_all_is_there() -> None:
    """Staging then adds to loading; piece by piece most of it hides."""
    pieces = [Piece(link_s=1.0, network_s=4.0), Piece(link_s=1.0, network_s=4.0)]
    assert simulate(pieces, 2, staging="whole").total_s == pytest.approx(12.0)
    assert simulate(pieces, 2, staging="piece").total_s == pytest.approx(11.0)


def test_network_and_disk_work_at_once() -> None:
    """Two tiers, two servers; a piece on another host's disk passes both."""
    apart = [Piece(link_s=0.0, network_s=3.0), Piece(link_s=0.0, disk_s=3.0)]
    assert simulate(apart, 1).total_s == pytest.approx(3.0)
    behind = [Piece(link_s=0.0, network_s=3.0, disk_s=3.0)]
    assert simulate(behind, 1).total_s == pytest.approx(6.0)


def test_recompute_may_wait_for_staging() -> None:
    """A prompt that waits aside until its blocks are staged computes nothing meanwhile."""
    pieces = [Piece(link_s=1.0, network_s=4.0)]
    assert simulate(pieces, 1, recompute_s=3.0).total_s == pytest.approx(5.0)
    assert simulate(pieces, 1, recompute_s=3.0, recompute_waits=True).total_s == pytest.approx(7.0)


def test_other_work_comes_first() -> None:
    """A link that saves what others wrote, and a device within a step, are not free at once."""
    pieces = [Piece(link_s=1.0)]
    assert simulate(pieces, 1, fixed_s={"link": 2.0}).total_s == pytest.approx(3.0)
    busy = simulate(pieces, 1, suffix_s=1.0, fixed_s={"device": 5.0})
    assert busy.total_s == pytest.approx(6.0)
    assert busy.idle("device") == 0.0


def test_late_piece_delays_no_more_than_its_delay() -> None:
    """The link waits for it, and then goes on."""
    rng = random.Random("late")
    for _ in range(100):
        pieces = [*random_pieces(rng), Piece(link_s=1.0)]
        late_s = rng.uniform(0, 10)
        faults = Faults(late_s={rng.randrange(len(pieces)): late_s})
        in_time = simulate(pieces, 6, recompute_s=2.0, suffix_s=3.0).total_s
        late = simulate(pieces, 6, recompute_s=2.0, suffix_s=3.0, faults=faults).total_s
        assert in_time - 1e-9 <= late <= in_time + late_s + 1e-9


def test_lost_piece_is_recomputed_and_its_other_layers_are_not_sent() -> None:
    """It is found out at its first layer; what it held is computed before the new tokens."""
    pieces = [Piece(link_s=1.0), Piece(link_s=1.0)]
    execution = simulate(pieces, 3, suffix_s=3.0, faults=Faults(lost={1: 10.0}))
    assert execution.busy_s["link"] == pytest.approx(4.0)
    assert execution.loaded_s == pytest.approx((1.0, 3.0, 4.0))
    assert execution.total_s == pytest.approx(2.0 + 10.0 + 3.0)


def test_all_lost_is_all_recomputed() -> None:
    """Then no layer waits for the link."""
    execution = simulate([Piece(link_s=1.0)], 2, suffix_s=1.0, faults=Faults(lost={0: 4.0}))
    assert execution.total_s == pytest.approx(1.0 + 4.0 + 1.0)


def test_faster_resources_are_never_slower() -> None:
    """Dividing all transfer times, or all projections, by two never costs time."""
    rng = random.Random("monotone")
    for _ in range(200):
        pieces, layers = random_pieces(rng), rng.randint(1, 9)
        slow = simulate(pieces, layers, recompute_s=4.0, suffix_s=4.0).total_s
        for fast in (
            [Piece(**{**vars(p), "link_s": p.link_s / 2}) for p in pieces],
            [Piece(**{**vars(p), "device_s": p.device_s / 2}) for p in pieces],
        ):
            assert simulate(fast, layers, recompute_s=4.0, suffix_s=4.0).total_s <= slow + 1e-9


def test_layers_and_buffers_must_be_there() -> None:
    """Without a buffer the link would wait for ever."""
    with pytest.raises(ValueError, match="buffers must be >= 1"):
        simulate([], 1, buffers=0)
