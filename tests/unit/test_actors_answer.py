"""What an answer tells of what came back from the KV stores."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from actors.answer import Answer, joint_restored
from actors.generation import Generation
from actors.kv.messages import (
    Lease,
    RestoreChoice,
    RestorePart,
    RestoreTimes,
    StoredPrefix,
    Tier,
)
from actors.kv.pieces import PieceId
from actors.messages import DecodeRow, PrefillChunk, SequenceResult
from actors.records import Restored, StepRecord
from models.logprobs import TokenLogprobs
from models.sampling import SamplingParams

PARTS: list[tuple[int, int, Tier]] = [(0, 64, "host"), (64, 128, "disk"), (128, 192, "disk")]


def restore_part(start: int, end: int, tier: Tier) -> RestorePart:
    piece = PieceId(b"k" * 32, 0, end - start, "act" if start == 64 else "raw")
    lease = Lease(lease_id=1, piece=piece, offset_bytes=0, size_bytes=1)
    return RestorePart(rank=0, start=start, end=end, block_start=start, lease=lease, tier=tier)


def restored(bad_from: int | None) -> Restored | None:
    """Return what an answer tells of a restore of which rows from ``bad_from`` on are damaged."""
    parts = tuple(restore_part(*part) for part in PARTS)
    stored = StoredPrefix(
        start=0,
        end=192,
        home=None,
        parts=parts,
        leases={},
        tokens_by_tier={},
        choice=RestoreChoice(recompute_to=0, predicted_s=2.0, alternatives_s={"kv": 3.0}),
        begin_s=time.perf_counter() - 1.0,
        find_s=0.0021,
        stage_s=0.03,
    )
    generation = Generation(
        sequence_id=1,
        prompt=np.arange(200, dtype=np.int32),
        params=SamplingParams(max_tokens=1),
        seed=0,
        eos_ids=(),
        max_model_len=1000,
    )
    generation.take_restored(stored, 192)
    chunk = PrefillChunk(
        sequence_id=1,
        token_ids=np.arange(8, dtype=np.int32),
        cached_rows=(96, 96),
        home=None,
        first_rank=0,
        draw=None,
        behind_restored=True,
    )
    record = StepRecord(
        number=0,
        phase="prefill",
        sequence_ids=(1,),
        prefill_tokens=8,
        decode_tokens=0,
        cached_tokens=192,
        algorithm="pass_q",
        num_ranks=2,
        predicted_s=None,
        prices_s={},
        plan_s=0.0,
        wall_s=0.1,
        ranks_wall_s=(0.4, 0.4),
        ranks_parts_s=({"restore": 0.001}, {"restore": 0.0093, "gemm": 1.0}),
    )

    async def take() -> Restored | None:
        answer = Answer(generation, None)
        times = RestoreTimes(activation_tokens=64, link_bytes=500, link_s=0.2, project_s=0.3)
        results = [
            SequenceResult(token_ids=(), bad_from=bad_from, restore=times),
            SequenceResult(token_ids=(), restore=times),
        ]
        answer.take(record, chunk, results)
        return joint_restored([answer])

    return asyncio.run(take())


def test_tiers_and_times_of_a_restore_are_told() -> None:
    """What the slowest rank waited is what the restore cost beside its staging."""
    told = restored(None)

    assert told is not None
    assert (told.tokens, told.tokens_by_tier) == (192, {"host": 64, "disk": 128})
    assert (told.projected_tokens, told.link_bytes, told.predicted_s) == (64, 1000, 2.0)
    assert told.measured_s >= 1.0
    told = replace(told, measured_s=1.25, link_idle=0.8, device_idle=0.3)
    assert told.line() == (
        "restored 192 tokens: 64 from host, 128 from disk, 64 projected from layer inputs; in"
        " 1250.0 ms, predicted 2000.0 (alone: kv 3000.0); found in 2.1 ms, staged in 30.0 ms,"
        " waited for 9.3 ms; idle: link 80%, device 30%"
    )


def test_idle_shares_are_those_of_the_ranks() -> None:
    """A device that waits for a layer is idle, unless it projects meanwhile."""
    told = restored(None)

    assert told is not None
    busy_s = 0.4 - (0.001 + 0.0093) / 2 + 0.3
    assert told.device_idle == pytest.approx(1 - busy_s / told.measured_s)
    assert told.link_idle == pytest.approx(1 - 0.2 / told.measured_s)


@pytest.mark.parametrize(
    ("bad_from", "tiers"), [(0, None), (64, {"host": 64}), (128, {"host": 64, "disk": 64})]
)
def test_what_was_damaged_is_not_told_as_restored(
    bad_from: int, tiers: dict[Tier, int] | None
) -> None:
    """Its tokens were computed anew; where nothing was left there was no restore."""
    told = restored(bad_from)

    assert (None if told is None else told.tokens_by_tier) == tiers


def test_restores_of_several_answers_are_added() -> None:
    """A preempted answer, or one of several, may come back more than once."""
    one, other = restored(None), restored(64)
    assert one is not None
    assert other is not None
    told = one + other

    assert (told.tokens, told.tokens_by_tier) == (256, {"host": 128, "disk": 128})
    assert told.copy_s == pytest.approx(2 * 0.0093)


def test_deltas_tell_each_log_probability_once() -> None:
    """A stream tells what the whole answer does, and nothing of tokens beyond its end."""

    async def deltas() -> None:
        generation = Generation(
            sequence_id=1,
            prompt=np.arange(4, dtype=np.int32),
            params=SamplingParams(max_tokens=3, logprobs=1, stop_token_ids=[9]),
            seed=0,
            eos_ids=(),
            max_model_len=100,
        )
        generation.num_cached_tokens = 2
        answer = Answer(generation, None)
        told = []
        for tokens in ((5, 6), (9, 7)):
            generation.advance(tokens)
            result = SequenceResult(token_ids=tokens, logprobs=rows(tokens))
            answer.take(decode_record(), decode_row(generation), [result])
            told.append(answer.delta("request", 0, str))

        whole = answer.completion(0, str)
        assert [each.token_ids for each in told if each] == [(5, 6), (9,)]
        assert whole.logprobs is not None
        assert [p for each in told if each for p in each.logprobs or ()] == list(whole.logprobs)
        assert [list(place) for place in whole.logprobs] == [[5, 0], [6, 0], [9, 0]]
        assert {(each.prompt_tokens, each.num_cached_tokens) for each in told if each} == {(4, 2)}

    asyncio.run(deltas())


def rows(tokens: tuple[int, ...]) -> TokenLogprobs:
    """Return log-probabilities of tokens, with token 0 as the likeliest beside each."""
    count = len(tokens)
    return TokenLogprobs(
        token_ids_TL=np.array([[token, 0] for token in tokens], dtype=np.int32),
        logprobs_TL=np.array([[-1.0 - token, -0.5] for token in tokens], dtype=np.float32),
        ranks_T=np.full(count, 2, dtype=np.int32),
    )


def decode_row(generation: Generation) -> DecodeRow:
    return DecodeRow(
        sequence_id=1,
        token_id=None,
        position=4,
        index=0,
        owners=(0,),
        home=0,
        sampling_rank=0,
        draw=generation.draw,
    )


def decode_record() -> StepRecord:
    return StepRecord(
        number=1,
        phase="decode",
        sequence_ids=(1,),
        prefill_tokens=0,
        decode_tokens=2,
        cached_tokens=4,
        algorithm="pass_q",
        num_ranks=1,
        predicted_s=None,
        prices_s={},
        plan_s=0.0,
        wall_s=0.1,
        ranks_wall_s=(0.1,),
        ranks_parts_s=({},),
    )
