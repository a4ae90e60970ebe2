"""``ringspan chat`` as a command at a terminal."""

import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import time
from typing import IO

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
        self._output = selectors.DefaultSelector()  # `select` refuses high file descriptors
        self._output.register(self._main, selectors.EVENT_READ)

    def type(self, text: bytes) -> None:
        os.write(self._main, text)

    def expect(self, pattern: bytes) -> None:
        """Read until this comes; what follows it is left for the next call."""
        limit_s = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self._told)) is None:
            assert time.monotonic() < limit_s, self._told
            if self._output.select(0.1):
                self._told += os.read(self._main, 4096)
        self._told = self._told[found.end() :]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        self._output.close()
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
            terminal.process.send_signal(signal.SIGINT)
            terminal.expect(b"> ")
            backend.hold_at = None
            terminal.type(b"two\n")
            terminal.expect(ANSWER)
            assert not backend.running
        finally:
            terminal.close()


def piped(target: str, stdout: IO[bytes] | int) -> "subprocess.Popen[bytes]":
    """Start a chat whose messages come by a pipe, and say one."""
    process = subprocess.Popen(
        command(target), stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    return process


def test_ctrl_c_in_a_pipe_ends_the_chat() -> None:
    """Nobody sits there who could go on."""
    backend = FakeBackend()
    backend.hold_at = 2
    with serve(backend) as (target, _, _):
        process = piped(target, subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT_S)
    assert (process.returncode, told) == (130, b"ringspan: stopped by SIGINT\n")


def test_output_that_nobody_takes() -> None:
    """`| head` that has ended is no error, a full disk is one sentence."""
    with serve(FakeBackend()) as (target, _, _):
        read, write = os.pipe()
        os.close(read)
        process = piped(target, write)
        os.close(write)
        assert process.communicate(timeout=WAIT_S)[1] == b""
        assert process.returncode == 128 + signal.SIGPIPE

        with open("/dev/full", "wb") as full:
            process = piped(target, full)
        told = process.communicate(timeout=WAIT_S)[1]
        assert told == b"ringspan: cannot write the output: No space left on device\n"
        assert process.returncode == 1
