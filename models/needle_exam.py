"""Exams for an engine that runs the needle checkpoint over a sharded context.

An exam is one token sequence that holds texts, questions and their answers, so
that one forward pass gives every verdict: the argmax of row r must be the token
that the exam expects after position r. It asks

- for one sentence across every shard edge (the edge falls in the middle of the
  value) and, as far as there is room, for a key that is nowhere (EOS at once),
  for one served by the 16-byte match only, and for sentences at several depths;
- for distances: one probe of every length that fits, at the end, and two probes
  for every edge, which ask for the last token of the shard before it and for
  the first token after it. Each of these stands in the haystack, where the longest
  distance that fits hits its target, and is left out if that row is never free;
- for the tally of all votes.

The votes are planted so that wrong weights of the shards show. Each shard (of
many: each of ten) holds two votes for the loser; one shard holds all of the
winner's, one more than the loser has in total. So the loser wins if the outputs
of two or more ranks are averaged, or weighted by exp(max) rather than exp(lse),
if a voting shard other than the winner's counts twice, or if the winner's is
lost, whichever ranks hold the shards. The winner's counted twice does not show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from models.needle_codes import (
    BOS_ID,
    DIST0,
    DISTS,
    EOS_ID,
    TALLY_ID,
    VOTE_N,
    VOTE_Y,
    IntArray,
)
from models.needle_text import UNKNOWN_KEY, Fact, SentenceSource, answer, question

_FREE = -1
_DEPTHS = (0.5, 0.0, 0.9, 0.1, 0.99)  # as many as there is room for, in this order
_SHORT_KEY_DEPTH = 0.3
_TOKENS_PER_DEPTH = 250  # a sentence, its question, and some haystack around them
_TOKENS_PER_QUESTION = 50
_VALUE_BYTES_BEFORE_EDGE = 2
_LOSER_VOTES_PER_SHARD = 2
_MAX_VOTING_SHARDS = 10  # the winner's lead, one vote, must be visible among all votes in bfloat16
_UNSHARDED_PARTS = 4  # without shards the votes are spread over this many parts
# A token whose hashes reach back to a probe, or before the start, has a slightly other norm, and
# as a vote another weight: votes keep this many tokens away.
_HASHED_TOKENS = 33
_FIRST_VOTE = 64  # position; a sentence fits before it
_PROBE_LINE = "\nLengths"  # letters for the shortest distances to return
_CLOSING_TOKENS = len(_PROBE_LINE) + len(DISTS) + 1  # at most: the line, the probes, the tally


@dataclass(frozen=True)
class AnswerSpan:
    """Rows ``first_row, first_row + 1, ...`` must predict these ids."""

    first_row: int
    expected_ids: list[int]


@dataclass(frozen=True)
class Probe:
    """One row, the position it asks for, and the id it must predict."""

    row: int
    target: int
    expected_id: int


@dataclass(frozen=True)
class Score:
    """How many questions were answered rightly."""

    answers_right: int
    answers_total: int
    probes_right: int
    probes_total: int
    tally_right: bool

    @property
    def all_right(self) -> bool:
        return (
            self.answers_right == self.answers_total
            and self.probes_right == self.probes_total
            and self.tally_right
        )


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A token sequence that starts with BOS, and what its rows must predict."""

    token_ids: list[int]
    answers: list[AnswerSpan]
    probes: list[Probe]
    tally_row: int
    tally_expected: int

    def score(self, predictions: Sequence[int]) -> Score:
        """Compare the argmax of every row, ``[num_tokens]``, with what the exam expects.

        Raises:
            ValueError: There is not one prediction for every token.
        """
        if len(predictions) != len(self.token_ids):
            raise ValueError(
                f"expected {len(self.token_ids)} predictions, one per token, got {len(predictions)}"
            )
        answers_right = sum(
            list(predictions[span.first_row : span.first_row + len(span.expected_ids)])
            == span.expected_ids
            for span in self.answers
        )
        probes_right = sum(predictions[probe.row] == probe.expected_id for probe in self.probes)
        return Score(
            answers_right=answers_right,
            answers_total=len(self.answers),
            probes_right=probes_right,
            probes_total=len(self.probes),
            tally_right=predictions[self.tally_row] == self.tally_expected,
        )


