"""Where a plan puts new tokens on the ranks: pure functions of its sequences."""

import itertools
from collections.abc import Sequence
from typing import Any

from actors.messages import Algorithm, Plan, PrefillChunk, TokenIds
from attention import Zigzag
from models.page_table import Grow, Span, Truncate


def chunk_spans(chunk: PrefillChunk) -> list[tuple[Span, ...]]:
    """Return the positions of a chunk's new tokens that each rank keeps."""
    if chunk.home is not None:
        whole = (chunk.start, len(chunk.token_ids))
        return [(whole,) if rank == chunk.home else () for rank in range(len(chunk.cached_rows))]
    return _zigzag_spans(chunk.zigzag(), chunk.start)


def spans_to_come(
    start: int, count: int, cached_rows: Sequence[int], home: int | None
) -> list[tuple[Span, ...]]:
    """Return the spans that a chunk of so many tokens from ``start`` on will have."""
    if home is not None:
        return [((start, count),) if rank == home else () for rank in range(len(cached_rows))]
    first_rank = find_first_rank(count, cached_rows)
    zigzag = Zigzag(num_tokens=count, num_ranks=len(cached_rows), first_rank=first_rank)
    return _zigzag_spans(zigzag, start)


def _zigzag_spans(zigzag: Zigzag, start: int) -> list[tuple[Span, ...]]:
    return [
        tuple((start + a, b - a) for a, b in map(zigzag.bounds, zigzag.chunks(rank)))
        for rank in range(zigzag.num_ranks)
    ]


def owned_spans(position: int, owners: Sequence[int], num_ranks: int) -> list[list[Span]]:
    """Return the positions of a burst's tokens that each rank keeps."""
    spans: list[list[Span]] = [[] for _ in range(num_ranks)]
    for owner, steps in itertools.groupby(owners):
        count = len(list(steps))
        spans[owner].append((position, count))
        position += count
    return spans


def find_first_rank(num_tokens: int, cached_rows: Sequence[int]) -> int:
    """Return the rank at which a zigzag begins, so that the fullest rank has least rows."""
    num_ranks = len(cached_rows)

    def fullest(first_rank: int) -> int:
        zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks, first_rank=first_rank)
        return max(rows + zigzag.count(rank) for rank, rows in enumerate(cached_rows))

    return min(range(num_ranks), key=fullest)


def prefill_plan(
    sequence_id: int,
    token_ids: TokenIds,
    num_ranks: int,
    *,
    algorithm: Algorithm = "pass_kv",
    **options: Any,
) -> Plan:
    """Return the plan of one prompt, computed anew and sharded, as measurements want it.

    ``options`` are fields of `PrefillChunk`.
    """
    chunk = PrefillChunk(
        **{
            "sequence_id": sequence_id,
            "token_ids": token_ids,
            "cached_rows": (0,) * num_ranks,
            "home": None,
            "first_rank": 0,
            **options,
        }
    )
    spans = tuple(chunk_spans(chunk))
    return Plan(
        number=0,
        cache_ops=(
            Truncate(sequence_id=sequence_id, position=0),
            Grow(sequence_id=sequence_id, spans_by_rank=spans),
        ),
        ended=(),
        chunks=(chunk,),
        rows=(),
        algorithm=algorithm,
    )
