"""Which plan comes next: who is prefilled together, who waits, what a turn costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.choice import Chooser
from actors.generation import Generation
from actors.messages import Plan
from actors.scheduler import Scheduler
from models.errors import PromptError
from models.sampling import SamplingParams
from tests.fake_ranks import SHAPE, make_scheduler, run_all, run_step
from tests.rates import SLOW_RING

BLOCK = 16


def generation(
    sequence_id: int, prompt: list[int], max_tokens: int = 4, salt: str = ""
) -> Generation:
    return Generation(
        sequence_id=sequence_id,
        prompt=np.asarray(prompt, dtype=np.int32),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        seed=0,
        eos_ids=(2,),
        max_model_len=10_000,
        cache_salt=salt,
    )


def answer(scheduler: Scheduler, *generations: Generation) -> list[Plan]:
    for each in generations:
        scheduler.add(each)
    return run_all(scheduler, lambda sequence, index: 1000 + 31 * sequence + index)


def prefills(plans: list[Plan]) -> list[list[tuple[int, int]]]:
    """Return each prefill step's sequences, with the number of new tokens."""
    return [
        [(chunk.sequence_id, len(chunk.token_ids)) for chunk in plan.chunks]
        for plan in plans
        if plan.chunks
    ]


def test_requests_that_fit_are_prefilled_together_and_decode_together() -> None:
    """Several sequences of different lengths in one step."""
    scheduler = make_scheduler()

    plans = answer(
        scheduler,
        generation(1, list(range(40))),
        generation(2, list(range(100, 103)), max_tokens=1),
        generation(3, list(range(200, 220)), max_tokens=9),
    )

    assert prefills(plans) == [[(1, 40), (2, 3), (3, 20)]]
    decodes = [plan for plan in plans if plan.rows]
    assert [row.sequence_id for row in decodes[0].rows] == [1, 3]
    assert [len(row.owners) for row in decodes[0].rows] == [3, 8]


def test_a_turn_costs_its_new_tokens() -> None:
    """The next turn has the prompt and the answer in it; the answer's last token has no KV."""
    scheduler = make_scheduler()
    first = generation(1, list(range(50)), max_tokens=10)
    answer(scheduler, first)
    prompt = [*range(50), *first.token_ids, 7, 8, 9]

    second = generation(2, prompt)
    plans = answer(scheduler, second)

    assert prefills(plans) == [[(2, 1 + 3)]]
    assert second.num_cached_tokens == 59


def test_what_can_be_shared_is_waited_for() -> None:
    """Of prompts with one beginning the first computes it, the others only what is theirs."""
    scheduler, document = make_scheduler(), list(range(60))

    plans = answer(
        scheduler,
        *[generation(each, [*document, 100 + each, 200 + each]) for each in (1, 2, 3)],
        generation(4, list(range(300, 310))),
    )

    assert prefills(plans) == [[(1, 62), (4, 10)], [(2, 2), (3, 2)]]


def test_answers_of_one_prompt_share_it() -> None:
    """`n` answers prefill the prompt once; each further one computes its last token."""
    scheduler = make_scheduler()

    plans = answer(scheduler, *[generation(each, list(range(40))) for each in (1, 2, 3)])

    assert prefills(plans) == [[(1, 40)], [(2, 1), (3, 1)]]


def test_two_tenants_share_nothing() -> None:
    """Neither in one step nor later."""
    scheduler, prompt = make_scheduler(), list(range(40))

    together = answer(scheduler, generation(1, prompt, salt="a"), generation(2, prompt, salt="b"))
    later = answer(scheduler, generation(3, prompt, salt="c"))

    assert prefills(together) == [[(1, 40), (2, 40)]]
    assert prefills(later) == [[(3, 40)]]


def test_a_step_takes_so_many_tokens() -> None:
    """`max_num_batched_tokens` bounds what is computed together; longer prompts come in chunks."""
    scheduler = make_scheduler(max_num_batched_tokens=50)

    plans = answer(
        scheduler,
        *[generation(each, [100 * each + i for i in range(30)]) for each in (1, 2)],
        generation(3, list(range(900, 980))),
    )

    assert prefills(plans) == [[(1, 30)], [(2, 30)], [(3, 48)], [(3, 32)]]


