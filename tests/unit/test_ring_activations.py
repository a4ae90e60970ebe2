"""Conversations that come back from saved activations: what is stored is right, so are answers."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.choice import Rule
from actors.kv.activations import keeps_activations
from actors.kv.finder import StoredBlocks
from actors.kv.messages import RestoreChoice
from actors.kv.piece_sizes import record_of
from actors.kv.pieces import ACTIVATIONS, RAW, PieceId
from actors.kv.store import KVStore
from models.decoder import Decoder
from models.sampling import SamplingParams
from tests.checkpoints import write_checkpoint, write_llama_checkpoint
from tests.oracle import assert_greedy
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores

BLOCK = 16
# Families whose activations are narrower than keys and values: an MHA model's are.
MHA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 4},
    "opt": {},
    "gpt2": {},
    "gpt_neox": {},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"), num_key_value_heads=4)


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, count).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def pieces_of(store: KVStore) -> list[PieceId]:
    return store._host._directory.pieces()


def all_pieces(stores: ThreadStores) -> list[PieceId]:
    return [piece for store in stores.stores for piece in pieces_of(store)]


def tokens_in(pieces: Sequence[PieceId], encoding: str) -> int:
    """Return how many tokens lie in pieces of an encoding; none lies in two."""
    each = [
        (piece.key, token)
        for piece in pieces
        if piece.encoding == encoding
        for token in range(piece.start, piece.end)
    ]
    assert len(each) == len(set(each)), "stored twice"
    return len(each)


def inputs_of(checkpoint: Path, token_ids: list[int]) -> tuple[Decoder, dict[int, Tensor]]:
    """Return each layer's inputs of all tokens, of one prefill on one rank, and who made them."""
    inputs: dict[int, Tensor] = {}
    with ThreadCluster(checkpoint, 1) as alone:
        decoder = alone.workers[0]._decoder
        forward = decoder.forward
        decoder.forward = functools.partial(  # type: ignore[method-assign]
            forward, on_inputs=lambda layer, normed_TE: inputs.update({layer: normed_TE.clone()})
        )
        alone.logits(token_ids)
    return decoder, inputs


def stored_layers(store: KVStore, piece: PieceId) -> Iterator[Tensor]:
    """Yield each layer of a piece: ``inputs_SE``, or ``kv_2KSD``."""
    layout, S = store._spec.layout, piece.end - piece.start
    shape: tuple[int, ...] = (S, layout.hidden_size)
    if piece.encoding == RAW:
        shape = (2, layout.num_kv_heads, S, layout.head_dim)
    with store._host.reading(piece, "test", counts_as_use=False) as record:
        where = record_of(piece, layout)
        for layer in range(layout.num_layers):
            values = torch.frombuffer(where.layer(record, layer), dtype=torch.float32)
            yield values[: torch.Size(shape).numel()].view(shape).clone()


def assert_stored_is_right(
    checkpoint: Path, stores: ThreadStores, conversations: Sequence[list[int]]
) -> None:
    """Compare all that is stored with what one rank computes of the conversations."""
    left = {(store, piece) for store in stores.stores for piece in pieces_of(store)}
    for token_ids in conversations:
        decoder, inputs = inputs_of(checkpoint, token_ids)
        keys = stores.keys.keys("", np.array(token_ids, dtype=np.int32), [])
        for store, piece in [each for each in left if each[1].key in keys]:
            left.remove((store, piece))
            start = keys.index(piece.key) * BLOCK
            positions = torch.arange(start + piece.start, start + piece.end)
            for layer, stored in enumerate(stored_layers(store, piece)):
                expected = inputs[layer][positions]
                if piece.encoding == RAW:
                    cos_sin = decoder.rotations(positions)
                    kv_SJD = decoder.project_inputs(layer, expected, cos_sin)
                    expected = kv_SJD.unflatten(1, (2, -1)).permute(1, 2, 0, 3)
                torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)
    assert not left, "nobody knows whose this is"


def assert_nothing_is_held(ring: ThreadCluster) -> None:
    """Assert that no activations are left on the ranks once they know that all has ended."""
    ring.execute(ring.scheduler._step((), (), (), ()).plan)
    ring.flush()
    for worker in ring.workers:
        assert worker._executor.store is not None
        capture = worker._executor.store.capture
        assert capture is None or capture.held_bytes == 0


