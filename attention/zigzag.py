"""Which rank holds which of a sequence's new tokens.

The new tokens are cut into 2N chunks of nearly equal length, and rank i takes
chunks i and 2N-1-i (section 3.4.1 of arXiv 2411.01783). With causal attention
this gives every rank the same work in every round of the ring. Chunk lengths
differ by one token at most, so nothing is padded, and a prompt may be shorter
than 2N: some chunks are then empty.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Zigzag:
    """The cut of ``num_tokens`` new tokens, the first at position ``start``, over the ranks."""

    num_tokens: int
    num_ranks: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_ranks < 1 or self.start < 0:
            raise ValueError(f"a zigzag needs tokens, ranks and a start >= 0, got {self}")

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first index of a chunk and the one past its last, within the new tokens."""
        pieces = 2 * self.num_ranks
        return chunk * self.num_tokens // pieces, (chunk + 1) * self.num_tokens // pieces

    def chunks(self, rank: int) -> tuple[int, int]:
        """Return the two chunks of a rank, the earlier first."""
        return rank, 2 * self.num_ranks - 1 - rank

    def lengths(self, rank: int) -> tuple[int, int]:
        """Return the lengths in tokens of a rank's first and second chunk."""
        (a, b), (c, d) = (self.bounds(chunk) for chunk in self.chunks(rank))
        return b - a, d - c

    def count(self, rank: int) -> int:
        """Return how many of the new tokens a rank holds."""
        return sum(self.lengths(rank))

    def indices(self, rank: int) -> Tensor:
        """Return the indices of a rank's tokens within the new tokens, ascending, int64."""
        return torch.cat([torch.arange(*self.bounds(chunk)) for chunk in self.chunks(rank)])

    def positions(self, rank: int) -> Tensor:
        """Return the positions of a rank's tokens within the sequence, ascending, int64."""
        return self.indices(rank) + self.start

    @property
    def last_token_rank(self) -> int:
        """The rank that holds the last new token. Chunk 2N-1 is never empty: always rank 0."""
        return 0
