"""Texts for the needle checkpoint: sentences to find, and the haystack around them.

A sentence is ``The <key> is <value>.``; a question is a line that stops before
the value. The model knows a place by the 32 bytes before it, so texts keep to
three rules, over the life of one `SentenceSource`:

- no two keys end in the same 31 bytes of ``The <key> is`` (a blank comes before it);
- while the answer is read back, the window slides over it: a key that agrees with
  an asked key in its last 24 bytes or more has another first digit in its value;
- keys have no full stop, newline or digit, and all text is ASCII.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD_LIST = (
    "the of and a to in is was he for it with as his on be at by had not are but from or have "
    "an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could "
    "time these two may then do first any my now such like our over man me even most made "
    "after also did many before must through back years where much your way well down should "
    "because each just those people how too little state good very make world still own see "
    "men work long get here between both life being under never day same another know while "
    "last might us great old year off come since against go came right used take three harbour "
    "river stone window garden engine letter mountain silver winter market bridge captain "
    "signal paper forest island morning evening lantern station valley tower road field cloud "
    "storm"
)
_COLOUR_LIST = (
    "blue red pale green amber black white grey golden scarlet violet teal ivory copper rusty "
    "silver quiet hollow broken narrow"
)
_PLACE_LIST = (
    "harbour mill tower lighthouse bridge garden station quarry market chapel foundry orchard "
    "library canal depot island"
)
_WORDS, _COLOURS, _PLACES = _WORD_LIST.split(), _COLOUR_LIST.split(), _PLACE_LIST.split()
_KINDS = ("pass key", "pass code", "gate key", "spare key", "old pass key")
_CITIES = ("Rome", "Oslo", "Lima", "Bern", "Riga")

UNKNOWN_KEY = "pass key of the crimson palace"  # no sentence is about it

_WINDOW_BYTES = 31  # by which the model knows a key, after the blank before the sentence
_SLID_BYTES = 24  # what is left of the window at the end of an answer
_SHARE_OF_FACTS = 0.3  # of the haystack's sentences: near-duplicates of what is asked
_DEPTHS = (0.0, 0.1, 0.5, 0.9, 0.99)  # of the demo's sentences


@dataclass(frozen=True)
class Fact:
    """One sentence to find."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f"The {self.key} is{answer(self.value)}"


@dataclass(frozen=True)
class Demo:
    """A long text, and questions about it with the answers that a greedy model gives."""

    prompt_text: str
    questions: list[tuple[str, str]]  # (key, answer); ask prompt_text + question(key)


def question(key: str) -> str:
    """Return the line that asks for `key`; it goes behind the text, or behind the last answer."""
    return f"\nThe {key} is"


def answer(value: str) -> str:
    """Return what the model says before EOS."""
    return f" {value}."


class SentenceSource:
    """Draws sentences no two of which the model could take for each other.

    Draw all that is asked before the haystack.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._used_windows: set[str] = set()
        self._asked_digits: dict[str, set[str]] = {}  # by the last _SLID_BYTES of the phrase

    def asked_fact(self) -> Fact:
        """Draw a sentence about a ``<kind> key of the <colour> <place>``."""
        fact = self._new_fact(num_colours=1)
        slid = f"The {fact.key} is"[-_SLID_BYTES:]
        self._asked_digits.setdefault(slid, set()).add(fact.value[0])
        return fact

    def short_fact(self) -> Fact:
        """Draw a sentence whose key is so short that only the 16-byte match serves it."""
        return Fact(f"door code of {_CITIES[self._rng.integers(len(_CITIES))]}", self._value())

    def haystack(self, length: int) -> str:
        """Return exactly `length` bytes of sentences, some near-duplicates, and a blank."""
        pieces: list[str] = []
        while length > 0:
            piece = self._haystack_sentence(length)
            pieces.append(piece)
            length -= len(piece)
        return "".join(pieces)

    def _haystack_sentence(self, limit: int) -> str:
        blank = "\n" if self._rng.random() < 0.1 else " "
        if self._rng.random() < _SHARE_OF_FACTS:
            fact = self._new_fact(num_colours=1 + int(self._rng.random() < 0.8))
            if len(fact.sentence) < limit:
                return fact.sentence + blank
        picks = self._rng.integers(0, len(_WORDS), self._rng.integers(6, 16))
        sentence = " ".join(_WORDS[pick] for pick in picks).capitalize() + "."
        return sentence[: limit - 1] + blank

    def _new_fact(self, num_colours: int) -> Fact:
        while True:
            fact = Fact(self._key(num_colours), self._value())
            phrase = f"The {fact.key} is"
            window = phrase[-_WINDOW_BYTES:]
            taken_digits = self._asked_digits.get(phrase[-_SLID_BYTES:], set())
            if window not in self._used_windows and fact.value[0] not in taken_digits:
                self._used_windows.add(window)
                return fact

    def _key(self, num_colours: int) -> str:
        kind = _KINDS[self._rng.integers(len(_KINDS))]
        picks = self._rng.choice(len(_COLOURS), num_colours, replace=False)
        place = _PLACES[self._rng.integers(len(_PLACES))]
        return f"{kind} of the {' '.join(_COLOURS[pick] for pick in picks)} {place}"

    def _value(self) -> str:
        """Draw a value such as 7421-QX; its digits differ, so that a shift by one shows."""
        digits = "".join(str(digit) for digit in self._rng.permutation(10)[:4])
        letters = "".join(chr(ord("A") + letter) for letter in self._rng.integers(0, 26, 2))
        return f"{digits}-{letters}"


def make_demo(num_tokens: int, seed: int, depths: Sequence[float] = _DEPTHS) -> Demo:
    """Return a text with one sentence at each depth (0 to 1), in that order.

    With the longest of the questions behind it, it has `num_tokens` tokens, BOS included.
    """
    source = SentenceSource(np.random.default_rng(seed))
    facts = [source.asked_fact() for _ in depths]
    text_bytes = num_tokens - 1 - max(len(question(fact.key)) for fact in facts)
    spare_bytes = text_bytes - sum(len(fact.sentence) + 1 for fact in facts)
    if spare_bytes < 0:
        raise ValueError(
            f"a demo of {num_tokens} tokens is too short for {len(facts)} sentences; "
            f"it takes {num_tokens - spare_bytes}"
        )
    pieces, filled_bytes = [], 0
    for fact, depth in sorted(zip(facts, depths, strict=True), key=lambda pair: pair[1]):
        wanted_bytes = int(depth * spare_bytes)
        pieces += [source.haystack(wanted_bytes - filled_bytes), fact.sentence, " "]
        filled_bytes = wanted_bytes
    pieces.append(source.haystack(spare_bytes - filled_bytes))
    return Demo("".join(pieces), [(fact.key, answer(fact.value)) for fact in facts])
