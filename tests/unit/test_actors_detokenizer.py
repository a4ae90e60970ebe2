"""Text comes token by token as if it were decoded at once, and ends at the stop text."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.detokenizer import AnswerText, Decode, Detokenizer, find_stop
from models.needle_checkpoint import write_needle_checkpoint
from models.tokenizer import Tokenizer

BYTES = list(range(256))
SPECIAL = 999
# Texts in which characters of 1 to 4 bytes, spaces and real replacement characters meet.
TEXTS = st.text(alphabet="ab  \n,é北京🙂\N{REPLACEMENT CHARACTER}", max_size=40)


class Pieces:
    """A tokenizer whose tokens are any pieces of bytes, as byte-level BPE may have learnt them."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = [b""]  # token 0 is special

    def tokens(self, text: str, cuts: Sequence[int]) -> list[int]:
        data = text.encode()
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        first = len(self.pieces)
        self.pieces += [data[begin:end] for begin, end in itertools.pairwise(edges)]
        return list(range(first, len(self.pieces)))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[token_id] for token_id in ids).decode(errors="replace")


def sentencepiece_decoder() -> Decode:
    """The decoder of Llama 2: ▁ is a space, bytes are tokens, and the first space is taken out."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = ["<unk>", "<s>", "▁", "▁a", "a", "b", "▁北", "京", "▁ab", ","]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in BYTES}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return lambda ids: backend.decode(list(ids))


WORD, BYTE_0 = {"▁": 2, "▁a": 3, "a": 4, "b": 5, "▁北": 6, "京": 7, "▁ab": 8, ",": 9}, 10
DECODE = sentencepiece_decoder()


def told(detokenizer: Detokenizer, ids: Sequence[int]) -> str:
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS, st.lists(st.integers(0, 200)), st.lists(st.integers(0, 200)))
def test_any_split_into_tokens_gives_the_same_text(
    prompt: str, answer: str, prompt_cuts: list[int], cuts: list[int]
) -> None:
    """Characters lie across tokens, of the prompt too, and tokens hold parts of several."""
    pieces = Pieces()
    prompt_ids = pieces.tokens(prompt, prompt_cuts)

    assert told(Detokenizer(pieces.decode, prompt_ids), pieces.tokens(answer, cuts)) == answer


@settings(deadline=None, max_examples=200)
@given(
    TEXTS,
    st.lists(st.integers(0, 200)),
    st.lists(st.text(alphabet="ab ,é北", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_split_into_tokens_gives_the_same_truncation(
    answer: str, cuts: list[int], stop: list[str], included: bool
) -> None:
    """The stop text that is complete first, however it is spread over tokens."""
    pieces = Pieces()
    text = AnswerText(Detokenizer(pieces.decode), stop=stop, include_stop=included)

    found = None
    for token_id in pieces.tokens(answer, cuts):
        found = text.push(token_id)
        if found is not None:
            break
    else:
        text.finish()

    ends = [
        (end, order)
        for end in range(len(answer) + 1)
        for order, string in enumerate(stop)
        if answer[:end].endswith(string)
    ]
    if not ends:
        assert found is None
        assert text.text == answer
        return
    end, order = min(ends)
    assert found == stop[order]
    assert text.text == answer[: end if included else end - len(stop[order])]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([*WORD, "é", "🙂", "<s>"]), max_size=12),
    st.lists(st.sampled_from([*WORD, "é", "🙂", "<s>"]), max_size=25),
)
def test_sentencepiece_text_goes_on_from_the_prompt(prompt: list[str], answer: list[str]) -> None:
    """A first word keeps its space; characters spelled by bytes come whole; <s> is no text."""

    def ids(words: list[str]) -> list[int]:
        return [
            token_id
            for word in words
            for token_id in (
                [WORD[word]]
                if word in WORD
                else [1]
                if word == "<s>"
                else [BYTE_0 + byte for byte in word.encode()]
            )
        ]

    prompt_ids, answer_ids = ids(prompt), ids(answer)

    text = told(Detokenizer(DECODE, prompt_ids), answer_ids)

    # The context may be so short that only spaces or special tokens are in it.
    whole, before = DECODE([*prompt_ids, *answer_ids]), DECODE(prompt_ids)
    if before.strip():
        assert text == whole[len(before) :]
    else:
        assert text.lstrip() == whole[len(before) :].lstrip()


def test_needle_tokenizer_holds_back_parts_of_characters(tmp_path: Path) -> None:
    """Each token is a byte; nothing is told that would have to be taken back."""
    write_needle_checkpoint(tmp_path / "needle")
    tokenizer = Tokenizer.load(tmp_path / "needle")
    assert tokenizer is not None
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.encode("so"))

    ids = tokenizer.encode(" größe 北🙂", add_special_tokens=False)

    told_by = [detokenizer.push(token_id) for token_id in ids]
    assert told_by[:7] == [" ", "g", "r", "", "ö", "", "ß"]
    assert told_by[-7:] == ["", "", "北", "", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_tokens_without_text_end_no_patience() -> None:
    """However many come before a character, its parts are held back."""
    pieces = Pieces()
    ids = pieces.tokens("北", [1, 2])

    assert told(Detokenizer(pieces.decode), [0] * 30 + ids) == "北"


def test_answer_that_ends_within_a_character_says_so() -> None:
    """As decoding all of it at once does."""
    pieces = Pieces()
    ids = pieces.tokens("a北", [1, 2, 3])

    assert told(Detokenizer(pieces.decode), ids[:-1]) == "a\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    """A model may write any bytes; a stop text behind them must still be found."""
    pieces = Pieces()
    pieces.pieces += [b"\xff", b"x"]
    detokenizer = Detokenizer(pieces.decode)

    text = "".join(detokenizer.push(1) for _ in range(100))

    assert len(text) > 90
    assert told(detokenizer, [2]).endswith("x")


@pytest.mark.parametrize("token_id", [0, 1, 2])
def test_work_a_token_does_not_grow(token_id: int) -> None:
    """Of a long answer only the last tokens are decoded again; so where they are no text."""
    pieces = Pieces()
    pieces.pieces += [b"x", b"\xff"]
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return pieces.decode(ids)

    told(Detokenizer(decode, [1] * 1000), [token_id] * 1000)

    assert longest <= 30


def test_stop_text_within_the_first_tokens_does_not_count() -> None:
    """min_tokens: the text goes on, and a stop text that is complete later still ends it."""
    pieces = Pieces()
    ids = pieces.tokens("a.b.c.", range(7))
    text = AnswerText(Detokenizer(pieces.decode), stop=["."], min_tokens=3)

    assert [text.push(token_id) for token_id in ids[:4]] == [None, None, None, "."]
    assert text.text == "a.b"


@pytest.mark.parametrize(
    ("text", "searched", "stop", "found"),
    [
        ("abcd", 0, ["cd", "bc"], (1, "bc")),  # complete first
        ("abcd", 0, ["bcd", "cd"], (1, "bcd")),  # complete at once: given first
        ("abcd", 0, ["cd", "bcd"], (2, "cd")),
        ("abcd", 2, ["ab"], None),  # was there before
        ("abcd", 2, ["abc"], (0, "abc")),  # only now complete
        ("abab", 2, ["ab"], (2, "ab")),
        ("", 0, ["a"], None),
        ("abc", 0, [], None),
    ],
)
def test_stop_text_that_is_complete_first(
    text: str, searched: int, stop: list[str], found: tuple[int, str] | None
) -> None:
    assert find_stop(text, searched, stop) == found
