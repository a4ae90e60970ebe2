"""Every sampling parameter against a slow and obvious reference on transformers' logits.

The reference says, from the tokens so far, which one comes next: in numpy and
float64, one vocabulary at a time, in vLLM's order of work. The random numbers
are the engine's own; what they are worth is tested in test_models_sampling.py.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from actors.draws import make_draw
from actors.messages import SequenceResult
from actors.plans import prefill_plan
from models.draw import answer_seed, draw_noise
from models.logprobs import TokenLogprobs, join_logprobs
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import oracle_logits
from tests.thread_cluster import ThreadCluster

Numbers = npt.NDArray[np.float64]
EOS = 2
PROMPT = [5, 17, 17, 300, 42, 9, 5, 401, 88, 23, 17]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"), initializer_range=0.15)


@pytest.fixture(scope="module", params=[1, 3])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ThreadCluster]:
    with ThreadCluster(checkpoint, request.param, burst_steps=7) as cluster:
        yield cluster


def reference_token(
    logits: Numbers,
    prompt: Sequence[int],
    answer: Sequence[int],
    params: SamplingParams,
    bad_words: Sequence[Sequence[int]] = (),
) -> int:
    """Return the token that vLLM's rules choose after ``prompt`` and ``answer``."""
    logits = logits.copy()
    for word in bad_words:
        before = list(word[:-1])
        if len(answer) >= len(before) and list(answer[len(answer) - len(before) :]) == before:
            logits[word[-1]] = -np.inf
    if len(answer) < params.min_tokens:
        logits[EOS] = -np.inf
        for token in params.stop_token_ids or ():
            logits[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in answer:
        logits[token] -= params.frequency_penalty
    for token in set(answer):
        logits[token] -= params.presence_penalty
    if params.temperature == 0:
        return int(logits.argmax())
    assert params.seed is not None
    kept = reference_filters(logits / params.temperature, params)
    noise = draw_noise(len(logits), params.seed, len(answer)).numpy()
    chances = {token: np.exp(logits[token] / params.temperature) / noise[token] for token in kept}
    return max(chances, key=lambda token: float(chances[token]))


def reference_filters(logits: Numbers, params: SamplingParams) -> list[int]:
    """Return the tokens that may be drawn, the likeliest first."""
    likeliest = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = [token for token in likeliest if logits[token] > -np.inf]
    best = logits[kept[0]]
    kept = [token for token in kept if np.exp(logits[token] - best) >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total = sum(np.exp(logits[token] - best) for token in kept)
    nucleus, probability = [], 0.0
    for token in kept:
        nucleus.append(token)
        probability += np.exp(logits[token] - best) / total
        if probability >= params.top_p:
            break
    return nucleus


def assert_follows_reference(
    checkpoint: Path,
    prompt: Sequence[int],
    answer: Sequence[int],
    params: SamplingParams,
    bad_words: Sequence[Sequence[int]] = (),
) -> None:
    """Assert that each token of an answer is the reference's, given those before it."""
    ids = [*prompt, *answer]
    logits = oracle_logits(checkpoint, ids[:-1], len(answer)).double().numpy()
    wanted = [
        reference_token(logits[index], prompt, answer[:index], params, bad_words)
        for index in range(len(answer))
    ]
    assert list(answer) == wanted


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.5},
    "top_p of almost none": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "all filters": {"temperature": 1.5, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
    "repetition": {"repetition_penalty": 2.5, "temperature": 0.4},
    "repetition wanted": {"repetition_penalty": 0.4, "temperature": 0.0},
    "presence": {"presence_penalty": 2.0, "temperature": 0.3},
    "presence wanted": {"presence_penalty": -2.0, "temperature": 0.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.0},
    "frequency wanted": {"frequency_penalty": -2.0},
    "all penalties": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "temperature": 0.8,
    },
    "bias": {"logit_bias": {77: 4.0, 78: 3.5, 5: -100.0}},
    "greedy bias": {"logit_bias": {77: 4.0, 78: -3.5}, "temperature": 0.0},
    "min_tokens": {"min_tokens": 20, "logit_bias": {EOS: 8.0}, "ignore_eos": False},
    "min_tokens with stop tokens": {
        "min_tokens": 12,
        "stop_token_ids": [77, 78],
        "logit_bias": {77: 8.0, 78: 8.0},
        "ignore_eos": True,
    },
    "everything": {
        "temperature": 1.3,
        "min_p": 0.01,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 2.0},
        "min_tokens": 5,
    },
}


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_reference(
    cluster: ThreadCluster, checkpoint: Path, case: str, seed: int
) -> None:
    """Over bursts and ranks: the sampling rank must know all tokens so far."""
    params = SamplingParams(**{"max_tokens": 30, "seed": seed, "ignore_eos": True, **CASES[case]})

    answer = cluster.generate(PROMPT, params)

    assert_follows_reference(checkpoint, PROMPT, answer, params)
    if params.min_tokens:
        assert len(answer) > params.min_tokens
    else:
        assert len(answer) == 30