def test_who_does_not_fit_waits_for_room() -> None:
    """Whoever begins has room to its end, so nothing that runs is ever thrown out."""
    scheduler = make_scheduler(num_pages=8)  # 256 rows in all

    scheduler.add(generation(1, list(range(100)), max_tokens=50))
    scheduler.add(generation(2, list(range(200, 300)), max_tokens=50))
    step = scheduler.next_step()
    assert step is not None
    run_step(scheduler, step, lambda *_: 9)

    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    plans = run_all(scheduler, lambda *_: 9)
    assert prefills(plans) == [[(2, 100)]]


def test_what_can_never_fit_is_refused_at_once() -> None:
    """With the numbers; it must not wait for ever."""
    scheduler = make_scheduler(num_pages=4)  # 64 rows on each rank

    with pytest.raises(PromptError, match=r"need 77 rows .* pages hold 64"):
        scheduler.add(generation(1, list(range(100)), max_tokens=18))
    assert scheduler.num_waiting == 0


def test_prompt_logprobs_need_every_token() -> None:
    """They are of all tokens of the prompt, so none of it is shared."""
    scheduler = make_scheduler()
    answer(scheduler, generation(1, list(range(40))))
    asking = Generation(
        sequence_id=2,
        prompt=np.arange(40, dtype=np.int32),
        params=SamplingParams(max_tokens=1, prompt_logprobs=1),
        seed=0,
        eos_ids=(),
        max_model_len=100,
    )

    assert prefills(answer(scheduler, asking)) == [[(2, 40)]]


@settings(max_examples=60, deadline=None)
@given(
    num_ranks=st.integers(1, 5),
    turns=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=10, max_size=10),
)
def test_ten_turns_stay_even(num_ranks: int, turns: list[tuple[int, int]]) -> None:
    """A conversation that is sharded from its first turn never piles up on one rank."""
    scheduler = make_scheduler(num_ranks, num_pages=200)
    context: list[int] = []
    for number, (new_tokens, answer_tokens) in enumerate(turns):
        context += range(10_000 * number, 10_000 * number + new_tokens)
        turn = generation(number, context, max_tokens=answer_tokens)
        (prefill, *_) = answer(scheduler, turn)

        assert prefill.chunks
        rows = scheduler.cache.rows(number, len(context) + answer_tokens)
        assert max(rows) - min(rows) <= BLOCK
        assert sum(rows) == len(context) + answer_tokens - 1
        if number:
            assert len(prefill.chunks[0].token_ids) == new_tokens + 1
        context += turn.token_ids


def test_short_sequences_live_whole_where_that_is_cheaper() -> None:
    """Each on the rank with least of its own; a later turn stays where the first was."""
    chooser = Chooser("auto", SHAPE, SLOW_RING, 2)
    scheduler = make_scheduler(chooser=chooser)
    first, second = generation(1, list(range(20))), generation(2, list(range(50, 70)))

    plans = answer(scheduler, first, second)

    assert plans[0].chunks
    assert [chunk.home for chunk in plans[0].chunks] == [0, 1]
    assert plans[1].rows
    assert [set(row.owners) for row in plans[1].rows] == [{0}, {1}]
    (turn, *_) = answer(scheduler, generation(3, [*range(50, 70), *second.token_ids, 5]))
    assert turn.chunks
    assert turn.chunks[0].home == 1
    assert turn.chunks[0].cached_rows == (0, 23)


def test_a_whole_sequence_that_does_not_fit_on_one_rank_is_sharded() -> None:
    """Pages of all ranks together may hold what those of one cannot."""
    chooser = Chooser("auto", SHAPE, SLOW_RING, 2)
    scheduler = make_scheduler(chooser=chooser, num_pages=4)

    (plan, *_) = answer(scheduler, generation(1, list(range(60)), max_tokens=8))

    assert plan.chunks
    assert plan.chunks[0].home is None


@pytest.mark.parametrize("cached", [0, 100])
def test_a_prefix_on_one_rank_is_left_where_it_leaves_no_room(cached: int) -> None:
    """What cannot be continued in place is computed anew, and never waits for ever."""
    chooser = Chooser("auto", SHAPE, SLOW_RING, 2)
    scheduler = make_scheduler(chooser=chooser, num_pages=8)
    prefix = list(range(cached))
    if prefix:
        answer(scheduler, generation(1, prefix, max_tokens=1))

    plans = answer(scheduler, generation(2, [*prefix, *range(1000, 1100)], max_tokens=20))

    assert len(plans) > 1
