"""One answer while it is made: its tokens, its text, its log-probabilities, its steps."""

import asyncio
import functools
import operator
import time
from collections import Counter
from collections.abc import Sequence

from actors.detokenizer import AnswerText
from actors.generation import Generation
from actors.kv.messages import RestoreTimes, Tier, parts_behind
from actors.kv.pieces import ACTIVATIONS
from actors.logprobs import Spell, read_logprobs, read_prompt_logprobs
from actors.messages import (
    CompletionOutput,
    DecodeRow,
    Logprobs,
    PrefillChunk,
    RequestDelta,
    SequenceResult,
    StepResult,
)
from actors.records import Phase, Restored, StepRecord
from actors.scheduler import Step
from models.logprobs import TokenLogprobs, join_logprobs


class Answer:
    """What the ranks' results add up to. Made in the coordinator's event loop."""

    def __init__(self, generation: Generation, text: AnswerText | None) -> None:
        """Begin; ``text`` is the generation's own, None without a tokenizer."""
        self.generation = generation
        self.records: list[StepRecord] = []
        self.restored: list[Restored] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin_s = 0.0  # of its first step, by time.perf_counter
        self.first_token_s = 0.0
        # Of each record: its end by time.perf_counter, and tokens of this prompt computed in it.
        self._steps: list[tuple[float, int]] = []
        self._text = text
        self._logprobs: list[TokenLogprobs] = []
        # By the position of a chunk: the chunk, and each rank's rows of it.
        self._prompt_logprobs: dict[int, tuple[PrefillChunk, list[TokenLogprobs | None]]] = {}
        # Tokens, and characters, that a stream has; those of a continued answer it has already.
        self._told = len(generation.token_ids), 0 if text is None else len(text.safe_text(None))
        self._told_logprobs = 0  # results' log-probabilities that it has

    def take(
        self,
        record: StepRecord,
        part: PrefillChunk | DecodeRow,
        results: Sequence[SequenceResult],
    ) -> None:
        """Take what each rank made of this answer's part in a step."""
        self.records.append(record)
        tokens = len(part.token_ids) if isinstance(part, PrefillChunk) else 0
        self._steps.append((time.perf_counter(), tokens))
        if self.generation.made_tokens:
            self.first_token_s = self.first_token_s or time.perf_counter()
        if isinstance(part, PrefillChunk) and part.behind_restored:
            self._take_restored(record, part, results)
        if any(each.bad_from is not None for each in results):
            return  # what was computed on damaged rows is void
        self._logprobs += [each.logprobs for each in results if each.logprobs is not None]
        if isinstance(part, PrefillChunk) and part.prompt_logprobs is not None:
            self._prompt_logprobs[part.start] = part, [each.prompt_logprobs for each in results]

    def _take_restored(
        self, record: StepRecord, chunk: PrefillChunk, results: Sequence[SequenceResult]
    ) -> None:
        """Note what came back before a chunk; rows behind a damaged one are void."""
        stored, tokens = self.generation.restored[-1]
        damaged = [each.bad_from for each in results if each.bad_from is not None]
        end = min(damaged, default=chunk.start)
        tiers: Counter[Tier] = Counter()
        projected = 0
        for part in parts_behind(stored, end - tokens):
            if part.start < end:
                rows = min(part.end, end) - part.start
                tiers[part.tier] += rows
                projected += rows * (part.lease.piece.encoding == ACTIVATIONS)
        now_s = time.perf_counter()
        measured_s = max(now_s - stored.begin_s, 1e-9)
        since = sum(end_s <= stored.begin_s for end_s, _ in self._steps)
        steps = self.records[since:]
        times = [each.restore or RestoreTimes() for each in results]
        busy_s = [
            sum(
                each.ranks_wall_s[rank] - each.ranks_parts_s[rank].get("restore", 0.0)
                for each in steps
            )
            + of_rank.project_s
            for rank, of_rank in enumerate(times)
        ]
        self.restored.append(
            Restored(
                tokens=tiers.total(),
                tokens_by_tier=dict(tiers),
                find_s=stored.find_s,
                stage_s=stored.stage_s,
                copy_s=max(parts_s.get("restore", 0.0) for parts_s in record.ranks_parts_s),
                projected_tokens=projected,
                recomputed_tokens=sum(tokens for _, tokens in self._steps[since:-1]),
                recompute_s=sum(max(each.ranks_wall_s) for each in steps[:-1]),
                recompute_predicted_s=sum(each.predicted_s or 0.0 for each in steps[:-1]),
                link_bytes=sum(each.link_bytes for each in times),
                predicted_s=stored.choice.predicted_s,
                measured_s=measured_s,
                alternatives_s=stored.choice.alternatives_s,
                link_idle=_idle([each.link_s for each in times], measured_s),
                device_idle=_idle(busy_s, measured_s),
                simulated_link_bytes_per_s=stored.choice.link_bytes_per_s,
            )
        )

    def delta(self, request_id: str, index: int, spell: Spell) -> RequestDelta | None:
        """Return what is new since the last call, or None where nothing is."""
        generation = self.generation
        told_tokens, told_text = self._told
        text = "" if self._text is None else self._text.safe_text(generation.finish_reason)
        tokens = generation.token_ids[told_tokens:]
        ended = generation.finish_reason is not None
        if not tokens and len(text) <= told_text and not ended:
            return None
        self._told = len(generation.token_ids), max(told_text, len(text))
        return RequestDelta(
            request_id=request_id,
            index=index,
            text=text[told_text:],
            token_ids=tuple(tokens),
            finish_reason=generation.finish_reason,
            stop_reason=generation.stop_reason,
            logprobs=self._new_logprobs(len(tokens), spell),
            prompt_tokens=len(generation.prompt),
            num_cached_tokens=generation.num_cached_tokens,
        )

    def _new_logprobs(self, tokens: int, spell: Spell) -> tuple[Logprobs, ...] | None:
        """Return those of the ``tokens`` new ones; none of what a stop text cut off."""
        if not self._logprobs:
            return None
        new = self._logprobs[self._told_logprobs :]
        self._told_logprobs = len(self._logprobs)
        return tuple(read_logprobs(join_logprobs(new), spell)[:tokens]) if new else ()

    def complete(self) -> None:
        """Wake whoever waits for the answer."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits that there will be no answer."""
        if not self.done.done():
            self.done.set_exception(error)

    def completion(self, index: int, spell: Spell) -> CompletionOutput:
        """Return the answer, which is complete."""
        generation = self.generation
        assert generation.finish_reason is not None
        # Those of tokens beyond a stop text are left out, as the tokens are.
        made = generation.made_tokens
        made_ids = generation.token_ids[len(generation.token_ids) - made :]
        logprobs = (
            tuple(read_logprobs(join_logprobs(self._logprobs), spell)[:made])
            if self._logprobs
            else None
        )
        return CompletionOutput(
            index=index,
            text="" if self._text is None else self._text.text,
            token_ids=tuple(generation.token_ids),
            finish_reason=generation.finish_reason,
            stop_reason=generation.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=(
                None
                if logprobs is None
                else sum(
                    place[token_id].logprob
                    for place, token_id in zip(logprobs, made_ids, strict=True)
                )
            ),
        )

    def prompt_logprobs(
        self, prompt_tokens: int, spell: Spell
    ) -> tuple[Logprobs | None, ...] | None:
        """Return those of the prompt's tokens, where they were asked for."""
        if not self._prompt_logprobs:
            return None
        return read_prompt_logprobs(list(self._prompt_logprobs.values()), prompt_tokens, spell)


