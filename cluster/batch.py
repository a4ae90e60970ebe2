"""Answers to a file of prompts, into a file: bounded in memory, and resumable at any moment."""

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from actors.errors import ClusterError, QueueFull
from actors.messages import RequestOutput
from cluster.batch_lines import BatchLine, read_lines
from cluster.batch_output import BatchIndex, BatchOutput
from cluster.prompt import Prompt
from models.errors import PromptError, RingspanError, SamplingError
from models.sampling import SamplingParams

MiB = 2**20
IN_FLIGHT_BYTES = 256 * MiB  # of the input's lines whose answers are awaited
FIRST_PAUSE_S = 0.5  # before a request is sent again that found no place; doubled with each
LONGEST_PAUSE_S = 10.0
QUEUE_S = 1800.0  # after which a line that found no place has failed
BAR_S = 0.2  # between two updates of the bar on a terminal
LOG_S = 30.0  # between two lines in a log


class Answerer(Protocol):
    """What `LLM` and `Client` have in common, as far as a batch needs it."""

    async def agenerate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer one prompt."""
        ...

    def status(self) -> dict[str, Any]:
        """Return what the cluster is and does."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is asked: a file of JSON lines, and the file for their answers."""

    lines: Path
    output: Path
    defaults: SamplingParams  # of lines that do not say
    cache_salt: str | None = None  # of lines that name none

    def read(self) -> Iterator[BatchLine]:
        """Read the lines, one at a time."""
        return read_lines(self.lines, self.defaults, self.cache_salt)


@dataclass
class Tally:
    """What a run has come to so far."""

    total: int = 0  # lines of the input
    earlier: int = 0  # answered by earlier runs
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    start_s: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers in a second."""
        return self.answer_tokens / max(1e-9, time.perf_counter() - self.start_s)

    def line(self) -> str:
        """Return it as one line for people."""
        earlier = f", {self.earlier} before" if self.earlier else ""
        prompts = f"{self.prompt_tokens} tokens of prompts, " if self.prompt_tokens else ""
        return (
            f"{self.answered} of {self.total} lines answered{earlier},"
            f" {self.failed} failed, in {time.perf_counter() - self.start_s:.1f} s"
            f" ({prompts}{self.answer_tokens} of answers, {self.tokens_per_s:.1f} tokens/s)"
        )


class BatchRun:
    """One run of a batch. Use it as a context manager: until its end no other run has the output.

    Making one reads the whole input once, so that what is wrong with the batch itself is
    told before a cluster is brought up.
    """

    def __init__(self, batch: Batch) -> None:
        """Read what is asked and what is answered already.

        Raises:
            PromptError: The input cannot be read, or two lines have one id.
            BatchOutputError: The output cannot be written, or is not that of a batch.
        """
        self._batch = batch
        self.tally = Tally()
        with contextlib.ExitStack() as stack:
            self._index = stack.enter_context(contextlib.closing(BatchIndex()))
            self._output = stack.enter_context(BatchOutput(batch.output, self._index))
            for line in batch.read():
                self._index.ask(line)
            counts = self._index.counts()
            if not counts["asked"]:
                raise PromptError(f"{batch.lines} has no line: give one JSON object a line")
            self._stack = stack.pop_all()
        self.tally.total, self.tally.earlier = counts["asked"], counts["answered"]
        for text in _remarks(batch, counts, self._output.dropped_bytes):
            print(f"ringspan: {text}", file=sys.stderr)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be answered."""
        return self.tally.earlier == self.tally.total

    def check_model(self, model: str) -> None:
        """Refuse to mix the answers of two models; raises `BatchOutputError`."""
        self._output.check_model(model)

    def answer(self, llm: Answerer, *, model: str, in_flight: int) -> None:
        """Answer all lines that have no answer yet.

        Args:
            llm: Answers them.
            model: Its name, for the output.
            in_flight: Lines whose answers are awaited at a time.

        Raises:
            RingspanError: The cluster or the server is lost; what was answered is in the output.
        """
        self.tally.start_s = time.perf_counter()
        self.check_model(model)
        with _Meter(self.tally) as meter:
            try:
                asyncio.run(self._answer_all(llm, model, in_flight, meter))
            except ExceptionGroup as errors:
                first = errors.exceptions[0]
                if isinstance(first, ClusterError):
                    first = type(first)(f"{first} ({self.tally.line()}; run this again to go on)")
                raise first from None
        self._output.finish()

    async def _answer_all(self, llm: Answerer, model: str, in_flight: int, meter: "_Meter") -> None:
        room = _Room(in_flight)
        async with asyncio.TaskGroup() as group:
            for line in self._batch.read():
                if self._index.is_answered(line.key):
                    continue
                await room.enter(line.size_bytes)
                group.create_task(self._answer_line(llm, model, line, room, meter))

    async def _answer_line(
        self, llm: Answerer, model: str, line: BatchLine, room: "_Room", meter: "_Meter"
    ) -> None:
        async with room.leave_after(line.size_bytes):
            try:
                if line.error is not None:
                    raise line.error
                output = await _ask_patiently(llm, line)
            except (PromptError, SamplingError) as error:
                self._write_error(model, line, error)
            except ClusterError as error:
                # Of this line alone, where the cluster is well.
                if not await _is_well(llm):
                    raise
                self._write_error(model, line, error)
            else:
                await self._write(model, line, output)
            meter.show()

    async def _write(self, model: str, line: BatchLine, output: RequestOutput) -> None:
        values = await answer_values(line, output, model)
        self._output.write(values, line.digest(), is_good=True)
        self.tally.answered += 1
        self.tally.prompt_tokens += len(output.prompt_token_ids)
        self.tally.answer_tokens += sum(len(each.token_ids) for each in output.outputs)

    def _write_error(self, model: str, line: BatchLine, error: RingspanError) -> None:
        told = {"type": type(error).__name__, "message": str(error)}
        self._output.write({**_head(line, model), "error": told}, None, is_good=False)
        self.tally.failed += 1

    def __enter__(self) -> "BatchRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


