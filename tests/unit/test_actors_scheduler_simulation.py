"""Random requests on ranks that compute nothing: who waits, who is preempted, what is lost."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.choice import Chooser
from actors.generation import Generation
from actors.messages import DecodeRow, PrefillChunk
from actors.scheduler import Scheduler, Step
from models.sampling import SamplingParams
from tests.fake_ranks import SHAPE, make_scheduler, run_step
from tests.rates import FREE_RING, SLOW_RING

PAGES, PAGE = 24, 16


@dataclass(frozen=True)
class Arrival:
    """One request of a simulation."""

    after_steps: int  # of the one before
    prompt_tokens: int
    max_tokens: int
    shares: bool  # its beginning with others
    priority: int
    cancel_after: int | None  # steps
    stops_at: int | None = None  # the index of a token that ends the answer


arrivals = st.builds(
    Arrival,
    after_steps=st.integers(0, 4),
    prompt_tokens=st.integers(1, 200),
    max_tokens=st.integers(1, 60),
    shares=st.booleans(),
    priority=st.sampled_from([0, 0, 0, 1]),
    cancel_after=st.none() | st.none() | st.integers(0, 10),
    stops_at=st.none() | st.integers(0, 40),
)


def token(sequence: int, index: int) -> int:
    return 1_000_000 + 1000 * sequence + index


class Simulation:
    """A scheduler and what is known of its requests."""

    def __init__(self, scheduler: Scheduler, *, follows: bool = False) -> None:
        self.scheduler = scheduler
        self.follows = follows  # bursts are planned before the results of those before
        self.num_following = 0
        self.begun_in: dict[int, int] = {}  # steps that each waited for its first
        self._arrived_in: dict[int, int] = {}
        self._cancels: dict[int, list[Generation]] = {}
        self._by_id: dict[int, Generation] = {}

    def add(self, number: int, arrival: Arrival) -> Generation:
        prompt = np.arange(arrival.prompt_tokens, dtype=np.int32)
        if not arrival.shares:
            prompt = prompt + 1000 * number
        generation = Generation(
            sequence_id=number,
            prompt=prompt,
            params=SamplingParams(max_tokens=arrival.max_tokens, temperature=0.0),
            seed=0,
            eos_ids=() if arrival.stops_at is None else (token(number, arrival.stops_at),),
            max_model_len=10_000,
            priority=arrival.priority,
        )
        self.scheduler.add(generation)
        self._by_id[number] = generation
        self._arrived_in[number] = self.scheduler.num_steps
        if arrival.cancel_after is not None:
            at = self.scheduler.num_steps + arrival.cancel_after
            self._cancels.setdefault(at, []).append(generation)
        return generation

    def step(self) -> bool:
        self._cancel()
        step = self.scheduler.next_step()
        if step is None:
            return False
        stopped: set[int] = set()
        while step is not None:
            self._check(step)
            following = self.scheduler.following_burst(step) if self.follows else None
            if following is not None:
                self.num_following += 1
                self._cancel()
            stopped = run_step(self.scheduler, step, token, stopped)
            step = following
        return True

    def _cancel(self) -> None:
        for generation in self._cancels.pop(self.scheduler.num_steps, []):
            if generation.finish_reason is None:
                self.scheduler.cancel(generation)
            assert not self.scheduler.cancel(generation), "twice is not an event"
            self.scheduler.cache.check_invariants()

    def _check(self, step: Step) -> None:
        """Assert that every part goes on exactly where its answer is."""
        assert step.plan.parts
        limits = self.scheduler.limits
        computed = sum(len(chunk.token_ids) for chunk in step.plan.chunks)
        if step.plan.chunks:
            assert computed + len(step.plan.rows) <= limits.max_num_batched_tokens
        for part, generation in zip(step.plan.parts, step.generations, strict=True):
            number = generation.sequence_id
            self.begun_in.setdefault(number, step.plan.number - self._arrived_in[number])
            context = [*generation.prompt.tolist(), *generation.token_ids]
            if isinstance(part, PrefillChunk):
                end = part.start + len(part.token_ids)
                assert part.token_ids.tolist() == context[part.start : end]
                assert (part.draw is None) == (end < len(context))
            else:
                assert isinstance(part, DecodeRow)
                if generation.finish_reason is not None:
                    continue  # in a burst that was planned before it ended
                assert part.position == len(context) - 1
                assert part.token_id in (context[-1], None)
                assert part.index == len(generation.token_ids)
                assert not step.plan.chunks or len(part.owners) == 1


@settings(max_examples=120, deadline=None)
@given(
    num_ranks=st.integers(1, 3),
    requests=st.lists(arrivals, min_size=1, max_size=14),
    chooser=st.sampled_from([None, FREE_RING, SLOW_RING]),
    max_num_batched_tokens=st.sampled_from([70, 300, 8192]),
    step_target_s=st.sampled_from([1e-6, 100.0, float("inf")]),
    max_num_seqs=st.sampled_from([1, 3, 100]),
    decode_rides=st.booleans(),
    shares=st.booleans(),
    follows=st.booleans(),
)
def test_every_request_ends_with_its_own_tokens(
    num_ranks: int,
    requests: list[Arrival],
    chooser: object,
    max_num_batched_tokens: int,
    step_target_s: float,
    max_num_seqs: int,
    decode_rides: bool,
    shares: bool,
    follows: bool,
) -> None:
    """None is lost or repeated, nobody waits for ever, and all pages come back."""
    scheduler = make_scheduler(
        num_ranks,
        num_pages=PAGES,
        page_tokens=PAGE,
        shares=shares,
        chooser=chooser and Chooser("auto", SHAPE, chooser, num_ranks),  # type: ignore[arg-type]
        max_num_batched_tokens=max_num_batched_tokens,
        step_target_s=step_target_s,
        max_num_seqs=max_num_seqs,
        decode_rides=decode_rides,
        burst_steps=5,
    )
    simulation = Simulation(scheduler, follows=follows)
    generations = []
    for number, arrival in enumerate(requests, 1):
        for _ in range(arrival.after_steps):
            simulation.step()
        generations.append(simulation.add(number, arrival))
    # Each step computes at least a chunk of the oldest or a token of each that decodes.
    most_steps = sum(
        -(-arrival.prompt_tokens // 6) + 4 * arrival.max_tokens + 20 for arrival in requests
    )
    while simulation.step():
        assert scheduler.num_steps < 10 * most_steps, "an answer starves"

    for generation, arrival in zip(generations, requests, strict=True):
        most = arrival.max_tokens
        if arrival.stops_at is not None:
            most = min(most, arrival.stops_at + 1)
        expected = [token(generation.sequence_id, index) for index in range(most)]
        if generation.finish_reason == "abort":
            assert generation.token_ids == expected[: len(generation.token_ids)]
        else:
            assert generation.token_ids == expected
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    scheduler.cache.clear()
    assert all(counts["free"] == counts["total"] for counts in scheduler.cache.page_counts())


def test_preempted_answers_go_on_from_their_tokens() -> None:
    """Four answers outgrow the pages together; none fails, the newest wait."""
    scheduler = make_scheduler(1, num_pages=12, page_tokens=16)
    simulation = Simulation(scheduler)
    generations = [
        simulation.add(number, Arrival(0, 30, 60, False, 0, None)) for number in range(1, 5)
    ]

    while simulation.step():
        pass

    assert scheduler.num_preemptions > 0
    assert all(len(generation.token_ids) == 60 for generation in generations)


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    """It begins in the very next step, and the long one goes on in every step."""
    scheduler = make_scheduler(1, num_pages=2000, max_num_batched_tokens=256)
    simulation = Simulation(scheduler)
    long = simulation.add(1, Arrival(0, 9000, 5, False, 0, None))
    done = []
    for number in range(2, 30):
        before = scheduler.progress(long)[0]
        simulation.add(number, Arrival(0, 40, 3, False, 0, None))
        assert simulation.step()
        done.append(scheduler.progress(long)[0] - before)

    assert max(simulation.begun_in[number] for number in range(2, 30)) <= 1
    assert min(done) >= 64
    while simulation.step():
        pass
    assert len(long.token_ids) == 5


def test_lower_priorities_go_first() -> None:
    """Those of one priority in the order of their arrival, also after a preemption."""
    scheduler = make_scheduler(1, max_num_seqs=1)
    simulation = Simulation(scheduler)
    for number, priority in ((1, 1), (2, 0), (3, 1), (4, -1)):
        simulation.add(number, Arrival(0, 10, 2, False, priority, None))

    while simulation.step():
        pass

    assert sorted(simulation.begun_in, key=simulation.begun_in.__getitem__) == [4, 2, 1, 3]


def test_bursts_follow_without_their_results() -> None:
    """Rows go on from tokens that only the ranks know, and leave where the ranks stopped them."""
    scheduler = make_scheduler(2, burst_steps=4)
    simulation = Simulation(scheduler, follows=True)
    stops = simulation.add(1, Arrival(0, 30, 50, False, 0, None, stops_at=6))
    goes_on = simulation.add(2, Arrival(0, 40, 50, False, 0, None))

    while simulation.step():
        pass

    assert simulation.num_following > 5
    assert stops.token_ids == [token(1, index) for index in range(7)]
    assert goes_on.token_ids == [token(2, index) for index in range(50)]


def test_nothing_follows_where_something_else_is_to_be_done() -> None:
    """A burst that is planned ahead would make a new request, or a shared prefix, wait."""
    scheduler = make_scheduler(2, burst_steps=4)
    simulation = Simulation(scheduler)
    simulation.add(1, Arrival(0, 30, 50, False, 0, None))
    simulation.step()
    step = scheduler.next_step()
    assert step is not None
    simulation.add(2, Arrival(0, 40, 50, False, 0, None))

    assert scheduler.following_burst(step) is None
