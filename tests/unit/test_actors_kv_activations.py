"""Activations are taken from steps, cut with their sequences, and handed over whole."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from actors.kv.activations import ActivationCapture, Captured, StepRows, keeps_activations

L, E, BLOCK = 3, 8, 16
ROW_BYTES = L * E * 4


def make_capture(share: float = 1.0, max_bytes: int = 1 << 20) -> ActivationCapture:
    return ActivationCapture(
        num_layers=L,
        hidden_size=E,
        dtype=torch.float32,
        device=torch.device("cpu"),
        block_tokens=BLOCK,
        share=share,
        max_bytes=max_bytes,
    )


def inputs(sequence_id: int, positions: Sequence[int], layer: int, version: int = 0) -> Tensor:
    """Return rows that tell what they are of."""
    return torch.tensor(
        [[sequence_id, position, layer, version] + [0.5] * (E - 4) for position in positions]
    )


def compute(
    capture: ActivationCapture, spans: Sequence[tuple[int, int, int]], version: int = 0
) -> None:
    """Compute a step of spans ``(sequence, position, count)``, with rows between of nobody."""
    rows, layers, end = [], [[inputs(-1, [0], layer)] for layer in range(L)], 1
    for sequence_id, position, count in spans:
        rows.append(StepRows(sequence_id=sequence_id, position=position, row=end, count=count))
        for layer, parts in enumerate(layers):
            positions = range(position, position + count)
            parts += [inputs(sequence_id, positions, layer, version), inputs(-1, [0], layer)]
        end += count + 1
    take = capture.step(rows)
    if take is not None:
        for layer, parts in enumerate(layers):
            normed_TE = torch.cat(parts)
            take(layer, normed_TE)
            normed_TE.zero_()  # the step goes on with the memory


def positions_of(captured: Sequence[Captured], sequence_id: int, version: int = 0) -> list[int]:
    """Return the positions that were handed over; each row must be its own in every layer."""
    for each in captured:
        for layer in range(L):
            expected = inputs(sequence_id, range(each.start, each.end), layer, version)
            torch.testing.assert_close(each.rows[layer], expected, rtol=0, atol=0)
    return [position for each in captured for position in range(each.start, each.end)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("num_ranks", "most"), [(1, 2), (2, 3), (3, 3), (4, 3.5), (8, 6)])
def test_any_prefix_has_its_share_on_every_rank(share: float, num_ranks: int, most: float) -> None:
    """Within so many blocks; else one rank would project while the others load."""
    for rank in range(num_ranks):
        kept = [keeps_activations(block, share) for block in range(rank, 64 * num_ranks, num_ranks)]
        for blocks in range(len(kept)):
            assert abs(sum(kept[:blocks]) - share * blocks) <= most


def test_rows_are_taken_and_handed_over_block_by_block() -> None:
    """Of several sequences in one step; what is handed over is no more there."""
    capture = make_capture()
    compute(capture, [(1, 0, 20), (2, 5, 1), (3, 40, 1), (1, 30, 10)])

    assert positions_of(capture.take(1, 0, 16), 1) == list(range(16))
    assert positions_of(capture.take(1, 16, 48), 1) == [*range(16, 20), *range(30, 40)]
    assert positions_of(capture.take(2, 0, 16), 2) == [5]
    assert capture.take(1, 0, 48) == []
    assert positions_of(capture.take(3, 32, 48), 3) == [40]


def test_blocks_that_keep_keys_and_values_are_not_taken() -> None:
    """They would only take memory."""
    capture = make_capture(share=0.5)
    compute(capture, [(1, 0, 10 * BLOCK)])

    taken = positions_of(capture.take(1, 0, 10 * BLOCK), 1)

    kept = [block for block in range(10) if keeps_activations(block, 0.5)]
    assert taken == [p for block in kept for p in range(block * BLOCK, (block + 1) * BLOCK)]


def test_rows_of_decode_steps_make_a_block() -> None:
    """Each comes alone, beside those of other sequences."""
    capture = make_capture()
    for step in range(BLOCK):
        compute(capture, [(1, step, 1), (2, 3 + step, 1)])

    assert positions_of(capture.take(1, 0, BLOCK), 1) == list(range(BLOCK))
    assert positions_of(capture.take(2, 0, BLOCK), 2) == list(range(3, BLOCK))


def test_rows_cut_off_are_forgotten_and_computed_anew() -> None:
    """What was computed with damaged rows would else be stored under the right key."""
    capture = make_capture()
    compute(capture, [(1, 0, 30)], version=1)
    capture.forget(1, 5)
    compute(capture, [(1, 5, 27)], version=2)

    taken = capture.take(1, 0, 32)

    first = [each for each in taken if each.start < 5]
    assert positions_of(first, 1, version=1) == list(range(5))
    assert positions_of([e for e in taken if e.start >= 5], 1, version=2) == list(range(5, 32))


def test_rows_computed_twice_count_once() -> None:
    """The later ones are those that the pages have."""
    capture = make_capture()
    compute(capture, [(1, 0, 12)], version=1)
    compute(capture, [(1, 8, 8)], version=2)

    taken = capture.take(1, 0, BLOCK)

    assert positions_of(taken[:1], 1, version=1) == list(range(8))
    assert positions_of(taken[1:], 1, version=2) == list(range(8, 16))


def test_what_finds_no_room_is_not_taken() -> None:
    """Then keys and values are stored; what is handed over counts until it is released."""
    capture = make_capture(max_bytes=20 * ROW_BYTES)
    compute(capture, [(1, 0, 16)])
    compute(capture, [(2, 0, 16)])
    taken = capture.take(1, 0, 16)
    compute(capture, [(3, 0, 16)])
    assert capture.held_bytes == 16 * ROW_BYTES
    capture.release(taken)
    assert capture.held_bytes == 0
    compute(capture, [(4, 0, 16)])

    assert len(taken) == len(capture.take(4, 0, 16)) == 1
    assert capture.take(2, 0, 16) == capture.take(3, 0, 16) == []


def test_nothing_is_left_of_sequences_that_end() -> None:
    """Whatever was computed, cut, handed over and given back, in any order."""
    rng = random.Random(0)
    capture = make_capture(share=0.7, max_bytes=60 * ROW_BYTES)
    end = dict.fromkeys(range(5), 0)
    out: list[list[Captured]] = []
    for _ in range(2000):
        sequence_id, what = rng.randrange(5), rng.randrange(5)
        if what < 2:
            step = sorted(rng.sample(range(5), rng.randint(1, 4)))
            counts = [rng.choice([1, 1, 2, 20]) for _ in step]
            compute(capture, [(s, end[s], count) for s, count in zip(step, counts, strict=True)])
            for s, count in zip(step, counts, strict=True):
                end[s] += count
        elif what == 2:
            end[sequence_id] = rng.randint(0, end[sequence_id])
            capture.forget(sequence_id, end[sequence_id])
        elif what == 3:
            blocks = end[sequence_id] // BLOCK
            taken = capture.take(sequence_id, 0, blocks * BLOCK)
            positions = positions_of(taken, sequence_id)
            assert positions == sorted(set(positions))
            assert all(position < blocks * BLOCK for position in positions)
            out.append(taken)
        elif out:
            capture.release(out.pop(rng.randrange(len(out))))
        assert 0 <= capture.held_bytes <= 60 * ROW_BYTES
    for sequence_id in end:
        capture.forget(sequence_id)
    capture.release(list(itertools.chain(*out)))

    assert capture.held_bytes == 0
