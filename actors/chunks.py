"""How many tokens of each prompt a step computes: a pure function of prices."""

from collections.abc import Callable, Sequence

UNIT = 64  # tokens; a chunk is a multiple of it unless it is a prompt's last
OLDEST_SHARE = 0.5  # of a step is the oldest prompt's, if others have use for the rest

StepPrice = Callable[[Sequence[int]], float]


def size_chunks(
    remaining: Sequence[int],
    price: StepPrice,
    *,
    limit: float,
    max_tokens: int,
    longest: int,
) -> list[int]:
    """Return how many tokens of each prompt the next step computes.

    The oldest prompt gets at least half of each step, so it comes to its end
    whatever arrives; the others share the rest, the shortest first, so that a
    short one does not wait for long ones. What they leave is the oldest's again.

    Args:
        remaining: Tokens left of each prompt, the oldest first.
        price: Of a step that computes so many tokens of each, not falling.
        limit: What a step should cost at most; the oldest gets one `UNIT` in any case.
        max_tokens: Of all prompts in one step.
        longest: Tokens of one prompt in a step.
    """
    if not remaining or max_tokens < 1:
        return [0] * len(remaining)
    most = [min(left, longest) for left in remaining]
    counts = [0] * len(remaining)

    def fits(trial: Sequence[int], limit: float, max_tokens: int) -> bool:
        return sum(trial) <= max_tokens and price(trial) <= limit

    def extend(index: int, limit: float, max_tokens: int) -> None:
        counts[index] = _largest(
            counts[index],
            most[index],
            lambda count: fits(_with(counts, index, count), limit, max_tokens),
        )

    share = OLDEST_SHARE if len(remaining) > 1 else 1.0
    base = price(counts)
    extend(0, base + share * max(0.0, limit - base), max(1, int(share * max_tokens)))
    counts[0] = max(counts[0], min(UNIT, most[0], max_tokens))
    others = sorted(range(1, len(remaining)), key=lambda index: remaining[index])
    taken = _whole_prompts(others, most, counts, lambda trial: fits(trial, limit, max_tokens))
    for index in others[:taken]:
        counts[index] = most[index]
    for index in (*others[taken : taken + 1], 0):
        extend(index, limit, max_tokens)
    return counts


def _whole_prompts(
    order: Sequence[int],
    most: Sequence[int],
    counts: Sequence[int],
    is_affordable: Callable[[Sequence[int]], bool],
) -> int:
    """Return how many prompts, in this order, can be taken to their end: few trials for many."""

    def trial(number: int) -> list[int]:
        taken = set(order[:number])
        return [most[i] if i in taken else count for i, count in enumerate(counts)]

    low, high = 0, len(order)
    while high > low:
        middle = (low + high + 1) // 2
        if is_affordable(trial(middle)):
            low = middle
        else:
            high = middle - 1
    return low


def _with(counts: Sequence[int], index: int, count: int) -> list[int]:
    return [*counts[:index], count, *counts[index + 1 :]]


def _largest(least: int, most: int, is_affordable: Callable[[int], bool]) -> int:
    """Return the largest affordable count: ``most``, or a multiple of `UNIT`, or ``least``."""
    if most <= least:
        return least
    if is_affordable(most):
        return most
    low, high = least // UNIT, most // UNIT  # units; low ones are affordable
    while high > low:
        middle = (low + high + 1) // 2
        if is_affordable(middle * UNIT):
            low = middle
        else:
            high = middle - 1
    return max(least, low * UNIT)
