"""How a step's tokens are shared out: within the limits, and nobody starves."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.chunks import UNIT, size_chunks


def linear(counts: Sequence[int]) -> float:
    """A token a unit of time."""
    return float(sum(counts))


@settings(max_examples=300, deadline=None)
@given(
    remaining=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    limit=st.floats(0, 5000),
    max_tokens=st.integers(1, 4000),
    longest=st.integers(1, 4000),
    base=st.floats(0, 1000),
)
def test_limits_hold_and_the_oldest_goes_on(
    remaining: list[int], limit: float, max_tokens: int, longest: int, base: float
) -> None:
    """Whatever the prices; one unit of the oldest is computed even where it is too dear."""

    def price(counts: Sequence[int]) -> float:
        return base + sum(count + count**2 / 1000 for count in counts)

    counts = size_chunks(remaining, price, limit=limit, max_tokens=max_tokens, longest=longest)

    least = min(UNIT, remaining[0], longest, max_tokens)
    assert counts[0] >= least
    assert sum(counts) <= max_tokens
    assert all(0 <= c <= min(left, longest) for c, left in zip(counts, remaining, strict=True))
    assert price(counts) <= limit or counts == [least, *[0] * (len(counts) - 1)]


def test_a_lone_prompt_gets_all_there_is() -> None:
    assert size_chunks([500], linear, limit=1e9, max_tokens=8192, longest=8192) == [500]
    assert size_chunks([5000], linear, limit=1000, max_tokens=8192, longest=8192) == [960]


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    """It keeps half of the step, and what they leave."""
    counts = size_chunks([100_000, 700, 90, 30], linear, limit=1024, max_tokens=8192, longest=8192)

    assert counts == [512, 384, 90, 30]


def test_what_the_others_leave_is_the_oldest_ones() -> None:
    assert size_chunks([100_000, 100], linear, limit=1024, max_tokens=8192, longest=8192) == [
        896,
        100,
    ]


def test_a_threshold_bounds_each_prompt() -> None:
    """`long_prefill_token_threshold`: long prompts share a step even where one would fill it."""
    counts = size_chunks([5000, 5000, 40], linear, limit=1e9, max_tokens=8192, longest=256)

    assert counts == [256, 256, 40]


def test_many_prompts_need_few_prices() -> None:
    """A price takes a microsecond a prompt and more; hundreds may wait."""
    calls = 0

    def price(counts: Sequence[int]) -> float:
        nonlocal calls
        calls += 1
        return float(sum(counts))

    counts = size_chunks([50] * 300, price, limit=5000, max_tokens=8192, longest=8192)

    assert sum(counts) == 5000
    assert calls < 40
