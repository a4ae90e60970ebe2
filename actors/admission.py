"""Whether and where an answer may begin: what it shares, on which ranks it lies, if it fits."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from actors.choice import Chooser
from actors.device_cache import MIN_SHARED_TOKENS, DeviceCache, Match
from actors.generation import Generation
from actors.messages import TokenIds
from actors.prefix_tree import common_prefix
from actors.running import Entry, Running
from models.cost import SequenceShape
from models.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an answer can run."""

    match: Match  # what it shares
    home: int | None  # the rank that it lies on whole; None: it is sharded
    final_rows: tuple[int, ...]  # of its prompt, on each rank


class Admission:
    """Decides for one cluster; nothing is changed here."""

    def __init__(self, cache: DeviceCache, chooser: Chooser, decode_block_tokens: int) -> None:
        """Take the pages' bookkeeping and the prices."""
        self._cache = cache
        self._chooser = chooser
        self._decode_block_tokens = decode_block_tokens

    def check(self, generation: Generation) -> None:
        """Refuse an answer that would not fit even if nothing else were there.

        Raises:
            PromptError: With the numbers.
        """
        total = len(generation.prompt) + generation.tokens_to_come
        nothing_cached = (0,) * self._cache.num_ranks
        rows = max(self._final_rows(total, len(generation.prompt), nothing_cached, None))
        if rows > self._cache.rows_per_rank:
            raise PromptError(
                f"the prompt and its answer of up to {generation.tokens_to_come} tokens need"
                f" {rows} rows of KV on a rank, but its pages hold {self._cache.rows_per_rank}:"
                " shorten them, or give ranks more memory (kv_cache_memory_bytes)"
            )

    def match(self, entry: Entry, context: TokenIds) -> Match:
        """Return what an answer's prompt can share."""
        if not entry.shares or entry.generation.prompt_logprobs is not None:
            return Match()  # log-probabilities of a prompt are of every token of it
        return self._cache.match(entry.generation.cache_salt, context)

    def waits_to_share(
        self, entry: Entry, context: TokenIds, match: Match, running: Iterable[Running]
    ) -> bool:
        """Return whether one that is prefilled now begins alike, for longer than what is there."""
        generation = entry.generation
        if not self._cache.shares or generation.prompt_logprobs is not None:
            return False
        shareable = context[:-1]
        least = max(match.tokens + 1, min(MIN_SHARED_TOKENS, len(shareable)))
        return any(
            other.remaining
            and other.generation.cache_salt == generation.cache_salt
            and common_prefix(other.context, shareable) >= least
            for other in running
        )

    def place(
        self, entry: Entry, context: TokenIds, match: Match, running: Collection[Running]
    ) -> Place | None:
        """Return where an answer can run now, or None where its prompt does not fit."""
        generation = entry.generation
        total = len(context) + generation.tokens_to_come
        for attempt in (match, Match()):
            cached_rows = self._cache.rows(attempt.source_id, attempt.tokens)
            home = self._find_home(
                generation, len(context) - attempt.tokens, total, cached_rows, running
            )
            final_rows = self._final_rows(len(context), len(context), cached_rows, home)
            if home is not None and not self._cache.fits(final_rows, attempt):
                home = None
                final_rows = self._final_rows(len(context), len(context), cached_rows, home)
            # A prefix that lies on few ranks may leave no room on them for the rest.
            most_rows = max(self._final_rows(total, len(context), cached_rows, home))
            if most_rows <= self._cache.rows_per_rank and self._cache.fits(final_rows, attempt):
                return Place(match=attempt, home=home, final_rows=final_rows)
            if attempt.source_id is None:
                break
        return None

    def _find_home(
        self,
        generation: Generation,
        new_tokens: int,
        total: int,
        cached_rows: tuple[int, ...],
        running: Collection[Running],
    ) -> int | None:
        """Return the rank that is to compute a sequence whole, or None."""
        if total > self._cache.rows_per_rank:
            return None
        return self._chooser.home(
            SequenceShape(new_tokens=new_tokens, cached_rows=cached_rows),
            free_rank=self._idle_rank(running),
            answer_tokens=generation.tokens_to_come,
        )

    def _idle_rank(self, running: Collection[Running]) -> int:
        """The rank with the least to do for sequences that are its own."""
        homes = [each.home for each in running]
        loads = [(homes.count(rank), -free) for rank, free in enumerate(self._cache.free_pages())]
        return loads.index(min(loads))

    def _final_rows(
        self, total: int, prefilled: int, cached_rows: tuple[int, ...], home: int | None
    ) -> tuple[int, ...]:
        """Return how many rows each rank holds at most of ``total`` tokens."""
        num_ranks = self._cache.num_ranks
        if home is not None:
            return tuple(total if rank == home else 0 for rank in range(num_ranks))
        # Decode blocks go to the rank with the fewest rows; a zigzag is two tokens over even.
        even = -(-total // num_ranks) + self._decode_block_tokens + 2
        new_share = -(-(prefilled - sum(cached_rows)) // num_ranks) + 2
        return tuple(min(total, max(even, rows + new_share)) for rows in cached_rows)