def test_each_case_makes_a_difference(cluster: ThreadCluster) -> None:
    """A parameter that changes no token of these answers would not be tested by them."""

    @functools.cache
    def plain(temperature: float) -> list[int]:
        params = SamplingParams(max_tokens=30, seed=0, temperature=temperature, ignore_eos=True)
        return cluster.generate(PROMPT, params)

    idle = []
    for case, settings in CASES.items():
        params = SamplingParams(**{"max_tokens": 30, "seed": 0, "ignore_eos": True, **settings})
        if cluster.generate(PROMPT, params) == plain(params.temperature):
            idle.append(case)
    assert idle == ["plain", "cold", "hot", "top_k beyond the vocabulary"]
    assert len({tuple(plain(temperature)) for temperature in (0.0, 0.3, 1.0, 2.5)}) == 4


def test_bad_words_are_never_completed(cluster: ThreadCluster, checkpoint: Path) -> None:
    """One token is barred; of two the second, and only after the first."""
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    free = cluster.generate(PROMPT, greedy)
    bad_words = ((free[0],), (free[5], free[6]), (free[9], free[10], free[11]), (free[3], 499))

    answer = cluster.generate(PROMPT, greedy, bad_words=bad_words)

    assert_follows_reference(checkpoint, PROMPT, answer, greedy, bad_words)
    assert answer != free
    for word in bad_words:
        assert not any(
            tuple(answer[begin : begin + len(word)]) == word for begin in range(len(answer))
        )


def test_same_seed_same_tokens_whatever_ran_before(cluster: ThreadCluster) -> None:
    """Nor does another filter change the random numbers."""
    params = SamplingParams(max_tokens=12, seed=5, top_p=0.9, frequency_penalty=0.5)
    first = cluster.generate(PROMPT, params)

    cluster.generate([1, 2, 3], SamplingParams(max_tokens=5, seed=5, presence_penalty=1.0))

    assert cluster.generate(PROMPT, params) == first
    wide = SamplingParams(max_tokens=12, seed=5, top_p=0.999999, frequency_penalty=0.5)
    widest = SamplingParams(max_tokens=12, seed=5, frequency_penalty=0.5)
    assert cluster.generate(PROMPT, wide) == cluster.generate(PROMPT, widest)


def test_interrupted_answer_goes_on_as_if_it_had_not_been(cluster: ThreadCluster) -> None:
    """All that the sampling rank keeps can be had from the tokens again."""
    params = SamplingParams(
        max_tokens=20,
        seed=3,
        frequency_penalty=1.0,
        repetition_penalty=1.3,
        min_tokens=15,
        ignore_eos=True,
    )
    answer = cluster.generate(PROMPT, params)

    for done in (1, 6, 17):
        ids = np.asarray([*PROMPT, *answer[:done]], dtype=np.int32)
        plan = prefill_plan(
            10**6,
            ids,
            cluster.num_ranks,
            draw=make_draw(params, 3, (EOS,)),
            context_ids=ids,
            answer_tokens=done,
        )
        (sequence,) = cluster.execute(plan)[0].sequences
        assert sequence.token_ids == (answer[done],)
    for worker in cluster.workers:
        worker._pool.table.release(10**6)
        worker._executor._sampler.forget(10**6)


def test_a_batch_draws_what_each_draws_alone(cluster: ThreadCluster) -> None:
    """Greedy rows are chosen together and others one by one, side by side in one step."""
    asks = [
        SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=1.3, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=0.0, repetition_penalty=1.4, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
    ]
    prompts = [[*range(number + 3, 40)] for number in range(len(asks))]
    alone = [cluster.generate(prompt, params) for prompt, params in zip(prompts, asks, strict=True)]

    begun = [cluster.add(prompt, params) for prompt, params in zip(prompts, asks, strict=True)]
    cluster.run()

    assert [generation.token_ids for generation in begun] == alone


def test_released_sequences_are_forgotten(cluster: ThreadCluster) -> None:
    """Counts are as long as the vocabulary; they must not pile up."""
    for _ in range(3):
        cluster.generate(PROMPT, SamplingParams(max_tokens=2, seed=0, presence_penalty=1.0))
    cluster.generate(PROMPT)

    for worker in cluster.workers:
        assert worker._executor._sampler._histories == {}


