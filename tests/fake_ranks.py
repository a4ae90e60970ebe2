"""Ranks that compute nothing: they sample what a test says, as real ones would report it."""

from collections.abc import Callable, Collection
from typing import Any

from actors.choice import Chooser
from actors.device_cache import DeviceCache
from actors.messages import DecodeRow, Plan, PrefillChunk, SequenceResult, StepResult
from actors.scheduler import Scheduler, Step
from actors.step_sizes import Limits
from models.rates import ModelShape

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    linear_flops_per_token=1e5,
    linear_weight_bytes=2e5,
    kv_element_bytes=4.0,
)
NextToken = Callable[[int, int], int]  # of a sequence's id and the token's index in its answer


def make_scheduler(
    num_ranks: int = 2,
    *,
    num_pages: int = 64,
    page_tokens: int = 16,
    shares: bool = True,
    chooser: Chooser | None = None,
    **settings: Any,
) -> Scheduler:
    cache = DeviceCache(
        num_ranks=num_ranks, num_pages=num_pages, page_tokens=page_tokens, shares=shares
    )
    limits = Limits(
        **{
            "decode_block_tokens": 16,
            "burst_steps": 16,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "max_queued_requests": 1000,
            **settings,
        }
    )
    return Scheduler(cache, chooser or Chooser("pass_kv", SHAPE, None, num_ranks), limits)


def run_step(
    scheduler: Scheduler, step: Step, next_token: NextToken, stopped: Collection[int] = ()
) -> set[int]:
    """Hand the scheduler what ranks would report of a step.

    ``stopped`` are the sequences that stopped in the burst before, if this one was planned
    before its results were there; those that stop in this one are returned.
    """
    sequences = tuple(
        SequenceResult(token_ids=())
        if isinstance(part, DecodeRow) and part.token_id is None and part.sequence_id in stopped
        else _sample(part, generation.sequence_id, next_token)
        for part, generation in zip(step.plan.parts, step.generations, strict=True)
    )
    results = [
        StepResult(rank=rank, number=step.plan.number, sequences=sequences, wall_s=0.0, parts_s={})
        for rank in range(scheduler.cache.num_ranks)
    ]
    scheduler.advance(step, results)
    scheduler.cache.check_invariants()
    return {
        part.sequence_id
        for part, sequence in zip(step.plan.parts, sequences, strict=True)
        if part.draw is not None and set(sequence.token_ids) & set(part.draw.stop_ids)
    }


def run_all(scheduler: Scheduler, next_token: NextToken) -> list[Plan]:
    """Execute all that there is to do; return the plans."""
    plans = []
    while step := scheduler.next_step():
        plans.append(step.plan)
        run_step(scheduler, step, next_token)
    return plans


def _sample(
    part: PrefillChunk | DecodeRow, sequence_id: int, next_token: NextToken
) -> SequenceResult:
    if part.draw is None:
        return SequenceResult(token_ids=())
    first, steps = (
        (part.index, len(part.owners)) if isinstance(part, DecodeRow) else (part.answer_tokens, 1)
    )
    tokens: list[int] = []
    for step in range(steps):
        tokens.append(next_token(sequence_id, first + step))
        if tokens[-1] in part.draw.stop_ids:
            break
    return SequenceResult(token_ids=tuple(tokens))
