"""`ringspan doctor`: each check tells good from bad, and none that fails ends the others."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.doctor import checkpoint, command, devices, links, machine, ray_cluster, software
from cluster.doctor.checkpoint_probe import checkpoint_facts
from cluster.doctor.command import bounded
from cluster.doctor.finding import Finding, GiB, gib, ok
from cluster.doctor.host_probe import code_digest
from cluster.doctor.probes import ProbeFailed, probe
from tests.checkpoints import edit_json, write_llama_checkpoint

GPU = {"name": "H", "capability": [9, 0], "free_bytes": 70 * GiB, "total_bytes": 80 * GiB}
CPU_TORCH: dict[str, Any] = {
    "version": "2.13",
    "cuda": None,
    "threads": 2,
    "devices": [],
    "reason": None,
}
CUDA_TORCH = CPU_TORCH | {"cuda": "13.0", "nccl": [2, 30, 1]}
HOST = {"name": "a", "offset_s": 0.0, "python": "3.12", "ray": "2.60", "torch": "2.13", "code": "1"}


def states(found: Finding | list[Finding]) -> list[str]:
    return [each.state for each in ([found] if isinstance(found, Finding) else found)]


@pytest.mark.parametrize(
    ("version", "requires", "state"),
    [((3, 11, 0), ">=3.11", "ok"), ((3, 10, 9), ">=3.11", "problem"), ((4, 0), ">=3.11", "ok")],
)
def test_python(version: tuple[int, ...], requires: str, state: str) -> None:
    assert software.judge_python(version, requires).state == state


def test_packages_that_are_missing_or_too_old_are_named() -> None:
    """Also without the library that reads ranges; extras and bounds are read right."""
    needed = ["torch>=2.11", "ray[default]>=2.55", "grpcio>=1.66"]
    good = {"torch": "2.13.0+cpu", "ray": "2.60.0", "grpcio": "1.100"}
    assert states(software.judge_packages(needed, good)) == ["ok"]

    found = software.judge_packages(needed, good | {"torch": "2.9", "ray": None})
    assert [each.sentence for each in found] == [
        "torch is 2.9, but torch>=2.11 is needed",
        "ray is not installed, but ray[default]>=2.55 is needed",
    ]
    assert found[1].advice == "pip install 'ray[default]>=2.55'"


def test_what_is_installed_here_is_right() -> None:
    assert states(software.check_packages()) == ["ok"]
    assert software.check_python().state == "ok"


def test_foreign_packages_of_our_names_are_found(tmp_path: Path) -> None:
    """One that is imported instead of ours, one installed over it, one that workers would take."""
    root = software.ROOT
    places: dict[str, Path | None] = {"models": root / "models"}
    assert states(software.judge_shadows(root, places, {"models": ["ringspan"]}, root)) == ["ok"]

    (found,) = software.judge_shadows(root, {"models": tmp_path / "models"}, {}, root)
    assert found.state == "problem"
    assert f"models is imported from {tmp_path / 'models'}" in found.sentence
    owners = {"models": ["ringspan", "models-of-others"]}
    (found,) = software.judge_shadows(root, places, owners, root)
    assert "models-of-others installs a package models too" in found.sentence
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    assert states(software.judge_shadows(root, places, {}, tmp_path)) == ["warning"]


@pytest.mark.parametrize(
    ("facts", "has_driver", "device", "expected"),
    [
        (CPU_TORCH, False, "auto", ["ok"]),
        (CPU_TORCH, True, "auto", ["warning"]),
        (CPU_TORCH, False, "cuda", ["problem"]),
        (CUDA_TORCH, False, "auto", ["ok"]),
        (CUDA_TORCH | {"reason": "driver too old"}, True, "auto", ["problem"]),
        (CUDA_TORCH | {"devices": [GPU, GPU]}, True, "auto", ["ok", "ok", "ok"]),
        (CUDA_TORCH | {"devices": [GPU | {"capability": [7, 5]}]}, True, "auto", ["ok", "warning"]),
        (CUDA_TORCH | {"devices": [GPU | {"free_bytes": GiB}]}, True, "auto", ["ok", "warning"]),
    ],
)
def test_torch_and_devices(
    facts: dict[str, Any], has_driver: bool, device: str, expected: list[str]
) -> None:
    assert states(devices.judge_torch(facts, has_driver=has_driver, device=device)) == expected


def test_shared_memory() -> None:
    assert machine.judge_shared_memory(GiB, GiB, GiB // 2, GiB // 4).state == "ok"
    found = machine.judge_shared_memory(GiB, GiB // 2, GiB // 2, GiB // 4)
    assert found.state == "problem"
    assert "0.5 GiB of 1 GiB free in /dev/shm, but 0.5 GiB for the KV store" in found.sentence
    assert machine.check_shared_memory(0, 0).state == "ok"


def test_limits() -> None:
    assert states(machine.judge_limits(None, None, GiB)) == ["ok"]
    assert states(machine.judge_limits(1024, 2**16, GiB)) == ["warning", "warning"]
    assert states(machine.judge_limits(65536, 2**16, 0)) == ["ok"]


def test_ports_and_who_has_them() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = machine.check_port("127.0.0.1", port, "--port")
        assert found.state == "warning"
        assert f"in use by process {os.getpid()} (" in found.sentence
    assert machine.check_port("127.0.0.1", port, "--port").state == "ok"
    assert machine.check_port("192.0.2.99", port, "--port").state == "problem"


def test_disk(tmp_path: Path) -> None:
    """A directory that a start would make is not made."""
    assert "problem" not in states(machine.check_disk(tmp_path / "kv", 1))
    assert not (tmp_path / "kv").exists()
    assert machine.judge_room(tmp_path, 10 * GiB, 20 * GiB).state == "warning"
    (tmp_path / "file").touch()
    assert states(machine.check_disk(tmp_path / "file", 1)) == ["problem"]


def test_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert machine.check_secret(path, is_needed=False).state == "ok"
    assert machine.check_secret(path, is_needed=True).state == "problem"
    path.write_text("s")
    path.chmod(0o644)
    found = machine.check_secret(path, is_needed=True)
    assert "has mode 0644" in found.sentence
    assert found.advice == f"chmod 600 {path}"
    path.chmod(0o600)
    assert machine.check_secret(path, is_needed=True).state == "ok"


def test_interfaces() -> None:
    by_name, mtus = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}, {"lo": 65536, "eth0": 9000}

    def judge(resolved: str | None, joined: bool = True, **environment: str) -> Finding:
        (found,) = machine.judge_interfaces(by_name, mtus, resolved, environment, is_joined=joined)
        return found

    assert judge("10.0.0.5").sentence == "gloo listens at 10.0.0.5 (eth0, MTU 9000)"
    assert judge("127.0.0.1").state == "warning"
    assert judge("127.0.0.1", joined=False).state == "ok"
    assert judge("127.0.0.1", GLOO_SOCKET_IFNAME="eth0").state == "ok"
    assert judge("10.0.0.5", NCCL_SOCKET_IFNAME="ib0").state == "problem"
    assert judge("10.0.0.5", NCCL_SOCKET_IFNAME="=eth0").state == "ok"
    assert judge("10.0.0.5", NCCL_SOCKET_IFNAME="^docker").state == "ok"
    assert judge("10.9.9.9").state == "warning"
    assert judge(None).state == "warning"
    assert "problem" not in states(machine.check_interfaces({}, is_joined=False))


def test_rates_of_another_torch_are_told(tmp_path: Path) -> None:
    for number, content in enumerate(
        ['{"facts": {"torch": "1"}}', '{"facts": {"torch": "2"}}', ""]
    ):
        (tmp_path / f"profile-{number}.json").write_text(content)
    found = machine.check_profiles(tmp_path, "2")
    assert found.state == "ok"
    assert "3 files of measured rates" in found.sentence
    assert "2 are damaged or of another torch" in found.sentence


def test_two_ranks_meet_and_exchange() -> None:
    """The real thing, over gloo."""
    found = links.check_ring(0)
    assert found.state in ("ok", "warning"), found
    assert "exchange 32 MiB over gloo at" in found.sentence


def test_a_ring_that_is_slow_or_wrong() -> None:
    good = {"bytes_per_s": 1e9, "is_right": True}
    assert links.judge_ring(good, good, "cpu").state == "ok"
    assert links.judge_ring(good, good | {"bytes_per_s": 1e6}, "cpu").state == "warning"
    assert links.judge_ring(good, good | {"is_right": False}, "cuda").state == "problem"


def ray_facts(**changes: Any) -> dict[str, Any]:
    facts = {"address": None, "start_s": 3.0, "gpus": 2.0, "free_gpus": 2.0, "num_ranks": 2}
    return facts | {"hosts": [HOST], "links": []} | changes


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "auto", ["ok"]),
        ({"num_ranks": 4}, "auto", ["problem"]),
        ({"num_ranks": 4}, "cpu", ["ok"]),
        ({"gpus": 0.0, "num_ranks": 4}, "auto", ["ok"]),
        ({"gpus": 0.0}, "cuda", ["problem"]),
        ({"free_gpus": 1.0}, "auto", ["warning"]),
        ({"address": "h:1"}, "auto", ["ok", "warning"]),
        ({"hosts": [HOST, HOST | {"name": "b", "torch": "2.12"}]}, "auto", ["ok", "problem"]),
        ({"hosts": [HOST, HOST | {"name": "b", "code": "2"}]}, "auto", ["ok", "problem"]),
        ({"hosts": [HOST, HOST | {"name": "b", "offset_s": -4.0}]}, "auto", ["ok", "warning"]),
        ({"links": [{"hosts": ["a", "b"], "error": "no route"}]}, "auto", ["ok", "problem"]),
        (
            {"links": [{"hosts": ["a", "b"], "bytes_per_s": 1e7, "is_right": True}]},
            "auto",
            ["ok", "warning"],
        ),
        (
            {"links": [{"hosts": ["a", "b"], "bytes_per_s": 1e9, "is_right": False}]},
            "auto",
            ["ok", "problem"],
        ),
    ],
)
def test_ray(changes: dict[str, Any], device: str, expected: list[str]) -> None:
    found = ray_cluster.judge_ray(ray_facts(**changes), device=device, environment={})
    assert states(found) == expected


def test_a_cluster_with_a_token_is_not_warned_of() -> None:
    facts = ray_facts(address="h:1")
    found = ray_cluster.judge_ray(facts, device="auto", environment={"RAY_AUTH_MODE": "token"})
    assert states(found) == ["ok"]


def look_at(model: Path) -> dict[str, Any]:
    return checkpoint_facts(model, "auto", "auto", None)


def test_checkpoints(tmp_path: Path) -> None:
    """Weights that are cut off or not there; a tokenizer that is not there; a wrong family."""
    model = write_llama_checkpoint(tmp_path / "m")
    facts = probe("checkpoint", str(model), "auto", "auto", "0", limit_s=120)
    assert facts == look_at(model) | {"free_bytes": facts["free_bytes"]}
    assert states(checkpoint.judge_checkpoint(facts)) == ["ok", "ok", "warning"]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4

    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (model / "tokenizer.json").write_text("{")
    found = checkpoint.judge_checkpoint(look_at(model))
    assert states(found) == ["ok", "problem", "problem"]
    weights.unlink()
    assert "No checkpoint" in checkpoint.judge_checkpoint(look_at(model))[1].sentence
    edit_json(model / "config.json", architectures=["MambaForCausalLM"])
    assert states(checkpoint.judge_checkpoint(look_at(model))) == ["problem"]


@pytest.mark.parametrize(
    ("changes", "ranks", "state"),
    [
        ({}, 1, "ok"),
        ({"max_model_len": 100}, 1, "warning"),
        ({"max_model_len": 100, "is_len_asked": True}, 1, "problem"),
        ({"max_model_len": 100, "is_len_asked": True}, 4, "ok"),
        ({"weights_bytes": 100 * GiB}, 4, "problem"),
    ],
)
@pytest.mark.parametrize("gpus", [[GPU] * 4, []])
def test_memory(changes: dict[str, Any], ranks: int, state: str, gpus: list[Any]) -> None:
    """A GPU of 80 GiB, 70 of them free, of which 62 may be used; or as much for each CPU rank."""
    facts = {
        "weights_bytes": 10 * GiB,
        "kv_bytes_per_token": GiB if gpus else GiB // 2,
        "max_model_len": 20,
        "is_len_asked": False,
        "free_bytes": 31 * GiB * ranks,
    } | changes
    found = checkpoint.judge_memory(
        facts,
        gpus,
        num_ranks=ranks,
        device="auto",
        gpu_memory_utilization=0.9,
        is_local=True,
    )
    assert found.state == state, found


def test_a_check_that_fails_or_hangs_ends_no_other() -> None:
    def fail() -> Finding:
        raise OSError("the disk is gone")

    never = threading.Event()

    def hang() -> Finding:
        never.wait()
        return ok("x", "y")

    assert states(bounded("x", fail)) == ["warning"]
    start_s = time.monotonic()
    (found,) = bounded("x", hang, limit_s=0.1)
    assert found.state == "problem"
    assert time.monotonic() - start_s < 5
    never.set()


BROKEN = {
    "torch": "raise OSError('libcudart.so.13: no such file')",
    "ray": "raise ImportError('x')",
}


def test_the_doctor_works_where_torch_and_ray_do_not(tmp_path: Path) -> None:
    """In a process whose torch and Ray cannot be imported; it says so, and checks the rest."""
    for name, line in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
    path = os.pathsep.join([str(tmp_path), str(software.ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stderr
    told = {each["name"]: each for each in json.loads(run.stdout)["findings"]}
    assert "libcudart.so.13" in told["torch"]["sentence"]
    assert "ImportError: x" in told["ray"]["sentence"]
    assert told["shared memory"]["state"] == "ok"
    assert "ring" not in told


def test_a_wrong_key_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `key=value` may stand where MODEL does. What needs Ray is left out here."""
    monkeypatch.setattr(command.Doctor, "_check_ray", lambda self: [])
    monkeypatch.setattr(links, "check_ring", lambda gpus: [])
    assert main(["doctor", "ring.algoritm=x"]) == 1
    printed = capsys.readouterr().out
    assert "problem  configuration: unknown key 'ring.algoritm'; did you mean" in printed
    assert "\n         -> see configs/schema.py" in printed
    assert "1 problems, " in printed


def test_probes_that_fail_say_why() -> None:
    with pytest.raises(ProbeFailed, match="no end after 0 s"):
        probe("torch", limit_s=0)
    with pytest.raises(ProbeFailed, match=r"no Ray cluster at 127\.0\.0\.1:9"):
        probe("ray", "127.0.0.1:9", "1", limit_s=120)


def test_sizes_and_digests(tmp_path: Path) -> None:
    assert [gib(n) for n in (GiB * 3 / 2, GiB / 32)] == ["1.5 GiB", "32 MiB"]
    (tmp_path / "models").mkdir()
    empty = code_digest(tmp_path)
    (tmp_path / "models" / "x.py").write_text("x = 1")
    assert code_digest(tmp_path) != empty