async def answer_values(line: BatchLine, output: RequestOutput, model: str) -> dict[str, Any]:
    """Return an answer as the output has it: without the prompt, which the input has."""
    if line.openai is not None:
        body = await line.openai.body(output, model)
        response = {"status_code": 200, "request_id": output.request_id, "body": body}
        return {**_head(line, model), "response": response, "error": None}
    values = dataclasses.asdict(dataclasses.replace(output, steps=(), prompt_token_ids=()))
    kept = ("outputs", "num_cached_tokens", "metrics", "prompt_logprobs", "restored")
    # A client does not know into how many tokens a server cut a text.
    prompt_tokens = len(output.prompt_token_ids) or None
    return {
        **_head(line, model),
        "prompt_tokens": prompt_tokens,
        **{name: values[name] for name in kept},
    }


def _head(line: BatchLine, model: str) -> dict[str, Any]:
    custom_id = {"custom_id": line.id, "response": None} if line.is_openai else {}
    return {"id": line.id, "model": model, **custom_id}


async def _ask_patiently(llm: Answerer, line: BatchLine) -> RequestOutput:
    """Answer a line; where the queue is full for others, wait."""
    pause_s, start_s = FIRST_PAUSE_S, time.monotonic()
    while True:
        try:
            return await llm.agenerate(line.prompt, line.params)
        except QueueFull:
            if time.monotonic() - start_s > QUEUE_S:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


async def _is_well(llm: Answerer) -> bool:
    try:
        status = await asyncio.to_thread(llm.status)
    except RingspanError:
        return False
    return status.get("failure") is None


class _Room:
    """Bounds the lines under way by number and by size; a line larger than all goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines = 0
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def enter(self, size_bytes: int) -> None:
        """Wait for a place."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_place(size_bytes))
            self._lines += 1
            self._bytes += size_bytes

    @contextlib.asynccontextmanager
    async def leave_after(self, size_bytes: int) -> AsyncIterator[None]:
        """Give the place back behind the block."""
        try:
            yield
        finally:
            async with self._changed:
                self._lines -= 1
                self._bytes -= size_bytes
                self._changed.notify()

    def _has_place(self, size_bytes: int) -> bool:
        if self._lines == 0:
            return True
        return self._lines < self._most and self._bytes + size_bytes <= IN_FLIGHT_BYTES


class _Meter:
    """A bar on a terminal, a line now and then in a log; both on stderr."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._is_terminal = sys.stderr.isatty()
        self._next_s = time.monotonic() + LOG_S
        self._bar: tqdm | None = None
        if self._is_terminal:
            self._bar = tqdm(
                total=tally.total, initial=tally.earlier, unit=" lines", mininterval=BAR_S
            )

    def show(self) -> None:
        """Show what the tally says now."""
        tally = self._tally
        done = tally.earlier + tally.answered + tally.failed
        if self._bar is not None:
            failed = f", {tally.failed} failed" if tally.failed else ""
            self._bar.set_postfix_str(f"{tally.tokens_per_s:.0f} tokens/s{failed}", refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LOG_S
            rate = f"{tally.tokens_per_s:.0f} tokens/s"
            print(f"ringspan: {done} of {tally.total} lines, {rate}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _remarks(batch: Batch, counts: dict[str, int], dropped_bytes: int) -> Iterator[str]:
    """Yield what a user must know of the output that is there already."""
    name = batch.output
    if dropped_bytes:
        yield f"the last line of {name} was cut off ({dropped_bytes} bytes): it is made anew"
    if counts["changed"]:
        yield (
            f"{counts['changed']} lines of {batch.lines} ask something else than when {name} was"
            " written: they are answered anew"
        )
    if counts["not_asked"]:
        yield f"{counts['not_asked']} answers of {name} are to no line of {batch.lines}: they stay"
