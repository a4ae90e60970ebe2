"""How a prefill step is computed: pass-KV or pass-Q, and which sequences stay whole on one rank.

By price where rates are known, by the paper's thresholds, or as the
configuration says. No Ray, no tensors, no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.ratios import Ratios
from models.cost import SequenceShape, price_decode, price_prefill, price_whole
from models.rates import ModelShape, Rates
from models.ring_rules import Algorithm, algorithm_1, algorithm_5, empirical

Rule = Literal["auto", "pass_kv", "pass_q", "algorithm_1", "algorithm_5", "empirical"]
TIE = 0.01  # pass-KV, which needs no return of partials, is taken up to this share dearer
LEAST_TARGET_S = 0.05  # a shorter step would be Ray's call more than work
DISPATCHES = 20  # a step takes as long as so many plans take to be handed out
MIXED = "mixed"  # steps of chunks and decode rows
RATIO_LIMIT = 4.0  # of measured to predicted time: what lies further says nothing of the rates


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one prefill step is to be computed, and what it is expected to take."""

    algorithm: Algorithm  # of the sequences that go around the ring
    whole: bool  # none does: each lies on one rank
    predicted_s: float | None  # None: rates are not known
    prices_s: dict[str, float] = field(default_factory=dict)  # of this step with each algorithm


