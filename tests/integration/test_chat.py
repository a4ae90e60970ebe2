"""``ringspan chat`` as a command at a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

from tests.rpc_backend import WAIT_S, FakeBackend, serve

ANSWER = rb"(\d+,){5}\r?\n"


def command(target: str) -> list[str]:
    return [sys.executable, "-m", "cluster", "chat", "--target", target, "--max-tokens", "5"]


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, words: list[str]) -> None:
        self._main, other = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        self._told = b""

    def type(self, text: bytes) -> None:
        os.write(self._main, text)

    def expect(self, pattern: bytes) -> None:
        """Read until this comes; what follows it is left for the next call."""
        limit_s = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self._told)) is None:
            assert time.monotonic() < limit_s, self._told
            if select.select([self._main], [], [], 0.1)[0]:
                self._told += os.read(self._main, 4096)
        self._told = self._told[found.end() :]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        os.close(self._main)


def test_a_conversation_at_a_terminal() -> None:
    """Several lines are one message, and the end of the input ends the command."""
    backend = FakeBackend()
    with serve(backend) as (target, _, _):
        terminal = Terminal(command(target))
        try:
            terminal.expect(b"> ")
            terminal.type(b"one\\\nand more\n")
            terminal.expect(ANSWER)
            terminal.type(b"/stats\n")
            terminal.expect(b"5 in the answer")
            terminal.expect(b"> ")
            terminal.type(b"\x04")
            assert terminal.process.wait(WAIT_S) == 0
        finally:
            terminal.close()
    assert backend.asked[0].messages == ({"role": "user", "content": "one\nand more"},)


def test_ctrl_c_cancels_an_answer_and_the_chat_goes_on() -> None:
    """The server frees the request."""
    backend = FakeBackend()
    backend.hold_at = 2
    with serve(backend) as (target, _, _):
        terminal = Terminal(command(target))
        try:
            terminal.expect(b"> ")
            terminal.type(b"one\n")
            terminal.expect(rb"(\d+,){2}")
            terminal.process.send_signal(2)
            terminal.expect(b"> ")
            backend.hold_at = None
            terminal.type(b"two\n")
            terminal.expect(ANSWER)
            assert not backend.running
        finally:
            terminal.close()
