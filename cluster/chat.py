"""``ringspan chat``: a conversation with a running server."""

import argparse
import contextlib
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from actors.messages import Progress, RequestDelta
from cluster.arguments import add_sampling_flags, sampling_params
from cluster.client_flags import add_client_flags, make_client
from cluster.progress import PrefillBar
from models.errors import PromptError, RingspanError, SamplingError
from models.sampling import SamplingParams

TARGET = "127.0.0.1:50051"
POLL_S = 0.2  # how often the progress bar moves
HELP = """\
/reset       forget the conversation
/regenerate  answer the last message anew; /retry is the same
/stats       tokens, reused tokens and times of the last answer
/exit        end; so does Ctrl-D
Ctrl-C ends an answer. A line that ends in a backslash goes on in the next one."""


class Answerer(Protocol):
    """What a conversation asks of `Client`."""

    def stream(
        self, prompt: Mapping[str, Any], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestDelta]:
        """Answer a prompt piece by piece."""
        ...

    def progress(self, request_id: str | None = None) -> list[Progress]:
        """Return how far a prefill has come."""
        ...


class Chat:
    """The messages so far, and what was told of the last answer."""

    def __init__(
        self,
        client: Answerer,
        params: SamplingParams,
        *,
        system: str | None = None,
        document: str | None = None,
        interactive: bool = False,
        show_bar: bool = False,
    ) -> None:
        """Have said nothing; ``document`` stands before the first message.

        Where it is ``interactive``, Ctrl-C ends an answer and not the chat.
        """
        self._client = client
        self._params = params
        self._system = system
        self._document = document
        self.interactive = interactive
        self._show_bar = show_bar
        self.has_answered = False
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.stats = "no answer yet"

    def say(self, text: str) -> None:
        """Answer a message on stdout. Without an answer it is as if it had not been said.

        Raises:
            RingspanError: As `Client.stream`.
        """
        is_first = all(message["role"] == "system" for message in self.messages)
        if self._document is not None and is_first:
            text = f"{self._document}\n\n{text}"
        self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> None:
        """Answer the last message anew; raises as `say`, `PromptError` where there is none."""
        if self.messages[-1:] == [] or self.messages[-1]["role"] != "assistant":
            raise PromptError("there is no answer yet")
        self._answer(self.messages[:-1])

    def _answer(self, messages: list[dict[str, str]]) -> None:
        request_id = f"chat-{secrets.token_hex(8)}"
        pieces: list[str] = []
        deltas: list[RequestDelta] = []
        stream = self._client.stream({"messages": messages, "request_id": request_id}, self._params)
        try:
            with self._bar(request_id):
                deltas += _first(stream)
            pieces += map(_show, deltas)
            for delta in stream:
                deltas.append(delta)
                pieces.append(_show(delta))
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]  # a generator: cancels the request
            if not self.interactive:
                raise
        finally:
            if pieces or self.interactive:
                print(flush=True)
        if deltas:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
            self.has_answered = True
            self.stats = _stats(deltas)

    @contextlib.contextmanager
    def _bar(self, request_id: str) -> Iterator[None]:
        """Show how the prefill goes on meanwhile."""
        if not self._show_bar:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(request_id, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, request_id: str, stop: threading.Event) -> None:
        with PrefillBar() as bar:
            while not stop.wait(POLL_S):
                with contextlib.suppress(RingspanError):  # whoever waits for the answer is told
                    bar.show(self._client.progress(request_id))


def _first(stream: Iterator[RequestDelta]) -> list[RequestDelta]:
    delta = next(stream, None)
    return [] if delta is None else [delta]


def _show(delta: RequestDelta) -> str:
    print(delta.text, end="", flush=True)
    return delta.text


def _stats(deltas: list[RequestDelta]) -> str:
    last = deltas[-1]
    tokens = sum(len(delta.token_ids) for delta in deltas)
    line = (
        f"{last.prompt_tokens} prompt tokens, {last.num_cached_tokens} of them reused,"
        f" {tokens} in the answer"
    )
    if last.metrics is None:  # cancelled by Ctrl-C
        return line
    ttft_s, decode_s = last.metrics.ttft_s, last.metrics.total_s - last.metrics.ttft_s
    rate = f", {(tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 and tokens > 1 else ""
    return f"{line}, first token after {ttft_s:.2f} s{rate}"


def converse(chat: Chat, lines: Iterator[str]) -> None:
    """Answer line by line until they end.

    Raises:
        RingspanError: The first answer failed, or any where nobody sits at the terminal.
    """
    for line in lines:
        try:
            if not _obey(chat, line.strip() if chat.interactive else ""):
                return
            if line.strip() and not (chat.interactive and line.lstrip().startswith("/")):
                chat.say(line)
        except RingspanError as error:
            if not chat.interactive or not (chat.has_answered or line.startswith("/")):
                raise
            print(f"ringspan: {error}", file=sys.stderr)


def _obey(chat: Chat, word: str) -> bool:
    """Do what a command says, if it is one; return whether to go on."""
    if word == "/exit":
        return False
    if word == "/reset":
        chat.reset()
    elif word in ("/regenerate", "/retry"):
        chat.regenerate()
    elif word == "/stats":
        print(chat.stats)
    elif word == "/help":
        print(HELP)
    elif word.startswith("/"):
        print(f"ringspan: there is no {word.split()[0]}; see /help", file=sys.stderr)
    return True


def typed_lines() -> Iterator[str]:
    """Ask for message after message; Ctrl-C drops the one being typed, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` then has editing and a history
    pieces: list[str] = []
    while True:
        try:
            line = input("... " if pieces else "> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
            pieces = []
            continue
        except EOFError:
            print()
            return
        pieces.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(pieces)
            pieces = []


def add_command(commands: Any) -> None:
    """Add ``chat`` to the command line."""
    parser = commands.add_parser("chat", help="talk with a running server")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="a document before the first message"
    )
    add_sampling_flags(parser)
    add_client_flags(parser, target=TARGET, text=f"of the server's gRPC ({TARGET})")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Talk until the input ends; return the exit status."""
    params = sampling_params(options)
    if params.n != 1:
        raise SamplingError("n must be 1: a conversation has one answer a message")
    document = None if options.prompt_file is None else _read(options.prompt_file)
    interactive = sys.stdin.isatty()
    # Ctrl-C ends an answer; SIGTERM ends the command.
    signal.signal(signal.SIGTERM, _end)
    with make_client(options) as client:
        client.status()  # who cannot be reached is told before anything is typed
        chat = Chat(
            client,
            params,
            system=options.system,
            document=document,
            interactive=interactive,
            show_bar=interactive and sys.stderr.isatty(),
        )
        lines = typed_lines() if interactive else (line.rstrip("\n") for line in sys.stdin)
        converse(chat, lines)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot read --prompt-file {path}: {error}") from None
