"""A checkpoint's chat template, rendered in a process of its own.

A template is a program that came with the checkpoint. It runs in jinja's sandbox, as transformers
sets it up, and there it may still loop for ever or fill memory: so it has a process that can be
ended, with limits on time, memory and text (`models/chat_template_child.py`).
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.errors import PromptError

CHILD = Path(__file__).with_name("chat_template_child.py")
START_S = 60.0  # for the process to import what it needs
RENDER_S = 5.0  # megabytes of messages take a tenth of a second


class ChatTemplate:
    """One template. Calls may come from any thread, and wait for each other."""

    def __init__(
        self, source: str, variables: Mapping[str, Any], *, render_s: float = RENDER_S
    ) -> None:
        """Take the template and the special tokens that it may name; nothing is started yet."""
        self._about = {"template": source, "variables": dict(variables), "render_s": render_s}
        self._render_s = render_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation.

        Raises:
            PromptError: The template does not take these messages, or goes on for too long.
        """
        asked = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            if self._process is None:
                self._process = self._start()
            told = self._ask(self._process, asked, self._render_s)
        if told is None:
            raise PromptError(
                f"The chat template did not end within {self._render_s:g} s and its memory for"
                " these messages: send a completion with a plain prompt"
            )
        if "error" in told:
            raise PromptError(f"The chat template does not take these messages: {told['error']}")
        text: str = told["text"]
        return text

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            # -P: the files beside the program are none of its modules.
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
        self._process = process
        if self._ask(process, self._about, START_S) is None:
            raise PromptError(
                "The chat template cannot be rendered here: its process did not start"
            )
        return process

    def _ask(
        self, process: "subprocess.Popen[str]", question: object, limit_s: float
    ) -> dict[str, Any] | None:
        """Return what the process answers, or None, with it ended, where it does not."""
        assert process.stdin is not None
        assert process.stdout is not None
        # Its end ends the writing and reading below.
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        line = ""
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            timer.cancel()
            if not line.endswith("\n"):
                self._end()
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
