"""``ray job submit`` on a Ray that somebody else started."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import Client, SamplingParams
from models.needle_text import make_demo, question

ROOT = Path(__file__).parents[2]
TOKEN = "only-for-the-tests-of-this-machine"
KEY = "a-key-for-this-test"
DEMO = make_demo(1024, seed=5)
PROMPT, EXPECTED = DEMO.prompt_text + question(DEMO.questions[0][0]), DEMO.questions[0][1]
# Ray kills a job 3 seconds after it was told to stop, unless the job asks for more.
RUNTIME_ENV = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
JOB_S = 240.0  # for a job to come to what is waited for


class RayHead:
    """A plain ``ray start --head`` with its dashboard, on free ports."""

    def __init__(self) -> None:
        """Start it; returns when its dashboard listens."""
        self._directory = Path(tempfile.mkdtemp(prefix="rj"))
        dashboard_port = free_port()
        self.address = f"http://127.0.0.1:{dashboard_port}"
        scripts = Path(sys.executable).parent
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_TMPDIR": str(self._directory),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(scripts / "ray"), "start", "--head", "--block", "--port", str(free_port())]
        command += ["--dashboard-port", str(dashboard_port), "--object-store-memory", "100000000"]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        self._process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: is_listening(dashboard_port), "the dashboard listens", 60.0)
        except BaseException:
            self.close()
            raise

    def job(self, *words: str) -> str:
        """Run ``ray job WORDS`` and return what it prints."""
        action, *others = words
        run = subprocess.run(
            ["ray", "job", action, "--address", self.address, *others],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=JOB_S,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def submit(self, *words: str) -> str:
        """Start a job in the checkout and return its id."""
        options = ["--no-wait", "--working-dir", ".", "--runtime-env-json", RUNTIME_ENV]
        told = self.job("submit", *options, "--", *words)
        found = re.search(r"raysubmit_\w+", told)
        assert found is not None, told
        return found[0]

    def ask(self, path: str, **parameters: Any) -> Any:
        """Ask the dashboard."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.get(self.address + path, params=parameters, headers=headers, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def logs(self, job_id: str) -> str:
        """Return what a job has printed."""
        text: str = self.ask(f"/api/jobs/{job_id}/logs")["logs"]
        return text

    def wait_for(self, job_id: str, status: str) -> str:
        """Wait for a job's end and return what it has printed."""
        ends = ("STOPPED", "SUCCEEDED", "FAILED")
        wait_until(lambda: self.ask(f"/api/jobs/{job_id}")["status"] in ends, f"{job_id} ends")
        logs = self.logs(job_id)
        assert self.ask(f"/api/jobs/{job_id}")["status"] == status, logs
        return logs

    def living_actors(self) -> list[str]:
        """Return the classes of the actors that live, but for those of jobs themselves."""
        told = self.ask("/api/v0/actors", limit=1000)["data"]["result"]["result"]
        living = [each["class_name"] for each in told if each["state"] != "DEAD"]
        return [name for name in living if name != "JobSupervisor"]

    def close(self) -> None:
        """End it with all that it has started."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)
        shutil.rmtree(self._directory, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    head = RayHead()
    yield head
    head.close()


def test_a_batch_is_stopped_and_goes_on_as_another_job(
    ray_head: RayHead, needle: Path, tmp_path: Path
) -> None:
    """The working directory is the checkout, and the job joins the Ray that runs it."""
    lines, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long: dict[str, Any] = {"prompt_token_ids": [1, 2, 3], "ignore_eos": True, "max_tokens": 64}
    asked: list[dict[str, Any]] = [long | {"id": f"long {i}"} for i in range(24)]
    lines.write_text("\n".join(map(json.dumps, [*asked, {"id": "needle", "prompt": PROMPT}])))
    words = ["ringspan", "generate", str(needle), "-cp", "2", "--max-num-seqs", "2"]
    words += ["--prompt-file", str(lines), "--output", str(output)]

    first = ray_head.submit(*words)
    wait_until(lambda: count_lines(output) >= 3, "three answers are there")
    ray_head.job("stop", first)
    told = ray_head.wait_for(first, "STOPPED")
    assert "ringspan: stopped by SIGTERM" in told
    wait_until(lambda: not ray_head.living_actors(), "its actors are gone", 30.0)
    before = count_lines(output)
    assert 3 <= before < len(asked)

    told = ray_head.wait_for(ray_head.submit(*words), "SUCCEEDED")
    found = {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert len(found) == count_lines(output) == len(asked) + 1
    assert f"{len(found) - before} of {len(found)} lines answered, {before} before" in told
    assert EXPECTED in found["needle"]["outputs"][0]["text"]
    assert len({str(found[line["id"]]["outputs"][0]["token_ids"]) for line in asked}) == 1
    assert ray_head.living_actors() == []


def test_a_server_as_a_job_ends_cleanly_when_the_job_is_stopped(
    ray_head: RayHead, needle: Path
) -> None:
    """It answers on both ports while the job runs, and leaves no actor and no listener."""
    port, grpc_port = free_port(), free_port()
    words = ["ringspan", "serve", str(needle), "-cp", "2", "--api-key", KEY]
    words += ["--port", str(port), "--grpc-port", str(grpc_port), "--served-model-name", "mine"]

    job_id = ray_head.submit(*words)
    wait_until(lambda: "serving mine at" in ray_head.logs(job_id), "it serves")
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": "mine", "prompt": PROMPT, "max_tokens": 24, "temperature": 0},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    with Client(f"127.0.0.1:{grpc_port}", api_key=KEY) as client:
        over_grpc = client.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0.0))[0]
    assert EXPECTED in answer.json()["choices"][0]["text"]
    assert over_grpc.outputs[0].text == answer.json()["choices"][0]["text"]
    assert sorted(ray_head.living_actors()) == ["Coordinator", "GPUWorker", "GPUWorker"]

    ray_head.job("stop", job_id)
    told = ray_head.wait_for(job_id, "STOPPED")
    assert "ringspan: stopping; requests have" in told
    assert told.rstrip().endswith("ringspan: stopped")
    wait_until(lambda: not ray_head.living_actors(), "its actors are gone", 30.0)
    assert not is_listening(port)
    assert not is_listening(grpc_port)


def test_a_job_that_fails_says_why_in_one_sentence(ray_head: RayHead, tmp_path: Path) -> None:
    job_id = ray_head.submit("ringspan", "generate", str(tmp_path / "nowhere"), "--prompt", "hi")

    told = [line for line in ray_head.wait_for(job_id, "FAILED").splitlines() if line]

    assert told[-1].startswith("ringspan: No checkpoint at ")
    assert not any("Traceback" in line for line in told)
    assert ray_head.ask(f"/api/jobs/{job_id}")["driver_exit_code"] == 1
    assert ray_head.living_actors() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(is_so: Callable[[], bool], what: str, limit_s: float = JOB_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if is_so():
            return
        time.sleep(0.2)
    pytest.fail(f"after {limit_s} s it is not so that {what}")
