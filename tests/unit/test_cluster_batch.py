"""`cluster.batch`: every line is answered once, whatever ends a run, and in bounded memory."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ClusterError, QueueFull, RankLost
from actors.messages import CompletionOutput, RequestMetrics, RequestOutput
from cluster import batch as batch_module
from cluster import batch_output
from cluster.__main__ import main
from cluster.batch import Batch, BatchRun
from cluster.batch_lines import read_line
from cluster.batch_output import BatchIndex, BatchOutput, BatchOutputError
from models.errors import PromptError, RingspanError
from models.sampling import SamplingParams
from tests.rpc_backend import FakeBackend, serve

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


class Echo:
    """Answers a prompt with itself; can be told to fail, and counts what is under way."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.asked: list[Any] = []
        self.pause_s = pause_s
        self.errors: dict[str, list[Exception]] = {}  # by text, raised one after the other
        self.under_way = self.most = 0
        self.failure: str | None = None

    async def agenerate(self, prompt: Any, params: SamplingParams | None = None) -> RequestOutput:
        assert params is not None
        text = prompt.get("prompt") or str(prompt)
        self.asked.append(prompt)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.pause_s)
            if self.errors.get(text):
                raise self.errors[text].pop(0)
        finally:
            self.under_way -= 1
        completion = CompletionOutput(
            index=0, text=text, token_ids=(1,) * params.max_tokens, finish_reason="length"
        )
        return RequestOutput(
            request_id="any",
            prompt=text,
            prompt_token_ids=(1, 2, 3),
            outputs=(completion,),
            num_cached_tokens=0,
            metrics=RequestMetrics(queue_s=0.0, ttft_s=0.0, total_s=0.0),
            steps=(),
        )

    def status(self) -> dict[str, Any]:
        return {"failure": self.failure}


def write(path: Path, *lines: Any) -> Path:
    """Write a file of lines; a text is written as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def answer(lines: Path, output: Path, llm: Any, **options: Any) -> BatchRun:
    """Do one run of a batch."""
    with BatchRun(Batch(lines=lines, output=output, defaults=GREEDY)) as run:
        run.answer(llm, model="m", **{"in_flight": 4} | options)
    return run


def read(path: Path) -> dict[Any, dict[str, Any]]:
    """Return the lines of an output by id; each id has one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def text_of(line: dict[str, Any]) -> Any:
    return line["outputs"][0]["text"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_each_line_is_answered_with_its_own_parameters(files: tuple[Path, Path]) -> None:
    """Ids are the line's own or its number, where empty lines count too."""
    lines, output = files
    write(lines, {"prompt": "a", "id": "first"}, "", {"prompt": "b", "max_tokens": 2}, "  ")
    llm = Echo()

    tally = answer(lines, output, llm).tally

    found = read(output)
    assert set(found) == {"first", 3}
    assert text_of(found["first"]) == "a"
    assert [len(found[key]["outputs"][0]["token_ids"]) for key in ("first", 3)] == [8, 2]
    assert found[3]["model"] == "m"
    assert found[3]["prompt_tokens"] == 3
    assert "steps" not in found[3]
    assert (tally.answered, tally.answer_tokens, tally.prompt_tokens) == (2, 10, 6)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1]", "line 2: it must be a JSON object, got list"),
        (b"\xff\xfe", "line 2: it is not JSON"),
        ({"id": 5}, "line 2: it needs exactly one of prompt, prompt_token_ids, messages, got none"),
        ({"prompt": "a", "messages": []}, "got prompt, messages"),
        ({"prompt": 7}, "prompt must be a text, got int"),
        ({"prompt_token_ids": [1, [2]]}, "prompt_token_ids must be a flat list of integers"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids must be a flat list of integers"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": ["hi"]}, "messages must be a list of objects"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'; did you mean temperature?"),
        ({"prompt": "a", "temperature": "1"}, "temperature must be a number, got '1'"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature must be a number >= 0"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a text"),
        ({"prompt": "a", "deadline_s": 0}, "deadline_s must be a number of seconds greater"),
        ({"prompt": "a", "priority": True}, "priority must be an integer"),
        ({"prompt": "a", "id": ""}, "id must be a text of at least one character or an integer"),
        ({"prompt": "a", "id": None}, "id must be a text"),
        ("[" * 100_000, "line 2: it is not JSON"),
    ],
)
def test_what_is_wrong_with_a_line_names_it(line: Any, words: str) -> None:
    text = line if isinstance(line, bytes) else None
    text = text or (line if isinstance(line, str) else json.dumps(line)).encode()
    error = read_line(2, text, GREEDY).error

    assert isinstance(error, RingspanError)
    assert words in str(error)
    assert str(error).startswith("line 2: ")


