"""Tokens of the ring equal transformers' on the same weights, over everything that may differ."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.messages import DecodeRow
from actors.running import Running
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy, oracle_logits
from tests.thread_cluster import ThreadCluster

LENGTHS = (1, 2, 5, 63, 1000, 4097)
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    return write_llama_checkpoint(directory, **SHAPES[request.param])


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ThreadCluster]:
    with ThreadCluster(checkpoint, request.param) as cluster:
        yield cluster


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_answer_equals_transformers(
    cluster: ThreadCluster, checkpoint: Path, length: int
) -> None:
    """Any prompt length, shorter than 2N too, followed by two decode blocks and more."""
    rng = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, 500, (length,), generator=rng).tolist()

    answer = cluster.generate(
        prompt, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    )

    assert len(answer) == 40
    assert_greedy(checkpoint, prompt, answer)
    cluster.check_invariants()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_no_further_from_float32_than_transformers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Partials are merged in float32, so the ring adds no error of its own."""
    checkpoint = write_llama_checkpoint(tmp_path, dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (600,), generator=rng).tolist()
    exact = oracle_logits(checkpoint, ids, len(ids))
    theirs = oracle_logits(checkpoint, ids, len(ids), dtype).float()

    for num_ranks in (1, 3):
        with ThreadCluster(checkpoint, num_ranks) as cluster:
            ours = cluster.logits(ids)
        assert (ours - exact).square().mean() <= 1.05 * (theirs - exact).square().mean()


def test_decoded_positions_one_too_high_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that copied answers would survive: the tests above must be red with it."""
    checkpoint = write_llama_checkpoint(tmp_path)
    right = Running.row

    def one_too_high(self: Running, owners: tuple[int, ...], ahead: int = 0) -> DecodeRow:
        row = right(self, owners, ahead)
        return dataclasses.replace(row, position=row.position + 1)

    monkeypatch.setattr(Running, "row", one_too_high)
    prompt = list(range(100, 140))
    with ThreadCluster(checkpoint, 2) as cluster:
        answer = cluster.generate(prompt)
    with pytest.raises(AssertionError, match="transformers says"):
        assert_greedy(checkpoint, prompt, answer)


def test_decode_blocks_may_be_of_any_length(tmp_path: Path) -> None:
    """The spread of decoded KV over the ranks has no influence on the answer."""
    checkpoint = write_llama_checkpoint(tmp_path)
    prompt = list(range(100, 140))
    for decode_block_tokens, burst_steps in ((1, 1), (1, 7), (5, 16), (64, 3)):
        with ThreadCluster(
            checkpoint, 3, decode_block_tokens=decode_block_tokens, burst_steps=burst_steps
        ) as cluster:
            assert_greedy(checkpoint, prompt, cluster.generate(prompt))
