"""Prices: the seconds that a step would take, from a model's shape and measured rates.

Pure functions of numbers, for whatever must choose before it does: the ring's
algorithm, whole or sharded, later load or recompute and how large a cluster.

A layer on the ring is a sequence of rounds. Round j on rank k ends when its
attention is computed and the next part has arrived from rank k - 1:

    done[k][j] = max(done[k][j-1] + attention, max(done[k][j-1], done[k-1][j-1]) + transfer)

plus the share of the transfer that competes with computation (`Rates.overlap`).
Ranks are not equally fast in every round (`Rates.jitter`): pass-Q waits for the
slowest one at the end of every layer, pass-KV only where the next part is late.
So uneven cached shares cost what they cost: pass-KV carries every share past
every rank, and pass-Q waits N times for the fullest one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from models.rates import ModelShape, Rates
from models.ring_rules import Algorithm

Parts = dict[str, float]
_TOKEN_BYTES = 16  # a sampled token and its stop mark, which go to all ranks


@dataclass(frozen=True, kw_only=True)
class SequenceShape:
    """One sequence of a prefill step."""

    new_tokens: int
    cached_rows: tuple[int, ...]  # on each rank
    whole_rank: int | None = None  # that computes it alone; None: all ranks, over the ring

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or min(self.cached_rows, default=-1) < 0:
            raise ValueError(f"a prefill needs new tokens and a share for each rank, got {self}")


@dataclass(frozen=True, kw_only=True)
class Price:
    """Predicted seconds, in all and by the parts under which a step measures them.

    gemm, attention, merge, store; exchange: what of transfers is not hidden, as
    measured in ``exchange`` and ``wait`` together; fixed: the rest of a step.
    """

    parts_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """The sum of all parts."""
        return sum(self.parts_s.values())


def attention_flops(model: ModelShape, new_tokens: float, cached_tokens: float) -> float:
    """Return one layer's ``4 D H (T P + T^2 / 2)``: causal, unlike Table 3's 4 T D (T + P)."""
    pairs = new_tokens * cached_tokens + new_tokens**2 / 2
    return model.attention_flops_per_pair * pairs


def price_prefill(
    algorithm: Algorithm,
    sequences: Sequence[SequenceShape],
    model: ModelShape,
    rates: Rates,
    num_ranks: int,
    *,
    streamed_returns: bool = True,
    all_rows: bool = False,
) -> Price:
    """Return the price of one prefill step over a batch of sequences.

    Args:
        algorithm: Of the sequences that go around the ring.
        sequences: Each with a cached share for each rank, or whole on one rank.
        model: Its shape.
        rates: Measured on ``num_ranks`` ranks.
        num_ranks: N; a ring of one exchanges nothing.
        streamed_returns: pass-Q sends each partial back as soon as it is computed;
            otherwise all of them after the last round (algorithm 3).
        all_rows: Every token's output is wanted. Otherwise the last layer computes
            keys and values, and one query of each sequence.
    """
    step = _Step(algorithm, sequences, model, rates, num_ranks, streamed_returns)
    layers = _times(model.num_layers - (not all_rows), step.full_layer())
    last_layer = {} if all_rows else step.last_layer()
    fixed_s = rates.dispatch_s + rates.step_s
    return Price(parts_s=_sum(layers, last_layer, {"fixed": fixed_s}))


def price_whole(sequence: SequenceShape, model: ModelShape, rates: Rates) -> Price:
    """Return the price of a sequence that one rank computes alone, wherever its rows lie."""
    alone = SequenceShape(
        new_tokens=sequence.new_tokens, cached_rows=(sum(sequence.cached_rows),), whole_rank=0
    )
    return price_prefill("pass_kv", [alone], model, rates, 1)


def price_decode(
    rows_by_rank: Sequence[tuple[int, ...]], model: ModelShape, rates: Rates, *, steps: int = 1
) -> Price:
    """Return the price of a burst of decode steps: for each sequence, the rows on each rank.

    A sequence on one rank, ``(rows,)``, exchanges nothing. Rows that the steps
    themselves add are not counted.
    """
    batch, num_ranks = len(rows_by_rank), max(map(len, rows_by_rank), default=1)
    layer = _sum({"gemm": rates.linear(batch)}, _to_all_rows(rows_by_rank, model, rates))
    rest = {"fixed": rates.step_s}
    if num_ranks > 1:
        rest["exchange"] = rates.collective(_TOKEN_BYTES * batch)
    parts_s = _times(steps, _sum(_times(model.num_layers, layer), rest))
    return Price(parts_s=_sum(parts_s, {"fixed": rates.dispatch_s}))


def _to_all_rows(rows_by_rank: Sequence[tuple[int, ...]], model: ModelShape, rates: Rates) -> Parts:
    """One query of each sequence to its rows on all ranks, and the exchange of partials."""
    num_ranks = max(map(len, rows_by_rank), default=1)
    by_rank = [0.0] * num_ranks
    for rows in rows_by_rank:
        for rank, count in enumerate(rows):
            by_rank[rank] += rates.call_s + rates.paged_key(1) * count
    parts = {"attention": max(by_rank)}
    sharded = sum(len(rows) > 1 for rows in rows_by_rank)
    if sharded:
        parts["exchange"] = rates.collective(sharded * model.partial_bytes_per_token)
        parts["merge"] = rates.merge(sharded * num_ranks)
    return parts


def _times(count: int, parts_s: Parts) -> Parts:
    return {name: seconds * count for name, seconds in parts_s.items()}


def _sum(*all_parts_s: Parts) -> Parts:
    names = dict.fromkeys(name for parts_s in all_parts_s for name in parts_s)
    return {name: sum(parts_s.get(name, 0.0) for parts_s in all_parts_s) for name in names}


class _Step:
    """One prefill step's layers. Ring shares are padded to ceil(T / N) tokens a rank."""

    def __init__(
        self,
        algorithm: Algorithm,
        sequences: Sequence[SequenceShape],
        model: ModelShape,
        rates: Rates,
        num_ranks: int,
        streamed_returns: bool,
    ) -> None:
        self._passes_q = algorithm == "pass_q"
        self._model, self._rates, self._num_ranks = model, rates, num_ranks
        self._streamed = streamed_returns
        whole = [s.whole_rank is not None or num_ranks == 1 for s in sequences]
        self._whole = list(itertools.compress(sequences, whole))
        self._around = [s for s, alone in zip(sequences, whole, strict=True) if not alone]
        self._shares = [math.ceil(s.new_tokens / num_ranks) for s in self._around]
        self._ring_tokens = sum(self._shares)  # on each rank
        tokens = [self._ring_tokens] * num_ranks
        for sequence in self._whole:
            tokens[sequence.whole_rank or 0] += sequence.new_tokens
        self._fullest = max(tokens)

    def full_layer(self) -> Parts:
        """A layer in which every token's query is wanted."""
        parts = {"gemm": self._rates.linear(self._fullest), "store": self._store_s()}
        return parts | self._attention(parts["gemm"])

    def last_layer(self) -> Parts:
        """Keys and values of all tokens; of each sequence one query, which goes to all ranks."""
        rates = self._rates
        one_row_s = rates.linear(len(self._around) + len(self._whole))
        keys_s = rates.linear(self._fullest) * self._model.kv_projection_share
        parts = {"gemm": keys_s + one_row_s, "store": self._store_s()}
        rows: list[tuple[int, ...]]
        rows = [(sum(s.cached_rows) + s.new_tokens,) for s in self._whole]
        for sequence, share in zip(self._around, self._shares, strict=True):
            rows.append(tuple(cached + share for cached in sequence.cached_rows))
        parts = _sum(parts, _to_all_rows(rows, self._model, rates))
        if not self._around:
            return parts
        queries_bytes = len(self._around) * self._model.q_bytes_per_token
        told_s = rates.collective(queries_bytes) + rates.collective(_TOKEN_BYTES)
        return _sum(parts, {"exchange": told_s})

    def _store_s(self) -> float:
        return self._rates.store(self._fullest * self._model.kv_bytes_per_token)

    def _attention(self, gemm_s: float) -> Parts:
        attention, merge = self._rounds()
        end_s, busy_s = self._run_rounds(attention, merge)
        sums = [(sum(a), sum(m)) for a, m in zip(attention, merge, strict=True)]
        slowest = max(range(self._num_ranks), key=lambda rank: sum(sums[rank]))
        parts = {"attention": sums[slowest][0], "merge": sums[slowest][1]}
        exchange_s = busy_s + end_s - sum(sums[slowest])
        return parts | {"exchange": exchange_s + self._late_s(gemm_s, attention)}

    def _late_s(self, gemm_s: float, attention: list[list[float]]) -> float:
        """What a layer waits for ranks that are late by chance.

        Pass-Q ends with partials from all others. In pass-KV a neighbour's part is
        late only if the neighbour is later than the own keys take.
        """
        if not self._around:
            return 0.0
        late_s = self._rates.jitter * (gemm_s + max(map(sum, attention)))
        if self._passes_q:
            return late_s
        return max(0.0, late_s - min(rounds[0] for rounds in attention))

    def _rounds(self) -> tuple[list[list[float]], list[list[float]]]:
        """Return the seconds of attention and of merges, ``[rank][round]``."""
        N = self._num_ranks
        attention, merge = ([[0.0] * N for _ in range(N)] for _ in range(2))
        for sequence in self._whole:
            rank = sequence.whole_rank or 0
            attention_s, merge_s = self._own(sequence.new_tokens, sum(sequence.cached_rows))
            attention[rank][0] += attention_s
            merge[rank][0] += merge_s
        for sequence, share in zip(self._around, self._shares, strict=True):
            own = [self._own(share, cached) for cached in sequence.cached_rows]
            first = [self._remote(share, share / 2, share, c) for c in sequence.cached_rows]
            second = [self._remote(share / 2, share, share, c) for c in sequence.cached_rows]
            for rank in range(N):
                for turn in range(N):
                    other = (rank - turn) % N
                    queries, keys = (other, rank) if self._passes_q else (rank, other)
                    # Zigzag: earlier ranks' first chunk is before all, their second after all.
                    kind = own if turn == 0 else first if keys < queries else second
                    attention[rank][turn] += kind[keys][0]
                    merge[rank][turn] += kind[keys][1]
        return attention, merge

    def _own(self, tokens: float, cached: float) -> tuple[float, float]:
        """A rank's queries to its own keys: ``(attention_s, merge_s)``."""
        rates = self._rates
        attention_s = rates.call_s + rates.causal_key(tokens) * tokens
        if not cached:
            return attention_s, 0.0
        return attention_s + rates.call_s + rates.paged_key(tokens) * cached, rates.merge(tokens)

    def _remote(
        self, queries: float, keys: float, share: float, cached: float
    ) -> tuple[float, float]:
        """Some of one rank's queries to some of another's new keys, and all to its cached rows."""
        rates = self._rates
        attention_s = rates.call_s + rates.dense_key(queries) * keys
        # In pass-Q the whole share comes back and is merged at home.
        merge_s = rates.merge(share if self._passes_q else queries)
        if cached:
            key = rates.paged_key if self._passes_q else rates.dense_key
            attention_s += rates.call_s + key(share) * cached
            merge_s += rates.merge(queries if self._passes_q else share)
        return attention_s, merge_s

    def _run_rounds(
        self, attention: list[list[float]], merge: list[list[float]]
    ) -> tuple[float, float]:
        """Return when the last rank has ended its rounds, and what comes before and after them."""
        rates, N = self._rates, self._num_ranks
        done = [0.0] * N
        if not self._around:
            return max(sum(a) + sum(m) for a, m in zip(attention, merge, strict=True)), 0.0
        part_s = [rates.hop(num_bytes) for num_bytes in self._part_bytes()]
        back_bytes = self._ring_tokens * self._model.partial_bytes_per_token
        back_s = rates.returns(back_bytes)
        for turn in range(N):
            before = done
            done = []
            for rank in range(N):
                compute_s = attention[rank][turn] + merge[rank][turn]
                transfer_s = part_s[(rank - turn - 1) % N] if turn < N - 1 else 0.0
                # The partial of the round before is on its way home.
                streams = self._passes_q and self._streamed and turn > 1
                returning_s = back_s if streams else 0.0
                end_s = max(
                    before[rank] + max(compute_s, returning_s),
                    max(before[rank], before[rank - 1]) + transfer_s,
                )
                hidden_s = min(transfer_s, compute_s) + min(returning_s, compute_s)
                done.append(end_s + rates.overlap * hidden_s + (turn > 0) * rates.round_s)
        if not self._passes_q:
            gather_bytes = max(self._cached()) * self._model.kv_bytes_per_token
            return max(done), rates.gather(gather_bytes) if gather_bytes else 0.0
        if self._streamed:
            return max(done), back_s
        return max(done), rates.returns((N - 1) * back_bytes)

    def _part_bytes(self) -> list[float]:
        """Bytes of each rank's part that goes around: its queries, or its keys and values."""
        if self._passes_q:
            return [self._ring_tokens * self._model.q_bytes_per_token] * self._num_ranks
        rows = [self._ring_tokens + cached for cached in self._cached()]
        return [count * self._model.kv_bytes_per_token for count in rows]

    def _cached(self) -> list[int]:
        """Each rank's cached rows of what goes around the ring."""
        ranks = range(self._num_ranks)
        return [sum(s.cached_rows[rank] for s in self._around) for rank in ranks]
