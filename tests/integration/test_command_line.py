"""``ringspan`` as a user types it: answers, one sentence for wrong input, no process left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.__main__ import main
from models.needle_text import make_demo, question
from tests.checkpoints import edit_json, write_checkpoint, write_llama_checkpoint

RINGSPAN = [sys.executable, "-m", "cluster"]

# What is refused before any process starts: (arguments behind `generate`, words of the sentence).
REFUSED = [
    (["{nowhere}", "--prompt", "hi"], "No checkpoint at"),
    (["{needle}"], "no prompt: give --prompt"),
    (["{needle}", "--prompt", "hi", "-tp", "2"], "tensor_parallel_size must be 1"),
    (["{needle}", "--prompt", "hi", "-cp", "0"], "context_parallel_size must be greater than 0"),
    (["{needle}", "--prompt", "hi", "--dtype", "int3"], "dtype: Invalid value 'int3'"),
    (["{needle}", "--prompt", "hi", "ring.algoritm=x"], "did you mean ring.algorithm"),
    (["{needle}", "--prompt", "hi", "--temperature", "-1"], "temperature must be a number >= 0"),
    (["{needle}", "--prompt", "hi", "--max-tokens", "0"], "max_tokens must be >= 1"),
    (["{needle}", "--prompt", "hi", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
    (["{needle}", "--prompt", "hi", "--n", "2"], "n must be 1 with temperature 0, got 2"),
    (["{needle}", "--prompt", "hi", "--logit-bias", "5"], "--logit-bias must be ID=BIAS"),
    (["{needle}", "--prompt-token-ids", "1,b"], "--prompt-token-ids must be integers"),
    (["{needle}", "--prompt-file", "{nowhere}"], "cannot read the prompt file"),
    (["{needle}", "--prompt", "hi", "--config", "{nowhere}"], "cannot read"),
    (["{needle}", "--prompt", "hi", "ray.address=127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
    (["{needle}", "--prompt", "hi", "--trace", "{nowhere}/x.json"], "there is no directory"),
    (["{needle}", "--prompt", "hi", "--trace", "{needle}"], "it is a directory"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    needle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 1, one line on stderr, nothing on stdout."""
    places = {"needle": needle, "nowhere": tmp_path / "nowhere"}

    status = main(["generate", *(argument.format(**places) for argument in arguments)])

    printed = capsys.readouterr()
    assert status == 1
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("ringspan: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--foo"], ["stray"], []])
def test_unknown_arguments_are_named(
    arguments: list[str], needle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(needle), "--prompt", "hi", *arguments] if arguments else []
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unsupported_checkpoints_are_refused_before_a_process_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What config.json tells is told at once; the weights are looked at by the ranks."""
    checkpoint = write_llama_checkpoint(tmp_path)
    edit_json(checkpoint / "config.json", architectures=["MambaForCausalLM"])
    assert main(["generate", str(checkpoint), "--prompt-token-ids", "1"]) == 1
    assert "MambaForCausalLM" in capsys.readouterr().err

    checkpoint = write_checkpoint(tmp_path / "opt", "opt")
    beyond = ["--prompt-token-ids", "1", "--max-model-len", "2049"]
    assert main(["generate", str(checkpoint), *beyond]) == 1
    assert "max_model_len is 2049, but the positions of this" in capsys.readouterr().err


@pytest.mark.usefixtures("shared_ray")
def test_pickle_and_damaged_checkpoints_are_refused_by_the_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence comes from the rank through Ray without a traceback."""
    checkpoint = write_llama_checkpoint(tmp_path)
    weights = checkpoint / "model.safetensors"
    capsys.readouterr()
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", str(checkpoint), "--prompt-token-ids", "1", "-cp", "2"]) == 1
    assert capsys.readouterr().err.count("\n") == 1

    weights.rename(checkpoint / "pytorch_model.bin")
    assert main(["generate", str(checkpoint), "--prompt-token-ids", "1"]) == 1
    printed = capsys.readouterr().err
    assert "safetensors" in printed
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("shared_ray")
def test_generate_prints_json_and_steps(needle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object a prompt on stdout; --log-steps has a line for every step on stderr."""
    arguments = ["generate", str(needle), "--json", "--log-steps", "--prompt", "one", "-cp", "2"]

    assert main([*arguments, "--prompt", "two", "ring.piece_bytes=4096"]) == 0

    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]
    assert answers[0]["steps"][0]["phase"] == "prefill"
    assert "step 0 prefill " in printed.err


@pytest.mark.usefixtures("shared_ray")
def test_demo_exits_with_an_error_if_an_answer_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is what `make demo` is trusted for."""
    monkeypatch.setattr("cluster.demo.DEPTHS", (0.5,))
    assert main(["demo", "-cp", "2", "--context-tokens", "2048"]) == 0
    assert "1 of 1 answers are right" in capsys.readouterr().out

    monkeypatch.setattr("cluster.demo.question", lambda key: question("pass key of nobody"))
    assert main(["demo", "-cp", "2", "--context-tokens", "2048"]) == 1
    assert "WRONG, expected" in capsys.readouterr().out


CHECK = ["-cp", "2", "--lengths", "5,700", "--max-tokens", "8"]


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_check_tells_people_its_verdict(needle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(needle), *CHECK]) == 0
    assert "a ring of 2 ranks gives this model's own answers" in capsys.readouterr().out


