"""``ray job submit`` on a Ray that somebody else started."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.needle_text import make_demo, question

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ray_head() -> Iterator[tuple[str, dict[str, str]]]:
    """A plain ``ray start --head`` with its dashboard: (its address, the environment to use it)."""
    dashboard_port, port = _free_port(), _free_port()
    directory = Path(tempfile.mkdtemp(prefix="rj"))
    scripts = Path(sys.executable).parent
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "only-for-the-tests-of-this-machine",
        "RAY_TMPDIR": str(directory),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(scripts / "ray"), "start", "--head", "--block", "--port", str(port)]
    command += ["--dashboard-port", str(dashboard_port), "--object-store-memory", "100000000"]
    command += ["--dashboard-agent-listen-port", str(_free_port())]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for_port(dashboard_port)
        yield f"http://127.0.0.1:{dashboard_port}", environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


def test_generate_as_a_ray_job(
    ray_head: tuple[str, dict[str, str]], needle: Path, tmp_path: Path
) -> None:
    """The working directory is the checkout, and the job joins the Ray that runs it."""
    address, environment = ray_head
    demo = make_demo(2048, seed=5)
    key, expected = demo.questions[0]
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text(demo.prompt_text + question(key))
    command = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    command += ["ringspan", "generate", str(needle), "--prompt-file", str(prompt_file), "-cp", "2"]

    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert expected in run.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int, limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"nothing listens on port {port} after {limit_s} s")
