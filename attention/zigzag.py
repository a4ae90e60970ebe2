"""Which rank holds which of a sequence's new tokens, and which of them its queries see.

The new tokens are cut into 2N chunks of nearly equal length, and role i takes
chunks i and 2N-1-i (section 3.4.1 of arXiv 2411.01783). With causal attention
this gives every role the same work in every round of the ring. Chunk lengths
differ by one token at most, so nothing is padded, and a prompt may be shorter
than 2N: some chunks are then empty.

Rank ``first_rank`` takes role 0, the next rank role 1, and so on around the
ring: the roles that get a token more can so fall to the ranks that hold fewest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which of a rank's new keys another rank's queries see, both in their local order."""

    first_query: int  # queries before it see none of these keys
    num_keys: int  # the queries from it on see so many of the leading keys
    causal: bool = False  # query i sees keys 0..i only


@dataclass(frozen=True, kw_only=True)
class Zigzag:
    """The cut of ``num_tokens`` new tokens, the first at position ``start``, over the ranks."""

    num_tokens: int
    num_ranks: int
    start: int = 0
    first_rank: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_ranks < 1 or self.start < 0:
            raise ValueError(f"a zigzag needs tokens, ranks and a start >= 0, got {self}")
        if not 0 <= self.first_rank < self.num_ranks:
            raise ValueError(f"a zigzag's first rank must be one of its ranks, got {self}")

    def role(self, rank: int) -> int:
        """Return the place of a rank in the cut, counted from the first rank."""
        return (rank - self.first_rank) % self.num_ranks

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first index of a chunk and the one past its last, within the new tokens."""
        pieces = 2 * self.num_ranks
        return chunk * self.num_tokens // pieces, (chunk + 1) * self.num_tokens // pieces

    def chunks(self, rank: int) -> tuple[int, int]:
        """Return the two chunks of a rank, the earlier first."""
        role = self.role(rank)
        return role, 2 * self.num_ranks - 1 - role

    def lengths(self, rank: int) -> tuple[int, int]:
        """Return the lengths in tokens of a rank's first and second chunk."""
        (a, b), (c, d) = (self.bounds(chunk) for chunk in self.chunks(rank))
        return b - a, d - c

    def count(self, rank: int) -> int:
        """Return how many of the new tokens a rank holds."""
        return sum(self.lengths(rank))

    def sees(self, query_rank: int, key_rank: int) -> Sight:
        """Return which of ``key_rank``'s new keys the new queries of ``query_rank`` see.

        A role's chunks lie around those of all higher roles, so no mask is needed
        but the causal one of a rank's own keys:

            own keys                 both chunks, causal in local order
            keys of a lower role     both query chunks see all of its first chunk, no other key
            keys of a higher role    only the second query chunk sees keys, and it sees all
        """
        if query_rank == key_rank:
            return Sight(first_query=0, num_keys=self.count(key_rank), causal=True)
        if self.role(key_rank) < self.role(query_rank):
            return Sight(first_query=0, num_keys=self.lengths(key_rank)[0])
        return Sight(first_query=self.lengths(query_rank)[0], num_keys=self.count(key_rank))

    def indices(self, rank: int) -> Tensor:
        """Return the indices of a rank's tokens within the new tokens, ascending, int64."""
        return torch.cat([torch.arange(*self.bounds(chunk)) for chunk in self.chunks(rank)])

    def positions(self, rank: int) -> Tensor:
        """Return the positions of a rank's tokens within the sequence, ascending, int64."""
        return self.indices(rank) + self.start

    @property
    def last_token_rank(self) -> int:
        """The rank that holds the last new token: chunk 2N-1 is never empty, and role 0 has it."""
        return self.first_rank
