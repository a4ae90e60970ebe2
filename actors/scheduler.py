"""Which plan comes next, for all requests: events in, plans out. No Ray, no tensors, no clock.

Call `next_step`, have all ranks execute its plan, and hand their results to `advance`,
until `next_step` returns None. What waits and fits is prefilled in one step, each sequence
sharded on its own; then all that run decode in bursts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from actors.choice import Choice, Chooser
from actors.device_cache import MIN_SHARED_TOKENS, DeviceCache, Match
from actors.generation import Generation
from actors.messages import (
    DecodePlan,
    DecodeRow,
    Plan,
    PrefillChunk,
    PrefillPlan,
    StepResult,
    TokenIds,
)
from actors.plans import chunk_spans, find_first_rank, owned_spans
from actors.prefix_tree import common_prefix
from models.cost import SequenceShape
from models.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan, the answers that it is for in the plan's order, and what was expected of it."""

    plan: Plan
    generations: tuple[Generation, ...]
    new_tokens: int
    cached_tokens: int
    algorithm: str
    predicted_s: float | None
    choice: Choice | None = None  # of a prefill


@dataclass
class _Running:
    generation: Generation
    home: int | None
    sampling_rank: int
    computed: int = 0  # tokens whose KV the ranks hold
    owner: int = 0  # of the decode block under way
    decoded: int = 0


