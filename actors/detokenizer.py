"""The text of an answer as its tokens come, and the stop text that ends it.

Tokens are pieces of bytes, and what a token spells may depend on the one before
it (a leading space). So the text of a new token is what decoding a few earlier
tokens with it adds to decoding them without it.
"""

from collections.abc import Callable, Sequence

from actors.messages import TokenIds

Decode = Callable[[Sequence[int]], str]

CONTEXT_TOKENS = 5  # of the prompt: what a first token spells depends on them
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character (yet)
# A character has at most four bytes: what so many tokens do not complete will never be one.
HELD_TOKENS = 8
WINDOW_TOKENS = 20  # of bytes that are no text; of text the window is a word or two


class Detokenizer:
    """Text from tokens, one by one; a character whose bytes are not all there is held back."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] | TokenIds = ()) -> None:
        """Take a tokenizer's decoder and the prompt, which the text goes on from."""
        self._decode = decode
        self._window = _context(decode, prompt_ids)  # tokens that are decoded together
        self._text = decode(self._window)  # their text
        self._told = len(self._text)  # how much of it is the prompt's, or was given out
        self._held = 0  # tokens since something was given out

    def push(self, token_id: int) -> str:
        """Return the text that this token adds, or completes."""
        self._window.append(token_id)
        before, self._text = self._text, self._decode(self._window)
        # A character that began in the prompt is the prompt's, also where it gets shorter now.
        self._told = min(self._told, len(self._text))
        self._held += 1
        stable = self._text if self._held > HELD_TOKENS else self._text.rstrip(REPLACEMENT)
        new = stable[self._told :]
        if new:
            self._told = len(stable)
            if stable == self._text:
                self._begin_window()
        elif self._text == before and len(self._window) > CONTEXT_TOKENS and stable == before:
            self._window.pop()  # a token without text: nothing depends on it
        if new or self._told == len(self._text):
            self._held = 0
        return new

    def flush(self) -> str:
        """Return what is held back: the answer ends within a character."""
        held = self._text[self._told :]
        self._told = len(self._text)
        return held

    def _begin_window(self) -> None:
        """Keep the last token as the context of the next: all its text is told."""
        for size in range(1, len(self._window)):
            text = self._decode(self._window[-size:])
            # Some tokens spell something only with those before them.
            if (text and REPLACEMENT not in text) or size == WINDOW_TOKENS:
                self._window, self._text, self._told = self._window[-size:], text, len(text)
                return


class AnswerText:
    """The text of one answer, searched for the stop texts while it grows.

    The stop text that is complete first ends the answer, however its characters
    are spread over tokens; of two that are complete at once, the one given first.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """With ``include_stop`` the text ends behind the stop text, else before it.

        A stop text that is complete within ``min_tokens`` tokens does not count.
        """
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0

    def push(self, token_id: int) -> str | None:
        """Add a token; return the stop text that it completes, the text then being cut, or None."""
        self._tokens += 1
        searched = len(self.text)
        self.text += self._detokenizer.push(token_id)
        if self._tokens <= self._min_tokens:
            return None
        found = find_stop(self.text, searched, self._stop)
        if found is None:
            return None
        begin, stop = found
        self.text = self.text[: begin + len(stop) if self._include_stop else begin]
        return stop

    def safe_text(self, has_ended: object) -> str:
        """Return the text that no later token takes back, all of it where the answer has ended.

        Its last characters may be the begin of a stop text.
        """
        longest = max(map(len, self._stop), default=1) - 1
        if has_ended or not longest or self._include_stop:
            return self.text
        return self.text[:-longest]

    def finish(self) -> None:
        """Add what is held back; not after a stop text."""
        self.text += self._detokenizer.flush()


def find_stop(text: str, searched: int, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return ``(begin, stop text)`` of the one that is complete first behind ``searched``."""
    found = []
    for order, string in enumerate(stop):
        begin = text.find(string, max(0, searched - len(string) + 1))
        if begin >= 0:
            found.append((begin + len(string), order, begin))
    if not found:
        return None
    _, order, begin = min(found)
    return begin, stop[order]


def _context(decode: Decode, prompt_ids: Sequence[int] | TokenIds) -> list[int]:
    """Return the prompt's last tokens, from the begin of a character on."""
    ids = [int(token_id) for token_id in prompt_ids[-WINDOW_TOKENS:]]
    for begin in range(len(ids) - CONTEXT_TOKENS, -1, -1):
        if not decode(ids[begin:]).startswith(REPLACEMENT):
            return ids[begin:]
    return ids[-CONTEXT_TOKENS:]