def test_a_bad_line_does_not_end_the_batch_and_is_tried_again(files: tuple[Path, Path]) -> None:
    """An error is a line too; the next run replaces it, and asks nothing else."""
    lines, output = files
    write(lines, {"prompt": "a"}, "{", {"prompt": "b"}, {"prompt": "c"})
    llm = Echo()
    llm.errors = {"b": [PromptError("too long")], "c": [ClusterError("failed at this one")]}

    assert answer(lines, output, llm).tally.failed == 3
    found = read(output)
    assert found[3]["error"] == {"type": "PromptError", "message": "too long"}
    assert found[4]["error"] == {"type": "ClusterError", "message": "failed at this one"}
    assert "line 2: it is not JSON" in found[2]["error"]["message"]

    write(lines, {"prompt": "a"}, {"prompt": "mended"}, {"prompt": "b"}, {"prompt": "c"})
    llm.asked.clear()
    tally = answer(lines, output, llm).tally
    assert [prompt["prompt"] for prompt in llm.asked] == ["mended", "b", "c"]
    assert (tally.earlier, tally.answered, tally.failed) == (1, 3, 0)
    assert {key: text_of(line) for key, line in read(output).items()} == {
        1: "a",
        2: "mended",
        3: "b",
        4: "c",
    }


def test_a_lost_cluster_ends_the_run_and_keeps_what_was_answered(files: tuple[Path, Path]) -> None:
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    llm = Echo()
    llm.errors = {"b": [RankLost("rank 1 was lost")]}
    llm.failure = "rank 1 was lost"

    with pytest.raises(
        RankLost, match=r"rank 1 was lost \(1 of 3 lines .* run this again to go on"
    ):
        answer(lines, output, llm, in_flight=1)

    assert set(read(output)) == {1}
    llm.failure = None
    assert answer(lines, output, llm).tally.earlier == 1
    assert set(read(output)) == {1, 2, 3}


def test_a_full_queue_is_waited_for(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "FIRST_PAUSE_S", 0.001)
    lines, output = files
    write(lines, {"prompt": "a"})
    llm = Echo()
    llm.errors = {"a": [QueueFull("full")] * 3}

    assert answer(lines, output, llm).tally.answered == 1
    assert len(llm.asked) == 4


