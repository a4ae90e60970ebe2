"""An answer that waits or runs, and its part in the next plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.generation import Generation
from actors.kv.messages import StoredPrefix
from actors.messages import DecodeRow, PrefillChunk, TokenIds
from actors.plans import find_first_rank


@dataclass(order=True)
class Entry:
    """An answer's place in the queue: by priority, then by arrival, also after a preemption."""

    priority: int
    arrival: int
    generation: Generation = field(compare=False)
    shares: bool = field(default=True, compare=False)
    has_begun: bool = field(default=False, compare=False)
    was_looked_up: bool = field(default=False, compare=False)  # in the KV stores
    stored: StoredPrefix | None = field(default=None, compare=False)  # what they have
    # What they have is on its way from this position on; what lies before it is recomputed.
    coming: int | None = field(default=None, compare=False)
    keys: list[bytes] = field(default_factory=list, compare=False)  # of its blocks, as far as known


@dataclass
class Running:
    """An answer on the ranks."""

    entry: Entry
    sequence_id: int  # a preempted answer comes back under another one
    context: TokenIds  # to be prefilled: the prompt, and the answer so far
    home: int | None
    computed: int  # tokens whose KV the ranks hold
    sampling_rank: int = 0
    owner: int = 0  # of the decode block under way
    decoded: int = 0
    stored: StoredPrefix | None = None  # comes back, while what lies before it is computed
    is_restoring: bool = False  # its rows are grown, and those of the chunks before it
    restored_share: float = 0.0  # of its layers, that are there on all ranks
    ends: tuple[int, ...] = ()  # of these chunks
    stored_blocks: int = 0  # that are in the KV stores, or on their way

    @property
    def start(self) -> int:
        """The position of the first token that is left to prefill."""
        if self.stored is None or self.computed < self.stored.start:
            return self.computed
        return max(self.computed, self.stored.end)

    @property
    def next_end(self) -> int:
        """The position up to which the next chunk may go; with ``ends`` it must."""
        if self.ends:
            return self.ends[0]
        return len(self.context) if self.entry.coming is None else self.entry.coming

    @property
    def waits_for_stores(self) -> bool:
        """Whether nothing is left to compute before what the stores are to bring."""
        return self.next_end <= self.start < len(self.context)

    def waits_for_rows(self, most_s: float) -> bool:
        """Whether the next chunk attends to rows that will be on their way for longer than that."""
        if not self.is_restoring or self.ends or self.stored is None:
            return False
        return (1.0 - self.restored_share) * self.stored.choice.load_s > most_s

    @property
    def generation(self) -> Generation:
        """The answer."""
        return self.entry.generation

    @property
    def remaining(self) -> int:
        """Tokens left to prefill."""
        return max(0, len(self.context) - self.start)

    def chunk(self, count: int, cached_rows: tuple[int, ...]) -> PrefillChunk:
        """Return the next chunk of the prompt, behind ``cached_rows`` rows on each rank."""
        generation, start, stored = self.generation, self.start, self.stored
        end = start + count
        is_last = end == len(self.context)
        has_rules = is_last and generation.draw.rules is not None
        return PrefillChunk(
            sequence_id=self.sequence_id,
            token_ids=self.context[start:end],
            cached_rows=cached_rows,
            home=self.home,
            first_rank=find_first_rank(count, cached_rows),
            draw=generation.draw if is_last else None,
            context_ids=self.context if has_rules else None,
            answer_tokens=len(generation.token_ids),
            prompt_logprobs=None if generation.token_ids else generation.prompt_logprobs,
            next_token_id=None if is_last else int(self.context[end]),
            behind_restored=stored is not None and start >= stored.end,
        )

    def row(self, owners: tuple[int, ...], ahead: int = 0) -> DecodeRow:
        """Return the decode row whose steps' KV these ranks keep, ``ahead`` steps from now."""
        generation = self.generation
        return DecodeRow(
            sequence_id=self.sequence_id,
            token_id=None if ahead else generation.token_ids[-1],
            position=self.computed + ahead,
            index=len(generation.token_ids) + ahead,
            owners=owners,
            home=self.home,
            sampling_rank=self.sampling_rank,
            draw=generation.draw,
        )

    def owners(
        self, steps: int, held_rows: Sequence[int], block_tokens: int
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Return the ranks that keep the KV of a burst's steps, and what to go on with.

        Decode blocks go round the ranks, each to the one with the fewest rows, so
        that the shares stay even over any number of turns.
        """
        if self.home is not None:
            return (self.home,) * steps, (self.home, 0)
        owner, decoded = self.owner, self.decoded
        rows = list(held_rows)
        owners = []
        for _ in range(steps):
            if decoded % block_tokens == 0:
                owner = rows.index(min(rows))
            decoded += 1
            rows[owner] += 1
            owners.append(owner)
        return tuple(owners), (owner, decoded)
