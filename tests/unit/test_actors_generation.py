"""From prompt to answer: the plans of one request, and when it ends."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.detokenizer import AnswerText, Detokenizer
from actors.generation import Generation
from actors.messages import Plan
from attention import Zigzag
from models.errors import PromptError
from models.sampling import SamplingParams
from tests.fake_ranks import make_scheduler, run_all

EOS = 2
OTHER = 9  # any token that does not stop


PARAMS = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}


def make_generation(prompt_tokens: int = 10, **settings: Any) -> Generation:
    asked = {name: settings.pop(name) for name in PARAMS & settings.keys()}
    params = SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **asked})
    return Generation(
        **{
            "sequence_id": 5,
            "prompt": np.arange(100, 100 + prompt_tokens, dtype=np.int32),
            "params": params,
            "seed": 77,
            "eos_ids": (EOS, 3),
            "max_model_len": 1000,
            **settings,
        }
    )


def answer(
    generation: Generation, stop_at: int | None = None, stop_id: int = EOS, **settings: Any
) -> list[Plan]:
    """Execute all plans as ranks would, token ``stop_at`` being a stop id; return the plans."""
    scheduler = make_scheduler(**settings)
    scheduler.add(generation)
    return run_all(scheduler, lambda _, index: stop_id if index == stop_at else OTHER)


def spell(ids: Sequence[int]) -> str:
    return "".join(f"{token_id}," for token_id in ids)


def bursts(plans: list[Plan]) -> list[int]:
    return [len(plan.rows[0].owners) for plan in plans if plan.rows]


def owners(plans: list[Plan]) -> list[int]:
    return [rank for plan in plans if plan.rows for rank in plan.rows[0].owners]


@pytest.mark.parametrize("prompt_tokens", [1, 2, 3, 17])
def test_first_plan_computes_the_whole_prompt(prompt_tokens: int) -> None:
    """All new tokens at once; the rank that holds the last one samples."""
    plan = answer(make_generation(prompt_tokens, temperature=0.5))[0]

    assert plan.chunks
    (chunk,) = plan.chunks
    assert chunk.sequence_id == 5
    assert chunk.token_ids.tolist() == list(range(100, 100 + prompt_tokens))
    assert (chunk.cached_rows, chunk.start) == ((0, 0), 0)
    assert plan.algorithm == "pass_kv"
    assert chunk.sampling_rank == 0
    assert chunk.draw is not None
    assert (chunk.draw.temperature, chunk.draw.seed, chunk.draw.stop_ids) == (0.5, 77, (EOS, 3))


@pytest.mark.parametrize("prompt_tokens", [1, 2, 10])
def test_decode_goes_on_where_the_last_plan_ended(prompt_tokens: int) -> None:
    """A burst begins with the last token, not computed yet, at the position after all cached."""
    plans = answer(make_generation(prompt_tokens, max_tokens=20), burst_steps=8)

    decodes = [plan.rows[0] for plan in plans if plan.rows]

    assert [plan.number for plan in plans] == [0, 1, 2, 3]
    assert [row.position for row in decodes] == [prompt_tokens + i for i in (0, 8, 16)]
    assert [row.index for row in decodes] == [1, 9, 17]
    assert {row.token_id for row in decodes} == {OTHER}
    assert {row.sequence_id for row in decodes} == {5}


@pytest.mark.parametrize(
    ("max_tokens", "burst_steps", "expected"),
    [
        (1, 16, []),
        (2, 16, [1]),
        (17, 16, [16]),
        (18, 16, [16, 1]),
        (40, 16, [16, 16, 7]),
        (4, 1, [1, 1, 1]),
    ],
)
def test_bursts_are_full_but_for_the_last(
    max_tokens: int, burst_steps: int, expected: list[int]
) -> None:
    """The prefill samples the first token, so a burst never computes one too many."""
    generation = make_generation(max_tokens=max_tokens)

    plans = answer(generation, burst_steps=burst_steps)

    assert plans[0].chunks
    assert bursts(plans) == expected
    assert len(generation.token_ids) == max_tokens
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("stop_id", [EOS, 3])
@pytest.mark.parametrize("stop_at", [0, 1, 7, 16, 17])
def test_stop_id_ends_the_answer(stop_at: int, stop_id: int) -> None:
    """In the prefill, inside a burst or at its end; it is counted, but is no text."""
    text = AnswerText(Detokenizer(spell))
    generation = make_generation(text=text)

    answer(generation, stop_at, stop_id)

    assert generation.finish_reason == "stop"
    assert generation.stop_reason is None
    assert generation.token_ids == [OTHER] * stop_at + [stop_id]
    assert text.text == spell([OTHER] * stop_at)


@pytest.mark.parametrize("stop_id", [EOS, OTHER + 1])
@pytest.mark.parametrize("included", [False, True])
def test_stop_token_is_the_reason_and_is_text_where_asked_for(stop_id: int, included: bool) -> None:
    """A stop token that is EOS stops as EOS does, unless EOS is ignored."""
    for ignore_eos in (False, True):
        text = AnswerText(Detokenizer(spell))
        generation = make_generation(
            text=text,
            stop_token_ids=[stop_id, 77],
            include_stop_str_in_output=included,
            ignore_eos=ignore_eos,
        )

        answer(generation, 5, stop_id)

        assert generation.finish_reason == "stop"
        by_eos = stop_id == EOS and not ignore_eos
        assert generation.stop_reason == (None if by_eos else stop_id)
        assert text.text == spell([OTHER] * 5 + [stop_id] * included)


@pytest.mark.parametrize("burst_steps", [1, 3, 16])
def test_tokens_beyond_a_stop_text_are_dropped(burst_steps: int) -> None:
    """The answer is the same whether or not a burst went on; an EOS within it is none."""
    text = AnswerText(Detokenizer(spell), stop=["9,9,"], min_tokens=3)
    generation = make_generation(text=text)

    answer(generation, stop_at=4, burst_steps=burst_steps)

    assert generation.token_ids == [OTHER] * 4
    assert (generation.finish_reason, generation.stop_reason) == ("stop", "9,9,")
    assert text.text == "9,9,"


def test_stop_text_within_the_last_allowed_token_is_a_stop() -> None:
    text = AnswerText(Detokenizer(spell), stop=["9,9,9"])
    generation = make_generation(text=text, max_tokens=3)

    answer(generation)

    assert (generation.finish_reason, generation.stop_reason) == ("stop", "9,9,9")
    assert text.text == ""


def test_prompt_logprobs_are_asked_of_the_prefill() -> None:
    """Of several answers the first has them."""
    for wanted in (True, False):
        generation = make_generation(prompt_logprobs=3, wants_prompt_logprobs=wanted)
        plan = answer(generation)[0]
        assert plan.chunks
        assert plan.chunks[0].prompt_logprobs == (3 if wanted else None)


def test_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    """The model ended its answer; that it had no more room says nothing."""
    generation = make_generation(max_tokens=5)

    answer(generation, stop_at=4)

    assert generation.finish_reason == "stop"


def test_stop_ids_may_be_ignored() -> None:
    """A benchmark wants answers of one length, and their text is all of it."""
    generation = make_generation(max_tokens=12, ignore_eos=True)

    plans = answer(generation, stop_at=4)

    assert plans[0].chunks
    assert plans[0].chunks[0].draw is not None
    assert plans[0].chunks[0].draw.stop_ids == ()
    assert generation.finish_reason == "length"
    assert len(generation.token_ids) == 12
    assert generation.stop_reason is None


@pytest.mark.parametrize(("prompt_tokens", "expected"), [(10, 10), (18, 2), (19, 1)])
def test_answer_is_cut_where_the_context_ends(prompt_tokens: int, expected: int) -> None:
    """Prompt and answer together are at most max_model_len: there are no pages for more."""
    generation = make_generation(prompt_tokens, max_tokens=40, max_model_len=20)

    plans = answer(generation)

    assert len(generation.token_ids) == expected
    assert sum(bursts(plans)) == expected - 1
    assert generation.finish_reason == "length"


def test_decode_blocks_alternate_on_even_shares() -> None:
    """Ten prompt tokens are five on each rank; then blocks of four take turns."""
    plans = answer(make_generation(10, max_tokens=18), decode_block_tokens=4, burst_steps=3)

    assert owners(plans) == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0]


def test_first_block_goes_to_the_rank_with_fewest_rows() -> None:
    """A prompt of one token is on rank 0."""
    plans = answer(make_generation(1, max_tokens=10), decode_block_tokens=4)

    assert owners(plans) == [1] * 4 + [0] * 4 + [1]


@settings(deadline=None, max_examples=150)
@given(
    prompt_tokens=st.integers(1, 60),
    num_ranks=st.integers(1, 6),
    block=st.integers(1, 20),
    burst_steps=st.integers(1, 20),
    max_tokens=st.integers(1, 200),
)
def test_shares_stay_even(
    prompt_tokens: int, num_ranks: int, block: int, burst_steps: int, max_tokens: int
) -> None:
    """Every rank holds as much as the others, within a block, however long the answer.

    A prefill's own shares may differ by two, see `Zigzag`.
    """
    plans = answer(
        make_generation(prompt_tokens, max_tokens=max_tokens),
        num_ranks=num_ranks,
        decode_block_tokens=block,
        burst_steps=burst_steps,
    )

    zigzag = Zigzag(num_tokens=prompt_tokens, num_ranks=num_ranks)
    rows = Counter({rank: zigzag.count(rank) for rank in range(num_ranks)})
    turns = owners(plans)
    for step, rank in enumerate(turns):
        if step % block == 0:
            assert rows[rank] == min(rows.values())
        else:
            assert rank == turns[step - 1]
        rows[rank] += 1
        assert max(rows.values()) - min(rows.values()) <= max(2, block)
    assert rows.total() == prompt_tokens + max_tokens - 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30))
def test_owners_do_not_depend_on_the_bursts(burst_steps: int, other: int) -> None:
    """A burst is a matter of latency; where KV lies is not."""
    first, second = (
        answer(make_generation(7), num_ranks=3, decode_block_tokens=5, burst_steps=steps)
        for steps in (burst_steps, other)
    )

    assert owners(first) == owners(second)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(4, 30), min_size=1, max_size=40),
    st.sampled_from([(), ("7,8,",), ("11,", "9,1")]),
    st.integers(0, 5),
    st.booleans(),
)
def test_an_answer_goes_on_from_any_token(
    tokens: list[int], stop: tuple[str, ...], min_tokens: int, include: bool
) -> None:
    """A client sends what it has received; end and text are those of an answer without a break."""

    def begin(answer_ids: Sequence[int]) -> tuple[Generation, AnswerText]:
        text = AnswerText(
            Detokenizer(spell), stop=stop, include_stop=include, min_tokens=min_tokens
        )
        generation = make_generation(
            max_tokens=len(tokens),
            min_tokens=min_tokens if min_tokens <= len(tokens) else 0,
            stop=stop,
            text=text,
            answer_ids=answer_ids,
        )
        return generation, text

    whole, whole_text = begin(())
    run = make_scheduler()
    run.add(whole)
    run_all(run, lambda _, index: tokens[index])
    for broken_at in range(len(whole.token_ids)):
        generation, text = begin(tokens[:broken_at])
        assert generation.made_tokens == 0
        scheduler = make_scheduler()
        scheduler.add(generation)
        plans = run_all(scheduler, lambda _, index: tokens[index])
        assert plans[0].chunks[0].answer_tokens == broken_at
        assert generation.token_ids == whole.token_ids
        assert generation.made_tokens == len(whole.token_ids) - broken_at
        assert (generation.finish_reason, generation.stop_reason, text.text) == (
            whole.finish_reason,
            whole.stop_reason,
            whole_text.text,
        )
    with pytest.raises(PromptError, match="answer_ids"):
        begin(whole.token_ids)


def test_progress_of_a_continued_answer_is_that_of_its_prompt() -> None:
    """Its tokens so far are no sign that the prompt is computed."""
    generation = make_generation(answer_ids=(OTHER,) * 5)
    scheduler = make_scheduler()
    scheduler.add(generation)
    assert scheduler.progress(generation) == (0, 10)
    run_all(scheduler, lambda _, index: OTHER)
    assert scheduler.progress(generation) == (10, 10)
    assert len(generation.token_ids) == 40