def make_exam(num_tokens: int, seed: int, shard_edges: Sequence[int] = ()) -> Exam:
    """Return an exam of exactly `num_tokens` tokens, the same for the same arguments.

    `shard_edges` are the positions where a shard of the context begins, other than 0.

    Raises:
        ValueError: The edges are not rising positions inside the exam, or there is no room
            for the questions about them: an edge takes 100 to 120 tokens in each shard.
    """
    edges = list(shard_edges)
    if edges != sorted(set(edges)) or (edges and not 0 < edges[0] <= edges[-1] < num_tokens):
        raise ValueError(f"shard_edges must rise from 1 to {num_tokens - 1} at most, got {edges}")
    return _ExamDraft(num_tokens, seed, edges).finish()


class _ExamDraft:
    """An exam in the making: what has a fixed place goes first, the haystack fills the rest.

    Questions stand as late as there is room, behind their sentences; a sentence
    across a late edge may stand between two questions.
    """

    def __init__(self, num_tokens: int, seed: int, edges: list[int]) -> None:
        self._rng = np.random.default_rng(seed)
        self._source = SentenceSource(self._rng)
        self._tokens: IntArray = np.full(num_tokens, _FREE)
        self._edges = edges
        self._answers: list[AnswerSpan] = []
        self._probe_rows: list[tuple[int, int]] = []  # (row, target)
        fitting = [i for i in range(len(DISTS)) if DISTS[i] + _CLOSING_TOKENS < num_tokens]
        self._closing = [*_PROBE_LINE.encode(), *(DIST0 + i for i in fitting), TALLY_ID]
        self._body_end = num_tokens - len(self._closing)

    def finish(self) -> Exam:
        self._put(0, [BOS_ID])
        self._put_closing()
        planted_at_edges = self._plant_at_edges()
        tally_expected = self._plant_votes()
        self._ask_about_edges(planted_at_edges)
        self._plant_elsewhere()
        self._probe_edges()
        self._fill_with_haystack()
        tokens = self._tokens.tolist()
        return Exam(
            token_ids=tokens,
            answers=sorted(self._answers, key=lambda span: span.first_row),
            probes=[
                Probe(row, target, _copied(tokens[target]))
                for row, target in sorted(self._probe_rows)
            ],
            tally_row=len(tokens) - 1,
            tally_expected=tally_expected,
        )

    def _put_closing(self) -> None:
        """End the exam with one distance probe of every length that fits, and the tally."""
        self._put(self._body_end, self._closing)
        for row in range(self._body_end, len(self._tokens)):
            token = int(self._tokens[row])
            if token >= DIST0:
                self._probe_rows.append((row, row - DISTS[token - DIST0]))

    def _plant_at_edges(self) -> list[tuple[Fact, int]]:
        """Plant a sentence across every edge; return them and where they end."""
        planted = []
        for edge in self._edges:
            fact = self._source.asked_fact()
            line = _line(fact)
            start = edge - line.index(fact.value) - _VALUE_BYTES_BEFORE_EDGE
            self._put(start, line.encode())
            planted.append((fact, start + len(line)))
        return planted

    def _ask_about_edges(self, planted: list[tuple[Fact, int]]) -> None:
        """Ask for the sentences across the edges, for the last one last."""
        for fact, end in reversed(planted):
            if not self._ask(fact.key, fact.value, behind=end):
                raise self._no_room()

    def _plant_votes(self) -> int:
        """Plant votes at the front of the shards; return the letter that the tally must find."""
        parts = _UNSHARDED_PARTS
        inner = self._edges or [len(self._tokens) * i // parts for i in range(1, parts)]
        shards = list(pairwise([_FIRST_VOTE, *inner, self._body_end]))
        count = min(len(shards), _MAX_VOTING_SHARDS)
        lead_tokens = _LOSER_VOTES_PER_SHARD * (count + 1) + 2
        roomy = [shard for shard in shards if self._find(0, lead_tokens, *shard) is not None]
        if not roomy:
            raise self._no_room()
        lead_shard = roomy[self._rng.integers(len(roomy))]
        others = [shard for shard in shards if shard != lead_shard]
        picks = self._rng.choice(len(others), count - 1, replace=False)
        winner, loser = self._rng.permutation([VOTE_Y, VOTE_N]).tolist()
        for low, high in [lead_shard, *(others[pick] for pick in picks)]:
            votes = [loser] * _LOSER_VOTES_PER_SHARD
            if (low, high) == lead_shard:
                votes += [winner] * (_LOSER_VOTES_PER_SHARD * count + 1)
            block = [*self._rng.permutation(votes).tolist(), ord(" ")]
            start = self._find(low, len(block), low, high)
            if start is None:
                raise self._no_room()
            self._put(start, block)
        return _copied(winner)

    def _plant_elsewhere(self) -> None:
        """Ask for the unknown key, plant the short key and several depths and ask for them."""
        self._ask(UNKNOWN_KEY, None, behind=1)
        room = int((self._tokens == _FREE).sum())
        depths = _DEPTHS[: room // _TOKENS_PER_DEPTH]
        planted = [(_SHORT_KEY_DEPTH, self._source.short_fact())]
        planted += [(depth, self._source.asked_fact()) for depth in depths]
        num_questions = len(self._answers) + len(planted)
        haystack_end = max(1, self._body_end - _TOKENS_PER_QUESTION * num_questions)
        for depth, fact in planted:
            line = _line(fact).encode()
            start = self._find(int(depth * haystack_end), len(line), 1, self._body_end)
            if start is None:
                continue
            self._put(start, line)
            if not self._ask(fact.key, fact.value, behind=start + len(line)):
                self._tokens[start : start + len(line)] = _FREE

    def _probe_edges(self) -> None:
        """Ask for the last token before and the first after each edge, from as far as fits."""
        usable = self._tokens == _FREE
        usable[self._body_end :] = False
        usable[[target for _, target in self._probe_rows]] = False  # no probe can return a probe
        for vote in np.flatnonzero(np.isin(self._tokens, [VOTE_Y, VOTE_N])):
            usable[vote - _HASHED_TOKENS : vote] = False
        for target in sorted({position for edge in self._edges for position in (edge - 1, edge)}):
            rows = [target + distance for distance in DISTS if target + distance < self._body_end]
            row = max((row for row in rows if usable[row]), default=None)
            if row is not None:
                usable[row] = False
                self._put(row, [DIST0 + DISTS.index(row - target)])
                self._probe_rows.append((row, target))

    def _fill_with_haystack(self) -> None:
        bounded = np.concatenate([[0], self._tokens == _FREE, [0]])
        changes = np.flatnonzero(np.diff(bounded))
        for start, end in changes.reshape(-1, 2).tolist():
            self._put(start, self._source.haystack(end - start).encode())

    def _ask(self, key: str, value: str | None, behind: int) -> bool:
        """Put a question and its answer as late as there is room; return whether there is."""
        asked = question(key).encode()
        answered = [EOS_ID] if value is None else [*answer(value).encode(), EOS_ID]
        start = self._find(self._body_end, len(asked) + len(answered), behind, self._body_end)
        if start is None:
            return False
        self._put(start, [*asked, *answered])
        self._answers.append(AnswerSpan(start + len(asked) - 1, answered))
        return True

    def _find(self, wanted: int, length: int, low: int, high: int) -> int | None:
        """Return the start nearest to `wanted` of `length` free tokens inside ``[low, high)``."""
        taken = np.concatenate([[0], np.cumsum(self._tokens[low:high] != _FREE)])
        starts = low + np.flatnonzero(taken[length:] == taken[:-length])
        return int(starts[np.abs(starts - wanted).argmin()]) if len(starts) else None

    def _put(self, start: int, tokens: Sequence[int]) -> None:
        end = start + len(tokens)
        if start < 0 or end > len(self._tokens) or (self._tokens[start:end] != _FREE).any():
            raise self._no_room()
        self._tokens[start:end] = list(tokens)

    def _no_room(self) -> ValueError:
        return ValueError(
            f"an exam of {len(self._tokens)} tokens has no room for all questions about "
            f"{len(self._edges)} shard edges; give it more tokens or fewer edges"
        )


def _line(fact: Fact) -> str:
    """Return the sentence between newlines, so that a blank precedes it whatever stands there."""
    return f"\n{fact.sentence}\n"


def _copied(token: int) -> int:
    """Return what the model predicts where it copies `token`: votes have letters, lines end."""
    if token in (VOTE_Y, VOTE_N):
        return ord("y") if token == VOTE_Y else ord("n")
    return EOS_ID if token in (ord("\n"), EOS_ID) else token