def test_what_changes_an_answer_makes_it_anew(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A priority or a tenant does not change it; an answer that nobody asks for any more stays."""
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": "d"})
    llm = Echo()
    answer(lines, output, llm)

    llm.asked.clear()
    write(
        lines,
        {"prompt": "A"},
        {"prompt": "b", "seed": 5},
        {"prompt": "c", "priority": 1, "cache_salt": "t"},
    )
    answer(lines, output, llm)

    assert [prompt["prompt"] for prompt in llm.asked] == ["A", "b"]
    assert {key: text_of(line) for key, line in read(output).items()} == {
        1: "A",
        2: "b",
        3: "c",
        4: "d",
    }
    told = capsys.readouterr().err
    assert f"2 lines of {lines} ask something else than when {output} was written" in told
    assert f"1 answers of {output} are to no line of {lines}: they stay" in told


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"id": "x"}, {"id": "x"}, "line 2 has the id 'x' of line 1 too"),
        ({"id": "7"}, {"id": 7}, "line 2 has the id 7 of line 1 too"),
        ({"id": 2}, {}, "line 2 has no id, and its number is the id of line 1"),
    ],
)
def test_two_lines_with_one_id_are_refused(
    first: Any, second: Any, words: str, files: tuple[Path, Path]
) -> None:
    lines, output = files
    write(lines, first | {"prompt": "a"}, second | {"prompt": "b"})

    with pytest.raises(PromptError, match=words):
        BatchRun(Batch(lines=lines, output=output, defaults=GREEDY))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_dropped(
    cut: int, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a crash leaves behind its last whole line is never read as an answer."""
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt": "b"})
    answer(lines, output, Echo())
    output.write_bytes(output.read_bytes()[:-cut])

    tally = answer(lines, output, Echo()).tally

    assert tally.earlier == 1
    assert {key: text_of(line) for key, line in read(output).items()} == {1: "a", 2: "b"}
    assert "was cut off" in capsys.readouterr().err


def test_one_run_at_a_time_writes_a_file(files: tuple[Path, Path]) -> None:
    lines, output = files
    write(lines, {"prompt": "a"})
    batch = Batch(lines=lines, output=output, defaults=GREEDY)
    with BatchRun(batch), pytest.raises(BatchOutputError, match="another run writes"):
        BatchRun(batch)
    BatchRun(batch).__exit__(None, None, None)


def test_the_lock_holds_behind_a_rewrite(files: tuple[Path, Path]) -> None:
    """The file that takes the old one's place is held before anybody can find it."""
    lines, output = files
    write(lines, {"prompt": "a"})
    batch = Batch(lines=lines, output=output, defaults=GREEDY)
    with contextlib.closing(BatchIndex()) as index, BatchOutput(output, index) as held:
        line = read_line(1, b'{"prompt": "a"}', GREEDY)
        for _ in range(2):
            held.write({"id": 1, "model": "m"}, line.digest(), is_good=True)
        before = output.stat().st_ino
        held.finish()
        assert output.stat().st_ino != before
        with pytest.raises(BatchOutputError, match="another run writes"):
            BatchRun(batch)
        held.write({"id": 2, "model": "m"}, None, is_good=False)
    assert set(read(output)) == {1, 2}


def test_other_files_are_not_overwritten(files: tuple[Path, Path], tmp_path: Path) -> None:
    lines, output = files
    write(lines, {"prompt": "a"})
    output.write_text("my notes\n")
    with pytest.raises(BatchOutputError, match="is no output of a batch"):
        BatchRun(Batch(lines=lines, output=output, defaults=GREEDY))
    assert output.read_text() == "my notes\n"
    for path, words in [(tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file")]:
        with pytest.raises(BatchOutputError, match=words):
            BatchRun(Batch(lines=lines, output=path, defaults=GREEDY))
    with pytest.raises(BatchOutputError, match="a file that it can resume"):
        BatchRun(Batch(lines=lines, output=Path(os.devnull), defaults=GREEDY))


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    write_all = batch_output._write_all

    def fill_up(file: Any, data: bytes) -> None:
        if b'"id": 2' in data:
            write_all(file, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(batch_output, "_write_all", fill_up)
    with pytest.raises(BatchOutputError, match=r"cannot write .*: No space left on device"):
        answer(lines, output, Echo(), in_flight=1)
    assert set(read(output)) == {1}

    monkeypatch.undo()
    assert answer(lines, output, Echo()).tally.answered == 2


def test_two_models_do_not_mix(files: tuple[Path, Path]) -> None:
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt": "b"})
    answer(lines, output, Echo())
    refused = pytest.raises(BatchOutputError, match="answers of the model 'm', not of 'other'")
    with BatchRun(Batch(lines=lines, output=output, defaults=GREEDY)) as run, refused:
        run.check_model("other")


def test_lines_under_way_are_bounded(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By number, and by bytes where prompts are long; the longest goes alone."""
    lines, output = files
    write(lines, *({"prompt": f"{i}"} for i in range(200)))
    llm = Echo(pause_s=0.001)
    answer(lines, output, llm, in_flight=5)
    assert llm.most == 5

    monkeypatch.setattr(batch_module, "IN_FLIGHT_BYTES", 250)
    write(lines, *({"prompt": f"{i:080}"} for i in range(20)), {"prompt": "x" * 1000})
    llm = Echo(pause_s=0.001)
    answer(lines, output, llm, in_flight=100)
    assert llm.most == 2


RUN = """
import sys
from pathlib import Path
from tests.unit import test_cluster_batch as own
own.answer(Path(sys.argv[1]), Path(sys.argv[2]), own.Echo(pause_s=0.002))
"""


def test_a_killed_run_is_resumed_without_losing_or_repeating_an_answer(
    files: tuple[Path, Path],
) -> None:
    """SIGKILL at any moment; what the file has whole is not asked for again."""
    lines, output = files
    count = 3000
    write(lines, *({"prompt": f"{i}", "max_tokens": 300} for i in range(count)))
    told = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(lines), str(output)])
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and process.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") >= told + 300:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        told = output.read_bytes().count(b"\n")
        assert told >= 300

    llm = Echo()
    tally = answer(lines, output, llm).tally

    assert tally.earlier == told
    assert len(llm.asked) == count - told
    assert {key: text_of(line) for key, line in read(output).items()} == {
        i + 1: f"{i}" for i in range(count)
    }


def test_a_batch_asks_a_server_that_runs(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--target`: the same file of answers, by gRPC."""
    lines, output = files
    write(lines, {"prompt": "a"}, {"prompt_token_ids": [1, 2]}, {"prompt": "b", "logprobs": 1})

    class Backend(FakeBackend):
        async def status(self) -> dict[str, Any]:
            return {**await super().status(), "model": "/models/m"}

    backend = Backend()
    with serve(backend, api_keys=("key",)) as (target, _, _):
        words = ["generate", "--target", target, "--prompt-file", str(lines)]
        words += ["--output", str(output), "--max-tokens", "3"]
        assert main(words) == 1
        assert "API key" in capsys.readouterr().err
        assert main([*words, "--api-key", "key"]) == 0
        asked = len(backend.asked)
        assert main([*words, "--api-key", "key"]) == 0

    assert len(backend.asked) == asked
    found = read(output)
    assert len(found[1]["outputs"][0]["token_ids"]) == 3
    assert found[2]["prompt_tokens"] == 2
    assert len(found[3]["outputs"][0]["logprobs"]) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["m", "--prompt-file", "x.jsonl"], "needs --output FILE"),
        (["m", "--prompt-file", "x.jsonl", "--prompt", "a"], "must be the only prompt"),
        (["m", "--prompt", "a", "--output", "o"], "--output needs a --prompt-file that ends in"),
        (["m", "--prompt-file", "x.jsonl", "--output", "o", "--json"], "--json is not for"),
        (["m", "--prompt-file", "none.jsonl", "--output", "{tmp}/o"], "cannot read the prompt"),
        (["--prompt", "a"], "give MODEL, the directory of a checkpoint, or --target"),
        (["m", "--api-key", "k", "--prompt", "a"], "--api-key is for --target"),
        (["m", "--target", "h:1", "--prompt", "a"], "leave MODEL out"),
        (["--target", "h:1", "--prompt", "a", "-cp", "2"], "leave context_parallel_size out"),
        (["--target", "h:1", "--prompt", "a", "--trace", "t"], "--trace is for a cluster of"),
        (["m", "--tls", "--prompt", "a"], "--tls is for --target"),
        (["--target", "h:1", "--prompt", "a", "--ssl-ca-certs", "{tmp}/none"], "cannot read"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *(word.format(tmp=tmp_path) for word in words)]) == 1
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


def openai_line(custom_id: str, path: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{path}", "body": body}


def test_lines_of_openais_form_get_its_bodies(files: tuple[Path, Path]) -> None:
    """As vLLM's run-batch takes and gives them; both forms may stand in one file."""
    lines, output = files
    user = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    write(
        lines,
        openai_line("a", "completions", model="any", prompt="x", max_tokens=3),
        openai_line("b", "chat/completions", messages=[user], return_token_ids=True),
        openai_line("c", "completions", prompt=["x", "y"]),
        {"prompt": "own", "id": "d"},
    )
    tally = answer(lines, output, Echo()).tally

    found = read(output)
    assert (tally.answered, tally.failed) == (3, 1)
    body = found["a"]["response"]["body"]
    assert (found["a"]["custom_id"], found["a"]["error"]) == ("a", None)
    assert (body["object"], body["model"], body["choices"][0]["text"]) == (
        "text_completion",
        "any",
        "x",
    )
    assert body["usage"]["completion_tokens"] == 3
    body = found["b"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert len(body["choices"][0]["token_ids"]) == GREEDY.max_tokens
    assert "{'role': 'user', 'content': 'hi'}" in body["choices"][0]["message"]["content"]
    assert (found["c"]["custom_id"], found["c"]["response"]) == ("c", None)
    assert "line 3: prompt has 2 prompts: give each a line" in found["c"]["error"]["message"]
    assert text_of(found["d"]) == "own"

    llm = Echo()
    assert answer(lines, output, llm).tally.earlier == 3
    assert llm.asked == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (openai_line("a", "embeddings", prompt="x"), "it must POST to /v1/completions or"),
        (openai_line("a", "completions", prompt="x") | {"method": "GET"}, "'GET to /v1/compl"),
        (openai_line("a", "completions", prompt="x") | {"url": ["x"]}, "it must POST to"),
        (openai_line("a", "completions", prompt="x") | {"id": "b"}, "unknown field 'id' beside"),
        (openai_line("a", "completions", prompt="x", temprature=1), "body: unknown field 'tempra"),
        (openai_line("a", "completions", prompt="x", stream=True), "stream must be left out"),
        (openai_line("a", "completions", prompt="x", top_p=3), "top_p must be in (0, 1]"),
        (openai_line("a", "chat/completions", messages=["x"]), "messages must be objects"),
        (openai_line("a", "chat/completions"), "body: "),
        ({"custom_id": "a"}, "it must POST to"),
        ({"custom_id": "a", "url": "/v1/completions", "body": "x"}, "body: "),
        ({"custom_id": [], "url": "/v1/completions"}, "id must be a text"),
    ],
)
def test_what_is_wrong_with_a_line_of_openais_form_names_it(line: Any, words: str) -> None:
    error = read_line(2, json.dumps(line).encode(), GREEDY).error

    assert isinstance(error, RingspanError)
    assert words in str(error)
    assert str(error).startswith("line 2: ")
    assert "\n" not in str(error)


def test_every_sampling_parameter_may_stand_on_a_line() -> None:
    values = {
        name: value
        for name, value in dataclasses.asdict(SamplingParams(seed=1, n=2)).items()
        if value is not None
    }
    line = read_line(1, json.dumps({"prompt": "a", **values}).encode(), GREEDY)
    assert line.error is None
    assert line.params == SamplingParams(seed=1, n=2)