def test_answers_of_one_prompt_differ_and_do_not_depend_on_their_number() -> None:
    """Answer 0 has the request's own seed; neighbouring seeds share no answer."""
    seeds = {answer_seed(seed, index) for seed in range(50) for index in range(20)}

    assert len(seeds) == 1000
    assert answer_seed(7, 0) == 7


@pytest.mark.parametrize("count", [0, 1, 5, -1])
def test_logprobs_equal_transformers(cluster: ThreadCluster, checkpoint: Path, count: int) -> None:
    """Of the model alone: neither penalties nor temperature nor filters change them."""
    params = SamplingParams(
        max_tokens=20,
        seed=1,
        temperature=2.0,
        top_k=50,
        frequency_penalty=2.0,
        logprobs=count,
        ignore_eos=True,
    )

    results = cluster.results(PROMPT, params)

    answer = [token for result in results for token in result[0].token_ids]
    assert answer == cluster.generate(PROMPT, params)
    rows = join_logprobs([_given(result) for result in results])
    assert_logprobs(checkpoint, [*PROMPT, *answer], len(answer), rows, count)


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_prompt_logprobs_equal_transformers(
    cluster: ThreadCluster,
    checkpoint: Path,
    length: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank tells of its own rows, and holds the logits of a few of them at a time."""
    monkeypatch.setattr("models.logprobs.LOGITS_BYTES", 7 * 4 * 500)
    held = _record_rows(cluster, monkeypatch)
    prompt = np.random.default_rng(length).integers(0, 500, length).tolist()
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=count, ignore_eos=True)

    prefill = cluster.results(prompt, params)[0]

    assert max(held) <= 7
    rows = [result.prompt_logprobs for result in prefill]
    in_order = _in_order([part for part in rows if part is not None], length)
    assert len(in_order.ranks_T) == length - 1
    if length > 1:
        assert_logprobs(checkpoint, prompt, length - 1, in_order, count)


def assert_logprobs(
    checkpoint: Path, ids: Sequence[int], last: int, rows: TokenLogprobs, count: int
) -> None:
    """Assert that rows are about the last tokens of ``ids``, and equal transformers'."""
    wanted = oracle_logits(checkpoint, ids[:-1], last).double().log_softmax(-1).numpy()
    tokens = ids[len(ids) - last :]
    likeliest = 500 if count < 0 else count
    assert rows.token_ids_TL.shape == rows.logprobs_TL.shape == (last, 1 + likeliest)
    assert rows.token_ids_TL[:, 0].tolist() == list(tokens)
    np.testing.assert_allclose(
        rows.logprobs_TL, np.take_along_axis(wanted, rows.token_ids_TL, 1), rtol=0, atol=1e-4
    )
    best = -np.sort(-wanted, axis=1)[:, :likeliest]
    np.testing.assert_allclose(rows.logprobs_TL[:, 1:], best, rtol=0, atol=1e-4)
    for row, token, rank in zip(wanted, tokens, rows.ranks_T.tolist(), strict=True):
        # Logits that are equal but for rounding may change places.
        assert (row > row[token] + 1e-5).sum() < rank <= (row >= row[token] - 1e-5).sum()


def _given(results: Sequence[SequenceResult]) -> TokenLogprobs:
    """The log-probabilities of a step; only the sampling rank tells them."""
    (rows,) = (result.logprobs for result in results if result.logprobs is not None)
    return rows


def _in_order(of_ranks: Sequence[TokenLogprobs], length: int) -> TokenLogprobs:
    from attention import Zigzag

    zigzag = Zigzag(num_tokens=length, num_ranks=len(of_ranks))
    rows = join_logprobs(of_ranks)
    indices = torch.cat([zigzag.indices(rank) for rank in range(len(of_ranks))])
    order = indices[indices < length - 1].argsort().numpy()
    return TokenLogprobs(
        token_ids_TL=rows.token_ids_TL[order],
        logprobs_TL=rows.logprobs_TL[order],
        ranks_T=rows.ranks_T[order],
    )


def _record_rows(cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of every piece of logits."""
    held: list[int] = []
    for worker in cluster.workers:
        logits = worker._decoder.logits

        def record(hidden: Any, logits: Any = logits) -> Any:
            held.append(len(hidden))
            return logits(hidden)

        monkeypatch.setattr(worker._decoder, "logits", record)
    return held
