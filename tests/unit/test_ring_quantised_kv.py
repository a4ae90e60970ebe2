"""With quantised KV an answer depends on nothing but its tokens: not on ring, chunks or algorithm.

Rounding to codes makes a difference of float32's last bit one of a whole step, now and
then, in one of many values. So tokens are equal but for ties of that size, far below what
the encoding itself costs.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.logprobs import TokenLogprobs, join_logprobs
from models.page_pool import KVCacheDtype
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.thread_cluster import ThreadCluster

# Largest difference of a logit for values that were rounded the other way; what the encodings
# cost this model is a hundred times as much (1.2 and 5.4 at worst).
FLIPS: dict[KVCacheDtype, float] = {"int8": 0.01, "fp8": 0.05}
PROMPT = torch.randint(0, 500, (700,), generator=torch.Generator().manual_seed(0)).tolist()
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["int8", "fp8"])
def kv_cache_dtype(request: pytest.FixtureRequest) -> KVCacheDtype:
    dtype: KVCacheDtype = request.param
    return dtype


@pytest.fixture(scope="module")
def alone(checkpoint: Path, kv_cache_dtype: KVCacheDtype) -> Iterator[ThreadCluster]:
    """One rank, which computes the prompt in one step."""
    with ThreadCluster(checkpoint, 1, kv_cache_dtype=kv_cache_dtype) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(alone: ThreadCluster) -> TokenLogprobs:
    return answer(alone)


def answer(
    cluster: ThreadCluster, prompt: Sequence[int] = PROMPT, *, cached_tokens: int = 0
) -> TokenLogprobs:
    """Return the log-probabilities of the whole vocabulary at each token of a greedy answer."""
    generation = cluster.add(prompt, PARAMS)
    told = [each.sequences[0].logprobs for _, results in cluster.run() for each in results]
    assert generation.num_cached_tokens == cached_tokens
    return join_logprobs([logprobs for logprobs in told if logprobs is not None])


def by_token(logprobs: TokenLogprobs, step: int) -> np.ndarray:
    """Return one step's log-probabilities in order of token ids."""
    order = logprobs.token_ids_TL[step, 1:].argsort()
    return logprobs.logprobs_TL[step, 1:][order]


def assert_same_answer(
    expected: TokenLogprobs, found: TokenLogprobs, kv_cache_dtype: KVCacheDtype
) -> None:
    """Compare step by step, up to a first difference of tokens, which must be a tie."""
    assert len(found.token_ids_TL) == len(expected.token_ids_TL) == PARAMS.max_tokens
    for step in range(PARAMS.max_tokens):
        one, other = by_token(expected, step), by_token(found, step)
        assert np.abs(one - other).max() < FLIPS[kv_cache_dtype]
        if expected.token_ids_TL[step, 0] != found.token_ids_TL[step, 0]:
            return


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ring_computes_what_one_rank_does(
    checkpoint: Path, kv_cache_dtype: KVCacheDtype, alone: ThreadCluster, num_ranks: int
) -> None:
    """Every position's logits, in one prefill."""
    with ThreadCluster(checkpoint, num_ranks, kv_cache_dtype=kv_cache_dtype) as cluster:
        logits_TV = cluster.logits(PROMPT)

    difference = (logits_TV - alone.logits(PROMPT)).abs().max()
    assert difference < FLIPS[kv_cache_dtype]


EVERY_DAY = ((1, 37, "pass_kv"), (2, 100, "pass_q"), (3, 100, "pass_kv"))
CAMPAIGN = itertools.product((1, 2, 3, 4), (0, 100, 37, 5), ("pass_kv", "pass_q"))


@pytest.mark.parametrize(
    ("num_ranks", "longest", "rule"),
    [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.campaign) for case in CAMPAIGN)],
)
def test_answer_depends_on_neither_ring_nor_chunks(
    checkpoint: Path,
    kv_cache_dtype: KVCacheDtype,
    expected: TokenLogprobs,
    num_ranks: int,
    longest: int,
    rule: Any,
) -> None:
    """A later chunk reads decoded rows: what a step attends to itself must be the same ones."""
    with ThreadCluster(
        checkpoint,
        num_ranks,
        kv_cache_dtype=kv_cache_dtype,
        rule=rule,
        long_prefill_token_threshold=longest,
    ) as cluster:
        assert_same_answer(expected, answer(cluster), kv_cache_dtype)
        cluster.check_invariants()


def test_a_second_turn_goes_on_where_the_first_ended(
    checkpoint: Path, kv_cache_dtype: KVCacheDtype
) -> None:
    """Its shared pages hold codes; they are copied as these, and answer as if computed anew."""
    turn = [*PROMPT, *PROMPT[:100]]
    answers = []
    for shares in (False, True):
        with ThreadCluster(checkpoint, 2, kv_cache_dtype=kv_cache_dtype, shares=shares) as cluster:
            cluster.generate(PROMPT)
            cached_tokens = len(PROMPT) if shares else 0
            answers.append(answer(cluster, turn, cached_tokens=cached_tokens))

    assert_same_answer(answers[0], answers[1], kv_cache_dtype)


def test_loss_is_that_of_the_encoding(
    checkpoint: Path, kv_cache_dtype: KVCacheDtype, alone: ThreadCluster
) -> None:
    """Not none, or nothing is quantised; and not so much that something else is wrong."""
    with ThreadCluster(checkpoint, 1) as lossless:
        exact_TV, found_TV = lossless.logits(PROMPT), alone.logits(PROMPT)

    error = (found_TV - exact_TV).square().mean().sqrt() / exact_TV.std()
    assert 0.01 < error < {"int8": 0.06, "fp8": 0.25}[kv_cache_dtype]


def test_half_the_bytes_hold_a_token(checkpoint: Path, kv_cache_dtype: KVCacheDtype) -> None:
    """What a rank reports decides how many pages it gets."""
    reported = []
    for dtype in ("auto", kv_cache_dtype):
        with ThreadCluster(checkpoint, 1, kv_cache_dtype=dtype, num_pages=1) as cluster:
            reported.append(cluster.workers[0].load().kv_bytes_per_token)

    assert reported == [2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * (16 + 4)]
