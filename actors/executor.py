"""One rank's part of a plan: which rows it computes, and what it samples."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors.kv.activations import ActivationCapture, StepRows, TakeInputs
from actors.kv.loader import Restoring
from actors.kv.messages import RestoreTimes
from actors.kv.rank import RankStore
from actors.messages import DecodeRow, Plan, PrefillChunk, SequenceResult
from actors.plans import chunk_spans
from actors.sampler import Sampler
from attention import PassKVAttention, PassQAttention, Ring, RingSequence
from attention.timing import PartTimer
from models.decoder import Decoder
from models.layer_attention import DecodeAttention, MixedAttention, NewRows, PrefillAttention
from models.logprobs import TokenLogprobs, logprobs_in_pieces
from models.page_pool import PagePool
from models.page_table import Truncate

AROUND_RING = {"pass_kv": PassKVAttention, "pass_q": PassQAttention}
Choice = tuple[int, bool]  # a token, and whether it ends the answer
_Restored = tuple[int | None, RestoreTimes | None]  # first damaged position, and times
NOTHING: _Restored = (None, None)


class PlanExecutor:
    """Runs all layers and all ring rounds of plans on one rank; every rank gets the same plans."""

    def __init__(self, decoder: Decoder, pool: PagePool, ring: Ring, *, piece_bytes: int) -> None:
        """Take the model, the pages and the place in the ring."""
        self._decoder = decoder
        self._pool = pool
        self.ring = ring  # may be another end of the same ring while a trace is recorded
        self._piece_bytes = piece_bytes
        self.store: RankStore | None = None  # set once, where there is a KV store
        self._restoring: dict[int, Restoring] = {}  # by sequence, those under way
        self._awaited: list[Restoring] = []  # by the step under way
        self._sampler = Sampler(decoder.config.vocab_size, decoder.device)
        self._rounds_done = 0
        self._rounds = 1
        # By sequence, what the last burst chose last: rows of the next one may go on from it.
        self._carried: dict[int, Choice] = {}

    @property
    def progress(self) -> float:
        """The share of the prefill under way that is done, 0 to 1."""
        return min(1.0, self._rounds_done / self._rounds)

    @property
    def restoring(self) -> dict[int, float]:
        """Of sequences whose rows come back, the share of layers that is there, 0 to 1."""
        return {sequence_id: each.share for sequence_id, each in list(self._restoring.items())}

    def execute(self, plan: Plan, timer: PartTimer) -> tuple[SequenceResult, ...]:
        """Return what this rank knows of each of the plan's sequences, in their order."""
        for blocks in plan.stores:
            assert self.store is not None
            self.store.writer.submit(blocks)
        for op in plan.cache_ops:
            if isinstance(op, Truncate) and op.sequence_id in self._restoring:
                self._restoring.pop(op.sequence_id).abort()  # its pages are given to others
            self._pool.apply(op, self.ring.rank)
            if self._capture is not None and isinstance(op, Truncate):
                self._capture.forget(op.sequence_id, op.position)
        for sequence_id in plan.ended:
            self._sampler.forget(sequence_id)
            if self._capture is not None:
                self._capture.forget(sequence_id)
        for order in plan.restores:
            parts = [part for part in order.parts if part.rank == self.ring.rank]
            if parts:
                assert self.store is not None
                self._restoring[order.sequence_id] = self.store.loader.begin(
                    order.sequence_id, parts, patience_s=order.patience_s
                )
        if plan.chunks:
            return self._mixed(plan, timer)
        return self._burst(plan.rows, timer)

    def _mixed(self, plan: Plan, timer: PartTimer) -> tuple[SequenceResult, ...]:
        """Compute prefill chunks, and one decode step of the rows beside them."""
        rank = self.ring.rank
        computed = [chunk for chunk in plan.chunks if chunk.home is None]
        computed += [chunk for chunk in plan.chunks if chunk.home == rank]
        if not computed:
            nothing = tuple(SequenceResult(token_ids=()) for _ in plan.chunks)
            return nothing + self._burst(plan.rows, timer)
        # Of each chunk, the indices of the new tokens that this rank computes.
        indices = [
            chunk.zigzag().indices(rank)
            if chunk.home is None
            else torch.arange(len(chunk.token_ids))
            for chunk in computed
        ]
        samples = [chunk.draw is not None and chunk.sampling_rank == rank for chunk in computed]
        keeps_all = any(chunk.prompt_logprobs is not None for chunk in plan.chunks)
        rows = self._own_rows(plan.rows)
        awaited = {
            chunk.sequence_id: self._restoring.pop(chunk.sequence_id)
            for chunk in computed
            if chunk.behind_restored and chunk.sequence_id in self._restoring
        }
        self._awaited = list(awaited.values())
        hidden_TE = self._forward(plan, computed, indices, samples, rows, keeps_all, timer)
        hidden_TE, decoded_BE = hidden_TE.split([len(hidden_TE) - len(rows), len(rows)])
        restored: dict[int, _Restored] = {
            sequence_id: each.finish() for sequence_id, each in awaited.items()
        }
        prompt_logprobs: dict[int, TokenLogprobs] = {}
        if keeps_all:
            pieces = hidden_TE.split([len(each) for each in indices])
            for chunk, own, piece_TE in zip(computed, indices, pieces, strict=True):
                if chunk.prompt_logprobs is not None:
                    with timer("sample"):
                        found = self._prompt_logprobs(piece_TE, own, chunk)
                    prompt_logprobs[chunk.sequence_id] = found
            hidden_TE = hidden_TE[_last_rows(indices, samples)]
        with timer("sample"):
            token_ids = self._sample_first(
                hidden_TE, [chunk for chunk, own in zip(computed, samples, strict=True) if own]
            )
        if rows:
            choices = self._choose(decoded_BE, rows, 0, timer)
            for row, (token_id, _) in zip(rows, choices, strict=True):
                token_ids[row.sequence_id] = (token_id,)
        return tuple(
            SequenceResult(
                token_ids=token_ids.get(part.sequence_id, ()),
                logprobs=self._sampler.take_logprobs(part.sequence_id),
                prompt_logprobs=prompt_logprobs.get(part.sequence_id),
                bad_from=restored.get(part.sequence_id, NOTHING)[0],
                restore=restored.get(part.sequence_id, NOTHING)[1],
            )
            for part in plan.parts
        )

    def _forward(
        self,
        plan: Plan,
        computed: Sequence[PrefillChunk],
        indices: Sequence[Tensor],
        samples: Sequence[bool],
        decoded: Sequence[DecodeRow],
        keeps_all: bool,
        timer: PartTimer,
    ) -> Tensor:
        """Return the hidden states that are wanted, those of decode rows behind all others.

        Of chunks these are all rows, or the last tokens that are sampled from.
        """
        device = self._decoder.device
        ids_T = torch.cat(
            [
                torch.from_numpy(chunk.token_ids).long()[own]
                for chunk, own in zip(computed, indices, strict=True)
            ]
        )
        positions_T = torch.cat(
            [own + chunk.start for chunk, own in zip(computed, indices, strict=True)]
        )
        attention = self._prefill_attention(plan, computed, indices, keeps_all, timer)
        kept = None if keeps_all else _last_rows(indices, samples)
        on_inputs = self._capture_rows(computed, decoded)
        if not decoded:
            return self._decoder.forward(
                ids_T.to(device),
                positions_T.to(device),
                attention,
                timer,
                keep_rows=kept,
                on_inputs=on_inputs,
            )
        decoded_ids, decoded_positions, decode_attention = self._decode_inputs(
            decoded, 0, {}, timer
        )
        num_rows = len(ids_T)
        if kept is not None:
            kept += range(num_rows, num_rows + len(decoded))
        return self._decoder.forward(
            torch.cat([ids_T, torch.tensor(decoded_ids)]).to(device),
            torch.cat([positions_T, torch.tensor(decoded_positions)]).to(device),
            MixedAttention(attention, decode_attention, len(decoded)),
            timer,
            keep_rows=kept,
            on_inputs=on_inputs,
        )

    @property
    def _capture(self) -> ActivationCapture | None:
        return None if self.store is None else self.store.capture

    def _capture_rows(
        self, chunks: Sequence[PrefillChunk], decoded: Sequence[DecodeRow], step: int = 0
    ) -> TakeInputs | None:
        """Return what takes the inputs of layers that are stored; decode rows come last."""
        if self._capture is None:
            return None
        rank, end = self.ring.rank, 0
        rows = []
        for chunk in chunks:
            for position, count in chunk_spans(chunk)[rank]:
                rows.append(
                    StepRows(sequence_id=chunk.sequence_id, position=position, row=end, count=count)
                )
                end += count
        rows += [
            StepRows(sequence_id=row.sequence_id, position=row.position + step, row=index, count=1)
            for index, row in enumerate(decoded, end)
            if row.owners[step] == rank
        ]
        return self._capture.step(rows)

    def _prefill_attention(
        self,
        plan: Plan,
        computed: Sequence[PrefillChunk],
        indices: Sequence[Tensor],
        keeps_all: bool,
        timer: PartTimer,
    ) -> PrefillAttention:
        """Return the attention of the chunks that this rank computes; the sharded come first."""
        rows = [
            NewRows(
                sequence_id=chunk.sequence_id,
                first_row=chunk.cached_rows[self.ring.rank],
                count=len(own),
                query_rank=None if chunk.draw is None else chunk.sampling_rank,
            )
            for chunk, own in zip(computed, indices, strict=True)
        ]
        sharded = [chunk for chunk in computed if chunk.home is None]
        around_ring = AROUND_RING[plan.algorithm](
            [
                RingSequence(zigzag=chunk.zigzag(), cached_rows=chunk.cached_rows)
                for chunk in sharded
            ],
            self.ring,
            timer,
            piece_bytes=self._piece_bytes,
            on_round=self._count_round,
        )
        last_layer = self._decoder.config.num_layers - 1
        # The last layer goes round the ring only where all of its rows are wanted.
        self._rounds_done = 0
        self._rounds = max(1, (last_layer + keeps_all) * around_ring.num_rounds)
        return PrefillAttention(
            rows[: len(sharded)],
            rows[len(sharded) :],
            self._pool,
            self.ring,
            around_ring,
            timer,
            last_layer=None if keeps_all else last_layer,
            before_layer=functools.partial(self._wait_for, timer=timer),
        )

    def _wait_for(self, layer: int, timer: PartTimer) -> None:
        """Return when what is restored of a layer is there."""
        if self._awaited:
            with timer("restore"):
                for restoring in self._awaited:
                    restoring.wait(layer)

    def _sample_first(
        self, hidden_RE: Tensor, chunks: Sequence[PrefillChunk]
    ) -> dict[int, tuple[int, ...]]:
        """Return the token that follows each of these chunks, by sequence."""
        if not chunks:
            return {}
        chosen: dict[int, tuple[int, ...]] = {}
        for chunk, logits_V in zip(chunks, self._decoder.logits(hidden_RE), strict=True):
            assert chunk.draw is not None
            self._sampler.begin(chunk)
            token_id, _ = self._sampler.choose(
                logits_V, chunk.sequence_id, chunk.draw, chunk.answer_tokens
            )
            chosen[chunk.sequence_id] = (token_id,)
        return chosen

    def _prompt_logprobs(
        self, hidden_TE: Tensor, indices_T: Tensor, chunk: PrefillChunk
    ) -> TokenLogprobs:
        """Return the log-probabilities of the tokens that follow this rank's own in the prompt."""
        assert chunk.prompt_logprobs is not None
        next_T = torch.from_numpy(chunk.token_ids).long()[1:]
        if chunk.next_token_id is not None:
            next_T = torch.cat([next_T, torch.tensor([chunk.next_token_id])])
        # Nothing follows the prompt's last token.
        before_next_R = indices_T[indices_T < len(next_T)]
        return logprobs_in_pieces(
            self._decoder.logits,
            hidden_TE[: len(before_next_R)],
            next_T[before_next_R].to(self._decoder.device),
            chunk.prompt_logprobs,
            self._decoder.config.vocab_size,
        )

    def _own_rows(self, rows: Sequence[DecodeRow]) -> list[DecodeRow]:
        """Return the rows that this rank computes: the sharded ones, then its own whole ones."""
        sharded = [row for row in rows if row.home is None]
        return sharded + [row for row in rows if row.home == self.ring.rank]

    def _burst(self, rows: Sequence[DecodeRow], timer: PartTimer) -> tuple[SequenceResult, ...]:
        """Decode step after step; a row leaves at a stop id, or where its steps are over."""
        token_ids: dict[int, list[int]] = {row.sequence_id: [] for row in rows}
        active = self._go_on(self._own_rows(rows))
        self._carried = {}
        for step in range(max((len(row.owners) for row in rows), default=0)):
            active = [row for row in active if step < len(row.owners)]
            if not active:
                break
            ids, positions, attention = self._decode_inputs(active, step, token_ids, timer)
            hidden_BE = self._decoder.forward(
                torch.tensor(ids, device=self._decoder.device),
                torch.tensor(positions, device=self._decoder.device),
                attention,
                timer,
                on_inputs=self._capture_rows((), active, step),
            )
            choices = self._choose(hidden_BE, active, step, timer)
            for row, choice in zip(active, choices, strict=True):
                token_ids[row.sequence_id].append(choice[0])
                self._carried[row.sequence_id] = choice
            active = [row for row, (_, stop) in zip(active, choices, strict=True) if not stop]
        return tuple(
            SequenceResult(
                token_ids=tuple(token_ids[row.sequence_id]),
                logprobs=self._sampler.take_logprobs(row.sequence_id),
            )
            for row in rows
        )

    def _go_on(self, rows: Sequence[DecodeRow]) -> list[DecodeRow]:
        """Return rows with their last tokens, without those that the last burst has stopped."""
        going_on = []
        for row in rows:
            if row.token_id is None:
                token_id, stop = self._carried[row.sequence_id]
                if stop:
                    continue
                row = replace(row, token_id=token_id)
            going_on.append(row)
        return going_on

    def _decode_inputs(
        self,
        rows: Sequence[DecodeRow],
        step: int,
        token_ids: Mapping[int, Sequence[int]],
        timer: PartTimer,
    ) -> tuple[list[int], list[int], DecodeAttention]:
        """Return ids, positions and attention of one new token of each row."""
        rank = self.ring.rank
        new_rows = []
        for row in rows:
            before = self._pool.table.run(row.sequence_id).rows_below(row.position)
            new_rows.append(
                NewRows(
                    sequence_id=row.sequence_id,
                    first_row=before + row.owners[:step].count(rank),
                    count=int(row.owners[step] == rank),
                )
            )
        num_sharded = sum(row.home is None for row in rows)
        attention = DecodeAttention(
            new_rows[:num_sharded], new_rows[num_sharded:], self._pool, self.ring, timer
        )
        ids = []
        for row in rows:
            assert row.token_id is not None
            ids.append((row.token_id, *token_ids.get(row.sequence_id, ()))[-1])
        return ids, [row.position + step for row in rows], attention

    def _choose(
        self, hidden_BE: Tensor, rows: Sequence[DecodeRow], step: int, timer: PartTimer
    ) -> list[Choice]:
        """Sample where this rank is the one to; all ranks get to know those of sharded rows."""
        rank = self.ring.rank
        own = [index for index, row in enumerate(rows) if row.sampling_rank == rank]
        choices: list[Choice] = [(0, False)] * len(rows)
        if own:
            with timer("sample"):
                own_BE = hidden_BE if len(own) == len(rows) else hidden_BE[own]
                asked = [
                    (row.sequence_id, row.draw, row.index + step)
                    for row in (rows[index] for index in own)
                ]
                found = self._sampler.choose_each(self._decoder.logits(own_BE), asked)
                for index, choice in zip(own, found, strict=True):
                    choices[index] = choice
        num_sharded = sum(row.home is None for row in rows)
        if num_sharded and self.ring.size > 1:
            with timer("wait"):
                sent = torch.tensor(choices[:num_sharded], dtype=torch.int64)
                gathered = self.ring.all_gather(sent.to(self._decoder.device)).tolist()
                for index, row in enumerate(rows[:num_sharded]):
                    token_id, stop = gathered[row.sampling_rank][index]
                    choices[index] = token_id, bool(stop)
        return choices

    def _count_round(self) -> None:
        self._rounds_done += 1


def _last_rows(indices: Sequence[Tensor], samples: Sequence[bool]) -> list[int]:
    """Return the last row of each chunk of which this rank samples."""
    rows, end = [], 0
    for own, is_sampled in zip(indices, samples, strict=True):
        end += len(own)
        if is_sampled:
            rows.append(end - 1)
    return rows