def take_activations(found: StoredBlocks) -> RestoreChoice:
    """Project wherever activations are there."""
    blocks = frozenset(range(len(found.lookup.keys)))
    return RestoreChoice(recompute_to=found.lookup.start, takes_activations=blocks)


def check_return(
    checkpoint: Path, num_ranks: int, then: int, share: float, *, keeps_both: bool = False
) -> None:
    """Store a conversation, go on with it on another ring, and store what that computed."""
    prompt = tokens(1, 203)
    with ThreadStores(checkpoint, activation_share=share, keeps_both=keeps_both) as stores:
        with ThreadCluster(
            checkpoint, num_ranks, stores=stores, page_tokens=32, shares=True
        ) as ring:
            prompt += ring.generate(prompt, greedy(8))
            ring.flush()
        before = all_pieces(stores)
        kept = BLOCK * sum(keeps_activations(block, share) for block in range(13))
        assert tokens_in(before, ACTIVATIONS) == kept
        assert tokens_in(before, RAW) == 208 - (0 if keeps_both else kept)
        prompt += tokens(2, 30)
        with ThreadCluster(checkpoint, then, stores=stores, page_tokens=32, shares=True) as ring:
            ring.choose = take_activations
            generation = ring.add(prompt, greedy(8))
            ring.run()
            ring.check_invariants()
            assert_nothing_is_held(ring)
        stores.check_all_returned()
        after = all_pieces(stores)
        prompt_and_answer = prompt + generation.token_ids
        assert_stored_is_right(checkpoint, stores, [prompt_and_answer])

    ((stored, _),) = generation.restored
    encodings = {part.lease.piece.encoding for part in stored.parts}
    assert (ACTIVATIONS in encodings) == (share > 0.0)
    assert generation.num_cached_tokens == 208
    assert_greedy(checkpoint, prompt, generation.token_ids)
    # What came back is stored in no second way.
    assert set(before) <= set(after)
    if not keeps_both:
        assert tokens_in(after, ACTIVATIONS) + tokens_in(after, RAW) == 240


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("family", MHA)
def test_every_family_comes_back(tmp_path: Path, family: str, share: float) -> None:
    """Prompt and answer, of which a share of the blocks is projected into the pages."""
    check_return(write_checkpoint(tmp_path, family, **MHA[family]), 2, 3, share)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (3, 2), (2, 1)])
def test_a_ring_of_any_size_takes_them(
    checkpoint: Path, ranks: tuple[int, int], share: float
) -> None:
    """Each rank had its rows of a block; each block comes back whole to one rank."""
    check_return(checkpoint, *ranks, share)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_both_are_kept_beside_each_other(
    checkpoint: Path, ranks: tuple[int, int], share: float
) -> None:
    """Then whoever restores may choose."""
    check_return(checkpoint, *ranks, share, keeps_both=True)


def test_grouped_heads_may_be_forced(tmp_path: Path) -> None:
    """Activations that are wider than keys and values are a waste, not an error."""
    check_return(write_llama_checkpoint(tmp_path), 2, 2, 0.5)