class Chooser:
    """Chooses by one rule for one model on one ring."""

    def __init__(self, rule: Rule, model: ModelShape, rates: Rates | None, num_ranks: int) -> None:
        """Take the rule of the configuration; without rates nothing is predicted.

        Raises:
            ValueError: The rule needs rates, and there are none.
        """
        if rates is None and rule in ("auto", "algorithm_1", "algorithm_5"):
            raise ValueError(
                f"ring.algorithm = {rule} needs measured rates: profile the ring first"
            )
        self._rule = rule
        self._model = model
        self._rates = rates
        self._num_ranks = num_ranks
        self._ratios = Ratios(RATIO_LIMIT)

    @property
    def dispatch_s(self) -> float:
        """What handing out a plan takes; 0 without rates."""
        return 0.0 if self._rates is None else self._rates.dispatch_s

    def home(
        self, sequence: SequenceShape, *, free_rank: int = 0, answer_tokens: int = 0
    ) -> int | None:
        """Return the rank on which a sequence is cheaper than on the ring, or None.

        Args:
            sequence: With its cached rows on every rank.
            free_rank: Where a sequence without cached rows would live.
            answer_tokens: How many tokens may follow, at most: their decode exchanges
                nothing on one rank, which counts too.
        """
        holders = [rank for rank, rows in enumerate(sequence.cached_rows) if rows]
        if self._rule != "auto" or self._num_ranks == 1 or len(holders) > 1:
            return None
        model, rates, ranks = self._model, self._rates, self._num_ranks
        assert rates is not None
        share = -(-sequence.new_tokens // ranks)
        sharded_rows = tuple(rows + share for rows in sequence.cached_rows)
        rows = sum(sequence.cached_rows) + sequence.new_tokens
        whole_s = (
            price_whole(sequence, model, rates).total_s
            + price_decode([(rows,)], model, rates, steps=answer_tokens).total_s
        )
        ring_s = (
            min(self._prices_s([sequence]).values())
            + price_decode([sharded_rows], model, rates, steps=answer_tokens).total_s
        )
        return (holders or [free_rank])[0] if whole_s < ring_s else None

    def prefill(self, sequences: Sequence[SequenceShape]) -> Choice:
        """Choose for one step; a sequence with a ``whole_rank`` stays there."""
        prices_s = self._prices_s(sequences)
        sharded = [sequence for sequence in sequences if sequence.whole_rank is None]
        algorithm = self._algorithm(sharded, prices_s)
        choice = Choice(algorithm=algorithm, whole=not sharded, predicted_s=None, prices_s=prices_s)
        if self._rates is None:
            return choice
        predicted_s = prices_s[algorithm] * self._ratios.middle(_kind(choice))
        return replace(choice, predicted_s=predicted_s)

    def decode(self, rows_by_rank: Sequence[tuple[int, ...]], steps: int = 1) -> float | None:
        """Return the predicted seconds of a burst; see `models.cost.price_decode`."""
        if self._rates is None:
            return None
        return price_decode(rows_by_rank, self._model, self._rates, steps=steps).total_s

    def riding(self, rows_by_rank: Sequence[tuple[int, ...]]) -> float | None:
        """Return what one decode step of these costs beside a prefill chunk.

        The layers' weights are read for the chunk anyway: what is left is attention
        and the exchange of partials and tokens.
        """
        if self._rates is None:
            return None
        if not rows_by_rank:
            return 0.0
        parts_s = price_decode(rows_by_rank, self._model, self._rates).parts_s
        return sum(s for part, s in parts_s.items() if part not in ("gemm", "fixed"))

    def prefill_work(self, reused: int, done: int) -> float:
        """Return the price of a prompt's tokens from ``reused`` to ``done``, in large chunks.

        It grows faster than their number, for later tokens attend to more; 0 without tokens,
        and their number without rates.
        """
        if done <= reused:
            return 0.0
        if self._rates is None:
            return float(done - reused)
        shares = tuple(reused // self._num_ranks for _ in range(self._num_ranks))
        sequence = SequenceShape(new_tokens=done - reused, cached_rows=shares)
        parts_s = price_prefill(
            "pass_kv", [sequence], self._model, self._rates, self._num_ranks
        ).parts_s
        return parts_s["gemm"] + parts_s["attention"]

    def step_target_s(self) -> float:
        """Return how long a step should take: as long as computing efficiently takes.

        That is the price of the smallest chunk whose tokens cost at most a tenth more
        than in the largest one measured, behind as many cached tokens again.
        What Ray takes to hand it out is a small part of it.
        """
        assert self._rates is not None
        linear, ranks = self._rates.linear, self._num_ranks
        sizes = [2**power for power in range(4, 13)]
        best = min(linear(size) / size for size in sizes)
        size = next(size for size in sizes if linear(size) / size <= 1.1 * best)
        sequence = SequenceShape(new_tokens=size * ranks, cached_rows=(size,) * ranks)
        least_s = max(LEAST_TARGET_S, DISPATCHES * self._rates.dispatch_s)
        return max(least_s, min(self._prices_s([sequence]).values()))

    def observe(self, choice: Choice, measured_s: float) -> None:
        """Learn from a step that was executed as chosen.

        Later predictions of steps of this kind are scaled by the median of the last
        ratios of measured to priced time. Choices are not: a price that is never
        paid is never corrected, and one sided corrections would only swing them.
        """
        self._ratios.keep(_kind(choice), choice.prices_s.get(choice.algorithm), measured_s)

    def mixed(self, choice: Choice | None, riding_s: float) -> float:
        """Return the predicted seconds of chunks with decode rows beside them."""
        return self._mixed_price(choice, riding_s) * self._ratios.middle(MIXED)

    def observe_mixed(self, choice: Choice, riding_s: float, measured_s: float) -> None:
        """Learn from a step of both, as `observe` does from one of chunks."""
        self._ratios.keep(MIXED, self._mixed_price(choice, riding_s), measured_s)

    def _mixed_price(self, choice: Choice | None, riding_s: float) -> float:
        return riding_s + (0.0 if choice is None else choice.prices_s[choice.algorithm])

    def _prices_s(self, sequences: Sequence[SequenceShape]) -> dict[str, float]:
        if self._rates is None:
            return {}
        algorithms: tuple[Algorithm, ...] = ("pass_kv", "pass_q")
        return {
            algorithm: price_prefill(
                algorithm, sequences, self._model, self._rates, self._num_ranks
            ).total_s
            for algorithm in algorithms
        }

    def _algorithm(
        self, sequences: Sequence[SequenceShape], prices_s: dict[str, float]
    ) -> Algorithm:
        """Apply the rule to the sequences that go around the ring."""
        if self._rule == "pass_kv" or self._rule == "pass_q":
            return self._rule
        if self._num_ranks == 1 or not sequences:
            return "pass_kv"
        if self._rule == "auto":
            return "pass_q" if prices_s["pass_q"] < (1 - TIE) * prices_s["pass_kv"] else "pass_kv"
        new_tokens = sum(s.new_tokens for s in sequences)
        cached_tokens = sum(sum(s.cached_rows) for s in sequences)
        if self._rule == "empirical":
            return empirical(new_tokens, cached_tokens)
        assert self._rates is not None
        rule = algorithm_1 if self._rule == "algorithm_1" else algorithm_5
        return rule(
            new_tokens,
            cached_tokens,
            self._model,
            self._num_ranks,
            self._rates.flops_per_s(self._model),
            self._rates.hop.bytes_per_s,
        )


def _kind(choice: Choice) -> str:
    return "whole" if choice.whole else choice.algorithm