@pytest.mark.usefixtures("shared_ray")
def test_check_gives_a_verdict(needle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON for programs; a ring of one rank has nothing to compare."""
    assert main(["check", str(needle), *CHECK, "--json", "max_model_len=600"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] is True
    rows = [(e["algorithm"], e["prompt_tokens"], e["cached_tokens"]) for e in report["prompts"]]
    assert rows == [
        (algorithm, *turn) for algorithm in ("pass_kv", "pass_q") for turn in ((5, 0), (15, 12))
    ]

    assert main(["check", str(needle), "-cp", "1"]) == 1
    assert "give -cp 2 or more" in capsys.readouterr().err


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("shared_ray")
def test_check_measures_what_quantised_kv_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the ring's verdict, which is about the same KV on both sides."""
    checkpoint = write_llama_checkpoint(tmp_path)
    command = ["check", str(checkpoint), "-cp", "2", "--lengths", "5,300", "--max-tokens", "8"]
    command += ["--kv-cache-dtype", "int8", "ring.algorithm=pass_kv"]

    assert main([*command, "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["exact"] is True
    loss = report["loss"]
    assert loss["exactness"] == "device=int8,host=int8,remote=int8,disk=int8"
    assert loss["positions"] == 299
    assert 0.0 < loss["rms_logit_error"] < 0.5
    assert loss["max_logit_error"] < 3.0
    assert 0.8 < loss["top1_agreement"] <= 1.0


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("shared_ray")
def test_bench_decode_measures_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and transformers in one run, with where the time went."""
    command = ["bench", "decode", "--model", "needle", "--lengths", "64", "--repeats", "1"]
    assert main([*command, "--steps", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [run["name"] for run in report["runs"]]
    assert names == ["N=2", "N=1, 2 threads", "transformers, 2 threads"]
    assert report["runs"][0]["parts_s"].keys() >= {"attention", "exchange", "gemm", "ray"}
    assert all(run["peak_bytes"] > 2**20 for run in report["runs"])


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_bench_conversation_times_second_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """Everybody has the first turn at hand but the one that computes it anew."""
    command = ["bench", "conversation", "--model", "needle", "--lengths", "40"]
    assert main([*command, "--new-tokens", "8", "--repeats", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["runs"]) == 4
    assert all(len(run["seconds"]) == 2 and run["peak_bytes"] > 2**20 for run in report["runs"])
    assert len(report["ratios"]) == 4


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_bench_choice_prices_what_it_measures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Three clusters; all predict by the same rates, and the results lie in files."""
    command = ["bench", "choice", "--model", "needle", "--tokens", "600", "--miss", "5,100"]
    assert main([*command, "--repeats", "1", "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["new_tokens"] for row in report["rows"]] == [30, 600]
    for row in report["rows"]:
        assert row["pass_kv"]["prices_s"] == row["pass_q"]["prices_s"]
        assert row["pass_q"]["algorithm"] == "pass_q"
        assert row["pass_q"]["predicted_s"][0] > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"choice_needle.{suffix}" for suffix in ("json", "txt", "png")
    }


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_bench_prediction_has_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each turn a prefill and two bursts, on one rank and on two."""
    command = ["bench", "prediction", "--model", "needle", "--new", "8", "--cached", "0,40"]
    assert main([*command, "--repeats", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["steps"]) == 12
    assert [(each["name"], each["phase"]) for each in report["errors"]] == [
        (name, phase) for name in ("N=2", "N=1, 2 threads") for phase in ("prefill", "decode")
    ]


@pytest.mark.campaign
@pytest.mark.usefixtures("shared_ray")
def test_bench_requests_measures_all_three_parts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Streams beside a long prompt, mixed requests, and steps both in bursts and beside chunks."""
    command = ["bench", "requests", "--model", "needle", "--repeats", "1", "--streams", "2"]
    command += ["--prompt", "20", "--answer", "200", "--long", "600", "--mixed", "3"]
    command += ["--mixed-prompts", "8,60", "--mixed-answers", "4,12"]
    assert main([*command, "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    beside = [run for run in report["latency"]["runs"] if "overlap" in run]
    assert [run["cluster"] for run in beside] == ["decode rides", "decode takes turns"]
    assert all(run["p95_s"][0] > 0 and run["long_s"][0] > 0 for run in beside)
    assert [run["name"] for run in report["throughput"]["runs"]] == [
        "N=2, together",
        "N=2, one by one",
        "N=1, 2 threads, together",
        "N=1, 2 threads, one by one",
        "transformers, 2 threads",
    ]
    assert {each["phase"] for each in report["outside"]["phases"]} == {"decode", "mixed"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"requests_needle.{suffix}" for suffix in ("json", "txt", "png")
    }


def test_two_clusters_in_one_plain_script_leave_nothing(needle: Path, tmp_path: Path) -> None:
    """No ``__main__`` guard, one `LLM` after the other; processes and shared memory are gone."""
    script = tmp_path / "script.py"
    script.write_text(
        "from cluster import LLM, SamplingParams\n"
        "for ranks in (1, 2):\n"
        f"    with LLM({str(needle)!r}, context_parallel_size=ranks) as llm:\n"
        "        out = llm.generate('The key is', SamplingParams(max_tokens=2, temperature=0))\n"
        "        print(ranks, out[0].outputs[0].finish_reason)\n"
    )
    before = _shared_memory()

    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=_marked()
    )

    assert run.stdout == "1 stop\n2 stop\n"
    assert run.stderr == ""
    assert run.returncode == 0
    _assert_nothing_left(before)


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.campaign),  # servers get it every day
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
    ],
)
def test_stopped_command_leaves_nothing(
    needle: Path, tmp_path: Path, stop: signal.Signals, status: int
) -> None:
    """Ctrl-C, SIGTERM and even SIGKILL in the middle of a prefill end all processes."""
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text(make_demo(60000, seed=3).prompt_text)
    before = _shared_memory()
    command = [*RINGSPAN, "generate", str(needle), "--prompt-file", str(prompt_file), "-cp", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_marked()
    )
    _wait_for_ranks(2)
    time.sleep(2.0)

    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == status
    assert "Traceback" not in errors
    _assert_nothing_left(before)


MARK = "RINGSPAN_TEST_MARK"


def _marked() -> dict[str, str]:
    """An environment by which the processes of this test are found among all."""
    return {**os.environ, MARK: str(os.getpid())}


def _marked_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _wait_for_ranks(count: int, limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if sum("GPUWorker" in process.name() for process in _marked_processes()) >= count:
            return
        time.sleep(0.2)
    pytest.fail(f"no {count} ranks within {limit_s} s: {_marked_processes()}")


def _shared_memory() -> set[str]:
    """Return what is in shared memory, but for arenas of processes that live: other tests'."""
    names = set(os.listdir("/dev/shm"))
    living = {name for name in names if re.search(r"-(\d+)\.arena$", name) and _lives(name)}
    return names - living


def _lives(arena: str) -> bool:
    pid = int(arena.removesuffix(".arena").rpartition("-")[2])
    return psutil.pid_exists(pid)


def _assert_nothing_left(shared_memory_before: set[str]) -> None:
    # Ray's own agents look for their raylet now and then; after SIGKILL nobody else tells them.
    deadline_s = time.monotonic() + 90.0
    while _marked_processes() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert _marked_processes() == []
    assert _shared_memory() <= shared_memory_before