@pytest.mark.parametrize("rule", ["pass_kv", "pass_q"])
@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_blocks_that_decoding_completed_are_kept(
    checkpoint: Path, num_ranks: int, follows: bool, rule: Rule
) -> None:
    """Rows come one by one, of several answers at once, beside chunks and in bursts."""
    prompts = [tokens(seed, count) for seed, count in ((1, 20), (2, 33), (3, 90))]
    with (
        ThreadStores(checkpoint, activation_share=0.7) as stores,
        ThreadCluster(
            checkpoint,
            num_ranks,
            stores=stores,
            page_tokens=16,
            shares=True,
            rule=rule,
            follows=follows,
            max_num_batched_tokens=40,
            burst_steps=5,
            decode_block_tokens=4,
        ) as ring,
    ):
        generations = [ring.add(prompt, greedy(60)) for prompt in prompts]
        ring.run()
        assert_nothing_is_held(ring)
        whole = [
            [*prompt, *generation.token_ids]
            for prompt, generation in zip(prompts, generations, strict=True)
        ]
        assert_stored_is_right(checkpoint, stores, whole)
        pieces = all_pieces(stores)

    blocks = [block for each in whole for block in range((len(each) - 1) // BLOCK)]
    kept = sum(keeps_activations(block, 0.7) for block in blocks)
    assert tokens_in(pieces, ACTIVATIONS) == kept * BLOCK
    assert tokens_in(pieces, RAW) == (len(blocks) - kept) * BLOCK


@pytest.mark.parametrize("seed", range(6))
def test_rows_computed_with_damaged_ones_are_never_stored(checkpoint: Path, seed: int) -> None:
    """They are void, and their keys name the right ones: nobody could tell them apart."""
    rng = np.random.default_rng(seed)
    share = float(rng.choice([0.4, 1.0]))
    ranks, then = (int(count) for count in rng.integers(1, 4, 2))
    prompt = tokens(seed, 130)
    with ThreadStores(checkpoint, activation_share=share) as stores:
        with ThreadCluster(checkpoint, ranks, stores=stores, page_tokens=16, shares=True) as ring:
            prompt += ring.generate(prompt, greedy(8))
            ring.flush()
        stores.flip_bits(rng, 4)
        prompt += tokens(seed + 1, 60)
        with ThreadCluster(
            checkpoint,
            then,
            stores=stores,
            page_tokens=16,
            shares=True,
            max_num_batched_tokens=int(rng.choice([40, 8192])),
        ) as ring:
            generation = ring.add(prompt, greedy(20))
            ring.run()
            assert_nothing_is_held(ring)
        dropped = sum(store.stats()["host"]["dropped"] for store in stores.stores)
        for store in stores.stores:
            store.verify()  # what was damaged and never read
        assert_stored_is_right(checkpoint, stores, [prompt + generation.token_ids])

    assert dropped > 0
    assert_greedy(checkpoint, prompt, generation.token_ids)


@pytest.mark.parametrize("layer", [0, 1])
def test_damaged_activations_are_computed_again(checkpoint: Path, layer: int) -> None:
    """In the middle of what comes back: from there on all is void."""
    prompt = tokens(1, 130)
    with ThreadStores(checkpoint, activation_share=0.5) as stores:
        with ThreadCluster(checkpoint, 2, stores=stores, page_tokens=16, shares=True) as ring:
            prompt += ring.generate(prompt, greedy(8))
            ring.flush()
        [store], [info] = stores.stores, stores.infos
        keys = stores.keys.keys("", np.array(prompt, dtype=np.int32), [])
        block = next(n for n in range(3, 8) if keeps_activations(n, 0.5))
        piece = next(each for each in pieces_of(store) if each.key == keys[block])
        entry = store._host._directory._visible[piece]
        where = record_of(piece, stores.layout)
        with Path(info.arena_path).open("r+b") as file:
            file.seek(entry.offset_bytes + where.payload_offset + layer * where.layer_bytes + 7)
            file.write(b"\x55")
        with ThreadCluster(checkpoint, 2, stores=stores, page_tokens=16, shares=True) as ring:
            generation = ring.add(prompt, greedy(8))
            steps = ring.run()
            ring.flush()
            ring.check_invariants()
        stores.check_all_returned()

    bad_from = {result.sequences[0].bad_from for result in steps[0][1]} - {None}
    assert bad_from == {block * BLOCK + piece.start}
    assert_greedy(checkpoint, prompt, generation.token_ids)


def test_what_finds_no_room_is_stored_as_keys_and_values(checkpoint: Path) -> None:
    """A block may then be of both kinds, and comes back all the same."""
    prompt = tokens(1, 130)
    with ThreadStores(checkpoint, activation_share=1.0) as stores:
        with ThreadCluster(
            checkpoint, 2, stores=stores, page_tokens=16, shares=True, max_num_batched_tokens=40
        ) as ring:
            for worker in ring.workers:
                assert worker._executor.store is not None
                capture = worker._executor.store.capture
                assert capture is not None
                capture._max_bytes = 13 * 2 * 64 * 4  # 13 rows
            prompt += ring.generate(prompt, greedy(20))
            assert_nothing_is_held(ring)
        pieces = all_pieces(stores)
        with ThreadCluster(checkpoint, 3, stores=stores, page_tokens=16, shares=True) as ring:
            generation = ring.add(prompt, greedy(8))
            ring.run()
        assert_stored_is_right(checkpoint, stores, [prompt + generation.token_ids])

    kinds = [
        {piece.encoding for piece in pieces if piece.key == key}
        for key in {piece.key for piece in pieces}
    ]
    assert {RAW, ACTIVATIONS} in kinds
    assert generation.num_cached_tokens == 144
    assert_greedy(checkpoint, prompt, generation.token_ids)