class Scheduler:
    """Waiting and running answers of one cluster. Not thread-safe."""

    def __init__(
        self,
        cache: DeviceCache,
        chooser: Chooser,
        *,
        decode_block_tokens: int,
        burst_steps: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Take the pages' bookkeeping and the choice of algorithms.

        Args:
            cache: Of the ranks' pages, all free.
            chooser: Says how a prefill goes around.
            decode_block_tokens: So many decoded tokens in a row stay on one rank.
            burst_steps: Decode steps of one plan.
            max_num_seqs: Answers that run at once.
            max_num_batched_tokens: New tokens of one prefill step, unless one prompt has more.
        """
        self.cache = cache
        self._chooser = chooser
        self._decode_block_tokens = decode_block_tokens
        self._burst_steps = burst_steps
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, _Running] = {}
        self._ended: tuple[int, ...] = ()
        self._steps = 0

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers that have begun and not ended."""
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return self._steps

    def add(self, generation: Generation) -> None:
        """Take an answer to make, behind those that wait.

        Raises:
            PromptError: It would not fit even if nothing else were there.
        """
        nothing_cached = (0,) * self.cache.num_ranks
        rows = max(self._final_rows(generation, nothing_cached, None))
        if rows > self.cache.rows_per_rank:
            raise PromptError(
                f"the prompt and its answer of up to {generation.tokens_to_come} tokens need"
                f" {rows} rows of KV on a rank, but its pages hold {self.cache.rows_per_rank}:"
                " shorten them, or give ranks more memory (kv_cache_memory_bytes)"
            )
        self._waiting.append(generation)

    def next_step(self) -> Step | None:
        """Return what all ranks do next, or None where nothing is left to do."""
        step = self._prefill() or self._decode()
        self._steps += step is not None
        return step

    def advance(self, step: Step, results: Sequence[StepResult]) -> list[Generation]:
        """Take what the ranks made of a step; return the answers that it completed."""
        plan = step.plan
        parts: Sequence[PrefillChunk | DecodeRow] = (
            plan.chunks if isinstance(plan, PrefillPlan) else plan.rows
        )
        if step.choice is not None:
            self._chooser.observe(step.choice, max(result.wall_s for result in results))
        done = []
        for index, (part, generation) in enumerate(zip(parts, step.generations, strict=True)):
            token_ids = results[part.sampling_rank].sequences[index].token_ids
            running = self._running[part.sequence_id]
            if isinstance(part, PrefillChunk):
                running.computed += len(part.token_ids)
                self.cache.accept(part.sequence_id, generation.context()[: running.computed])
            else:
                running.computed += len(token_ids)
            generation.advance(token_ids)
            if generation.finish_reason is not None:
                self._finish(running)
                done.append(generation)
        return done

    def _finish(self, running: _Running) -> None:
        sequence_id = running.generation.sequence_id
        # What was computed behind a stop is not part of the answer.
        self.cache.accept(sequence_id, running.generation.context()[: running.computed])
        self.cache.finish(sequence_id)
        del self._running[sequence_id]
        self._ended += (sequence_id,)

    def _prefill(self) -> Step | None:
        """Begin what waits, in order, as far as it fits."""
        begun: list[_Running] = []
        chunks: list[PrefillChunk] = []
        passed: list[Generation] = []
        new_tokens = 0
        while self._waiting and len(self._running) < self._max_num_seqs:
            generation = self._waiting[0]
            match = self._match(generation)
            tokens = len(generation.prompt) - match.tokens
            if chunks and new_tokens + tokens > self._max_num_batched_tokens:
                break
            if _shares_more(generation, match, begun):
                # It waits for the step that computes what it can share.
                passed.append(self._waiting.popleft())
                continue
            placed = self._place(generation, match)
            if placed is None:
                break
            self._waiting.popleft()
            new_tokens += tokens
            begun.append(placed[0])
            chunks.append(placed[1])
        self._waiting.extendleft(reversed(passed))
        if not chunks:
            return None
        return self._prefill_step(begun, chunks)

    def _prefill_step(self, begun: list[_Running], chunks: list[PrefillChunk]) -> Step:
        choice = self._chooser.prefill([_shape(chunk) for chunk in chunks])
        return Step(
            plan=PrefillPlan(
                number=self._steps,
                cache_ops=self.cache.take_ops(),
                ended=self._take_ended(),
                chunks=tuple(chunks),
                algorithm=choice.algorithm,
            ),
            generations=tuple(running.generation for running in begun),
            new_tokens=sum(len(chunk.token_ids) for chunk in chunks),
            cached_tokens=sum(chunk.start for chunk in chunks),
            algorithm="whole" if choice.whole else choice.algorithm,
            predicted_s=choice.predicted_s,
            choice=choice,
        )

    def _match(self, generation: Generation) -> Match:
        if generation.prompt_logprobs is not None:
            return Match()  # these are of every token of the prompt, so every token is computed
        return self.cache.match(generation.cache_salt, generation.prompt)

    def _place(self, generation: Generation, match: Match) -> tuple[_Running, PrefillChunk] | None:
        """Let an answer begin where there is room for all it may become; None: not now."""
        for attempt in (match, Match()):
            cached_rows = self.cache.rows(attempt.source_id, attempt.tokens)
            new_ids = generation.prompt[attempt.tokens :]
            home = self._find_home(generation, new_ids, cached_rows)
            final_rows = self._final_rows(generation, cached_rows, home)
            if home is not None and not self.cache.fits(final_rows, attempt):
                home = None
                final_rows = self._final_rows(generation, cached_rows, home)
            if self.cache.fits(final_rows, attempt):
                break
            # A prefix that lies on few ranks may leave no room on them for the rest.
            if self._running or attempt.source_id is None:
                return None
        self.cache.begin(generation.sequence_id, generation.cache_salt, attempt, final_rows)
        generation.num_cached_tokens = attempt.tokens
        has_rules = generation.draw.rules is not None
        chunk = PrefillChunk(
            sequence_id=generation.sequence_id,
            token_ids=new_ids,
            cached_rows=cached_rows,
            home=home,
            first_rank=find_first_rank(len(new_ids), cached_rows),
            draw=generation.draw,
            context_ids=generation.prompt if has_rules else None,
            prompt_logprobs=generation.prompt_logprobs,
        )
        self.cache.grow(generation.sequence_id, chunk_spans(chunk))
        running = _Running(generation, home, chunk.sampling_rank, attempt.tokens)
        self._running[generation.sequence_id] = running
        return running, chunk

    def _find_home(
        self, generation: Generation, new_ids: TokenIds, cached_rows: tuple[int, ...]
    ) -> int | None:
        """Return the rank that is to compute a sequence whole, or None."""
        return self._chooser.home(
            SequenceShape(new_tokens=len(new_ids), cached_rows=cached_rows),
            free_rank=self._idle_rank(),
            answer_tokens=generation.tokens_to_come,
        )

    def _idle_rank(self) -> int:
        """The rank with the least to do for sequences that are its own."""
        homes = [running.home for running in self._running.values()]
        loads = [(homes.count(rank), -free) for rank, free in enumerate(self.cache.free_pages())]
        return loads.index(min(loads))

    def _final_rows(
        self, generation: Generation, cached_rows: tuple[int, ...], home: int | None
    ) -> tuple[int, ...]:
        """Return how many rows each rank comes to hold at most."""
        num_ranks = self.cache.num_ranks
        total = len(generation.prompt) + generation.tokens_to_come
        if home is not None:
            return tuple(total if rank == home else 0 for rank in range(num_ranks))
        # Decode blocks go to the rank with the fewest rows; a zigzag is two tokens over even.
        even = -(-total // num_ranks) + self._decode_block_tokens + 2
        new_share = -(-(len(generation.prompt) - sum(cached_rows)) // num_ranks) + 2
        return tuple(min(total, max(even, rows + new_share)) for rows in cached_rows)

    def _decode(self) -> Step | None:
        """Return a burst of all that run."""
        if not self._running:
            return None
        cached_tokens = sum(running.computed for running in self._running.values())
        runs = list(self._running.values())
        predicted_s = self._chooser.decode(
            [
                self.cache.rows(run.generation.sequence_id, run.computed)
                if run.home is None
                else (run.computed,)
                for run in runs
            ]
        )
        rows = tuple(self._decode_row(running) for running in runs)
        steps = max(len(row.owners) for row in rows)
        return Step(
            plan=DecodePlan(
                number=self._steps,
                cache_ops=self.cache.take_ops(),
                ended=self._take_ended(),
                rows=rows,
            ),
            generations=tuple(running.generation for running in runs),
            new_tokens=sum(len(row.owners) for row in rows),
            cached_tokens=cached_tokens,
            algorithm="all_gather" if any(row.home is None for row in rows) else "whole",
            predicted_s=None if predicted_s is None else predicted_s * steps,
        )

    def _take_ended(self) -> tuple[int, ...]:
        ended, self._ended = self._ended, ()
        return ended

    def _decode_row(self, running: _Running) -> DecodeRow:
        generation = running.generation
        steps = min(self._burst_steps, generation.tokens_to_come)
        owners = self._take_owners(running, steps)
        self.cache.grow(
            generation.sequence_id, owned_spans(running.computed, owners, self.cache.num_ranks)
        )
        return DecodeRow(
            sequence_id=generation.sequence_id,
            token_id=generation.token_ids[-1],
            position=running.computed,
            index=len(generation.token_ids),
            owners=owners,
            home=running.home,
            sampling_rank=running.sampling_rank,
            draw=generation.draw,
        )

    def _take_owners(self, running: _Running, steps: int) -> tuple[int, ...]:
        """The ranks that keep the KV of a burst's steps.

        Decode blocks go round the ranks, each to the one with the fewest rows, so
        that the shares stay even over any number of turns.
        """
        if running.home is not None:
            return (running.home,) * steps
        rows = list(self.cache.rows(running.generation.sequence_id, running.computed))
        owners = []
        for _ in range(steps):
            if running.decoded % self._decode_block_tokens == 0:
                running.owner = rows.index(min(rows))
            running.decoded += 1
            rows[running.owner] += 1
            owners.append(running.owner)
        return tuple(owners)


def _shape(chunk: PrefillChunk) -> SequenceShape:
    return SequenceShape(
        new_tokens=len(chunk.token_ids), cached_rows=chunk.cached_rows, whole_rank=chunk.home
    )


def _shares_more(generation: Generation, match: Match, begun: Sequence[_Running]) -> bool:
    """Return whether a prompt begins like one of this step, for longer than what it shares now."""
    if generation.prompt_logprobs is not None:
        return False
    shareable = generation.prompt[:-1]
    least = max(match.tokens + 1, min(MIN_SHARED_TOKENS, len(shareable)))
    return any(
        other.generation.cache_salt == generation.cache_salt
        and common_prefix(other.generation.prompt, shareable) >= least
        for other in begun
    )