def _idle(busy_s: Sequence[float], total_s: float) -> float:
    """Return the share of a time in which some ranks were not busy, their mean."""
    return max(0.0, 1.0 - sum(busy_s) / (len(busy_s) * total_s))


def step_record(
    step: Step, results: Sequence[StepResult], *, plan_s: float, wall_s: float
) -> StepRecord:
    """Return what a step was, and where its time went."""
    plan = step.plan
    prefill_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
    decode_tokens = sum(
        max(len(result.sequences[index].token_ids) for result in results)
        for index in range(len(plan.chunks), len(plan.parts))
    )
    kinds: dict[tuple[bool, bool], Phase] = {(True, False): "prefill", (False, True): "decode"}
    return StepRecord(
        number=plan.number,
        phase=kinds.get((bool(plan.chunks), bool(plan.rows)), "mixed"),
        sequence_ids=tuple(generation.sequence_id for generation in step.generations),
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        cached_tokens=step.cached_tokens,
        algorithm=step.algorithm,
        num_ranks=len(results),
        predicted_s=step.predicted_s,
        prices_s={} if step.choice is None else step.choice.prices_s,
        plan_s=plan_s,
        wall_s=wall_s,
        ranks_wall_s=tuple(result.wall_s for result in results),
        ranks_parts_s=tuple(result.parts_s for result in results),
    )


def joint_restored(answers: Sequence[Answer]) -> Restored | None:
    """Return what came back for some answers, None where nothing did."""
    each = [restored for answer in answers for restored in answer.restored if restored.tokens]
    return functools.reduce(operator.add, each) if each else None


def joint_records(answers: Sequence[Answer]) -> tuple[StepRecord, ...]:
    """Return the steps that some answers took part in, each once."""
    by_number = {record.number: record for answer in answers for record in answer.records}
    return tuple(by_number[number] for number in sorted(by_number))
