"""What a check finds."""

from dataclasses import dataclass
from typing import Literal

MiB = 2**20
GiB = 2**30

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    sentence: str  # what is so
    advice: str = ""  # what to do about it

    def text(self) -> str:
        """Return it for people: a line, and the advice beneath."""
        line = f"{self.state:<8} {self.name}: {self.sentence}"
        return f"{line}\n{'':9}-> {self.advice}" if self.advice else line


def ok(name: str, sentence: str) -> Finding:
    """Nothing is wrong."""
    return Finding(name=name, state="ok", sentence=sentence)


def warning(name: str, sentence: str, advice: str) -> Finding:
    """It works, but less well than it could, or not for everything."""
    return Finding(name=name, state="warning", sentence=sentence, advice=advice)


def problem(name: str, sentence: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name=name, state="problem", sentence=sentence, advice=advice)


def gib(size_bytes: float) -> str:
    """Return a size for people."""
    return (
        f"{size_bytes / GiB:.3g} GiB" if size_bytes >= GiB / 10 else f"{size_bytes / MiB:.3g} MiB"
    )
