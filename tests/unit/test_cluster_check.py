"""What `ringspan check` compares, and when it says that a ring is wrong."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from actors.messages import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from cluster.check import PASSAGE_TOKENS, Comparison, compare, passages, report
from cluster.check_loss import Loss, compare_predictions, describe, text_prompt
from models.errors import PromptError


def output(token_ids: tuple[int, ...], steps: list[dict[int, float]]) -> RequestOutput:
    """An answer with these log-probabilities listed at each step."""
    logprobs = tuple(
        {
            token_id: Logprob(logprob=value, rank=1, decoded_token="")
            for token_id, value in step.items()
        }
        for step in steps
    )
    completion = CompletionOutput(
        index=0, text="", token_ids=token_ids, finish_reason="length", logprobs=logprobs
    )
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=(1, 2, 3),
        outputs=(completion,),
        num_cached_tokens=0,
        metrics=RequestMetrics(queue_s=0.0, ttft_s=0.0, total_s=0.0),
        steps=(),
    )


ALONE = output((7, 8), [{7: -0.1, 9: -3.0}, {8: -0.5, 6: -0.50005}])


def test_equal_answers_differ_by_rounding() -> None:
    ring = output((7, 8), [{7: -0.1001, 9: -3.0}, {8: -0.5, 6: -0.50005}])
    compared = compare(ALONE, ring, "pass_q")
    assert compared == Comparison(
        algorithm="pass_q",
        cached_tokens=0,
        prompt_tokens=3,
        answer_tokens=2,
        equal_tokens=2,
        gap=0.0,
        logprob_error=pytest.approx(1e-4),  # type: ignore[arg-type]
    )
    assert compared.is_right(1e-3)


def test_another_token_is_right_only_at_a_tie() -> None:
    """The gap is one rank's own; a token that it does not even list is no tie."""
    tie = compare(ALONE, output((7, 6), [{7: -0.1}, {6: -0.5, 8: -0.5}]), "pass_q")
    assert tie.equal_tokens == 1
    assert tie.gap == pytest.approx(5e-5)
    assert tie.is_right(1e-3)

    other = compare(ALONE, output((7, 5), [{7: -0.1}, {5: -0.5, 8: -0.5}]), "pass_q")
    assert not other.is_right(1e-3)


def test_equal_tokens_with_other_logprobs_are_wrong() -> None:
    """A wrong merge moves probabilities before it moves the best token."""
    assert not compare(ALONE, output((7, 8), [{7: -0.2}, {8: -0.5}]), "pass_q").is_right(1e-3)


@pytest.mark.parametrize("length", [1, 2, 5, 63, 1000, 4097])
def test_passages_return_far_from_where_they_stood(length: int) -> None:
    ids = passages(length, vocab_size=50_000, seed=0)

    assert len(ids) == length
    assert ids == passages(length, 50_000, seed=0) != passages(length, 50_000, seed=1)
    if length >= 10 * PASSAGE_TOKENS:
        ending = ids[-(PASSAGE_TOKENS // 2) :]
        for start in (length // 50, length // 2):
            np.testing.assert_array_equal(ids[start : start + len(ending)], ending)


def test_the_verdict_is_a_sentence_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    right = compare(ALONE, ALONE, "pass_q")
    wrong = compare(ALONE, output((7, 5), [{7: -0.1}, {5: -0.5, 8: -0.5}]), "pass_kv")
    options = argparse.Namespace(json=False, model="m")

    assert report(options, [right], 2, "float32", 1e-3, None) == 0
    assert "a ring of 2 ranks gives this model's own answers" in capsys.readouterr().out

    assert report(options, [right, wrong], 2, "float32", 1e-3, None) == 1
    told = capsys.readouterr().out
    assert told.count("WRONG") == 1
    assert "a ring of 2 ranks does NOT give this model's answers" in told


def test_a_comparison_is_json() -> None:
    assert dataclasses.asdict(compare(ALONE, ALONE, "pass_q"))["logprob_error"] == 0.0


def predictions(*positions: dict[int, float]) -> list[dict[int, Logprob] | None]:
    """Log-probabilities of a prompt's tokens, as a request tells them; none of the first one."""
    listed: list[dict[int, Logprob] | None] = [None]
    for position in positions:
        order = sorted(position, key=position.__getitem__, reverse=True)
        listed.append(
            {
                token_id: Logprob(logprob=value, rank=1 + order.index(token_id), decoded_token=None)
                for token_id, value in position.items()
            }
        )
    return listed


def test_loss_is_what_predictions_differ_by() -> None:
    """At every position, over the tokens that both list."""
    exact = predictions({5: -4.0, 7: -0.1, 9: -3.0}, {8: -0.5, 6: -0.6})
    lossy = predictions({5: -4.3, 7: -0.1, 9: -3.0}, {8: -0.9, 6: -0.6})

    assert compare_predictions("device=int8", exact, lossy) == Loss(
        exactness="device=int8",
        positions=2,
        max_logit_error=pytest.approx(0.4),  # type: ignore[arg-type]
        rms_logit_error=pytest.approx((0.25 / 5) ** 0.5),  # type: ignore[arg-type]
        top1_agreement=0.5,
    )


def test_exact_predictions_lose_nothing() -> None:
    same = predictions({5: -4.0, 7: -0.1})

    assert compare_predictions("lossless", same, same) == Loss("lossless", 1, 0.0, 0.0, 1.0)


def test_token_that_fell_off_the_list_counts() -> None:
    """It became at least as unlikely as the least likely one there: the largest errors of all."""
    exact = predictions({7: -0.1, 9: -3.0})
    lossy = predictions({7: -0.1, 4: -8.0})

    assert compare_predictions("device=fp8", exact, lossy).max_logit_error == pytest.approx(5.0)


def test_the_prompts_own_token_bounds_nothing() -> None:
    """It is listed even as the unlikeliest of all, far below those that fell off the list."""
    own = Logprob(logprob=-30.0, rank=500, decoded_token=None)
    best = {7: Logprob(logprob=-0.1, rank=1, decoded_token=None)}
    worst = Logprob(logprob=-8.0, rank=20, decoded_token=None)
    other = Logprob(logprob=-7.5, rank=20, decoded_token=None)

    loss = compare_predictions(
        "device=int8", [best | {3: own, 4: other}], [best | {3: own, 5: worst}]
    )

    assert loss.max_logit_error == pytest.approx(0.5)


def test_loss_is_one_line() -> None:
    text = describe(Loss("device=int8", 4096, 0.5, 0.0123, 0.9975))

    assert text == (
        "device=int8: over 4096 positions logits are off by 0.012 (RMS), 0.5 at most; 99.75% have"
        " the same likeliest token"
    )


def test_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot read the text"):
        text_prompt(tmp_path / "absent")
