"""The KV store over Ray: conversations come back from every tier, whatever becomes of a store."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import LLM, RequestOutput, SamplingParams
from cluster.__main__ import main
from tests.certificates import write_certificates
from tests.oracle import assert_greedy

MiB = 2**20
BLOCK_TOKENS = 64
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
SHARED_MEMORY = Path("/dev/shm")
ADDRESS = ("--address", "that which this process has joined")


def open_llm(checkpoint: Path, num_ranks: int, *more: str) -> LLM:
    """Return a cluster with a store; all its prompts are sharded."""
    overrides = [
        f"kv_store.host_memory_bytes={64 * MiB}",
        f"kv_store.block_tokens={BLOCK_TOKENS}",
        f"kv_store.restore_min_tokens={BLOCK_TOKENS}",
        "ring.algorithm=pass_kv",
        "restore.method=load",  # of a model this small all would be recomputed
        *more,
    ]
    return LLM(checkpoint, context_parallel_size=num_ranks, overrides=overrides)


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, count).tolist()


def ask(llm: LLM, prompt: list[int], salt: str = "a") -> RequestOutput:
    return llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, GREEDY)[0]


def evict(llm: LLM) -> None:
    """Give up what the device holds, once what is finished has reached the store."""
    seen: list[int] = []

    def is_settled() -> bool:
        stats = llm.kv_stats().values()
        seen.append(sum(each["host"]["stored"] for each in stats))
        is_idle = not any(each["host"]["leases"] or each["disk"].get("queued", 0) for each in stats)
        return is_idle and seen[-1] > 0 and seen[-3:] == 3 * seen[-1:]

    wait_until(is_settled)
    llm.reset_prefix_cache()


def wait_until(condition: Callable[[], bool], limit_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "still not true"
        time.sleep(0.1)


def arenas(pid: int) -> list[Path]:
    """Return the arena of the store that is, or was, this process."""
    return list(SHARED_MEMORY.glob(f"ringspan-{os.getuid()}-*-{pid}.arena"))


def store_pid(llm: LLM) -> int:
    (stats,) = llm.kv_stats().values()
    pid: int = stats["host"]["pid"]
    return pid


def kv_command(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Return what ``ringspan kv`` prints for programs."""
    capsys.readouterr()
    assert main(["kv", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)[arguments[0]]


@dataclasses.dataclass
class Stored:
    """A conversation that a cluster of one rank, closed by now, left on disk."""

    directory: Path
    turn: list[int]
    pid: int  # of the store that wrote it


@pytest.fixture(scope="module")
def stored(shared_ray: None, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("disk")
    prompt = tokens(1, 500)
    with open_llm(llama, 1, f"kv_store.disk_directory={directory}") as llm:
        answer = ask(llm, prompt).outputs[0].token_ids
        pid = store_pid(llm)
        assert len(arenas(pid)) == 1
    return Stored(directory, [*prompt, *answer, *tokens(2, 40)], pid)


@pytest.fixture(scope="module")
def llm(stored: Stored, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A cluster of two ranks, started on what is on disk."""
    directory = tmp_path_factory.mktemp("again") / "disk"
    shutil.copytree(stored.directory, directory)
    with open_llm(llama, 2, f"kv_store.disk_directory={directory}") as llm:
        yield llm


def test_an_evicted_conversation_comes_back_from_host_memory(llm: LLM, llama: Path) -> None:
    """With the tokens it would have had, and told so in every form."""
    prompt = tokens(3, 500)
    turn = [*prompt, *ask(llm, prompt).outputs[0].token_ids, *tokens(4, 40)]
    evict(llm)
    output = ask(llm, turn)

    # The answer's last token was never computed.
    restored_tokens = 519 // BLOCK_TOKENS * BLOCK_TOKENS
    assert output.num_cached_tokens == restored_tokens
    assert output.restored is not None
    assert output.restored.tokens_by_tier == {"host": restored_tokens}
    assert (
        f"restored {restored_tokens} tokens: {restored_tokens} from host"
        in (output.explain().splitlines()[1])
    )
    told = json.loads(json.dumps(dataclasses.asdict(output)))
    assert told["restored"]["tokens"] == restored_tokens
    assert_greedy(llama, turn, output.outputs[0].token_ids)


def test_what_was_cleared_does_not_come_back(llm: LLM, llama: Path) -> None:
    """One tenant's is gone from memory; the other's is still there."""
    prompt = tokens(5, 300)
    for salt in ("cleared", "kept"):
        ask(llm, prompt, salt)
    evict(llm)
    (cleared,) = llm.kv_clear("cleared").values()
    outputs = [ask(llm, prompt, salt) for salt in ("cleared", "kept")]

    assert cleared["host"]["cleared"] > 0
    assert [output.num_cached_tokens for output in outputs] == [0, 256]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert_greedy(llama, prompt, outputs[0].outputs[0].token_ids)


def test_the_command_sees_the_stores_of_all_clusters(
    llm: LLM, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two clusters on one Ray and one host: each store has a name of its own."""
    ask(llm, tokens(6, 200))
    evict(llm)
    with open_llm(llama, 1) as other:
        pids = {store_pid(llm), store_pid(other)}
        stats = kv_command(capsys, "stats", *ADDRESS)
        told = [of for cluster in stats.values() for of in cluster.values()]
    assert {each["host"]["pid"] for each in told} == pids

    verified = kv_command(capsys, "verify", *ADDRESS)
    assert len(verified) == 1
    (counts,) = next(iter(verified.values())).values()
    assert counts["host"]["good"] > 0
    assert counts["host"]["bad"] == 0
    assert llm.kv_verify() == next(iter(verified.values()))


def test_a_conversation_survives_a_restart_on_disk(stored: Stored, llm: LLM, llama: Path) -> None:
    """Written by one rank, and gone on with by two; the first store left no arena behind."""
    output = ask(llm, stored.turn)

    assert arenas(stored.pid) == []
    assert output.num_cached_tokens == 512
    assert output.restored is not None
    assert output.restored.tokens_by_tier == {"disk": 512}
    assert_greedy(llama, stored.turn, output.outputs[0].token_ids)


def test_a_flipped_bit_on_disk_is_found(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 1 once; the bad file is gone then."""
    directory = tmp_path / "copy"
    shutil.copytree(stored.directory, directory)
    path = sorted(directory.rglob("*.arrow"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)

    arguments = ("verify", "--disk-directory", str(directory))
    ((told,),) = [of.values() for of in kv_command(capsys, *arguments, status=1).values()]
    assert told["disk"]["bad"] == 1
    ((told,),) = [of.values() for of in kv_command(capsys, *arguments).values()]
    assert told["disk"]["bad"] == 0
    assert not path.exists()


@pytest.mark.parametrize(
    "kill", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.campaign)]
)
def test_a_lost_store_costs_no_answer(shared_ray: None, llama: Path, kill: signal.Signals) -> None:
    """Lost while it is asked, read and written: all requests end, with the right tokens.

    What its process leaves in shared memory goes with the next start.
    """
    prompts = [tokens(seed, 900) for seed in range(10, 16)]
    with open_llm(llama, 2, "kv_store.timeout_s=1") as llm:
        for prompt in prompts[:3]:
            ask(llm, prompt)
        evict(llm)
        pid = store_pid(llm)
        killer = threading.Timer(0.1, os.kill, (pid, kill))
        killer.start()
        start_s = time.perf_counter()
        asked = [{"prompt_token_ids": prompt, "cache_salt": "a"} for prompt in prompts]
        answers = [llm.generate(asked, GREEDY) for _ in range(3)][-1]
        llm.reset_prefix_cache()
        again = llm.generate(asked, GREEDY)
        assert time.perf_counter() - start_s < 60
        killer.join()
        (stats,) = llm.status()["kv_store"].values()
        assert stats is None
    for prompt, *outputs in zip(prompts, answers, again, strict=True):
        for output in outputs:
            assert_greedy(llama, prompt, output.outputs[0].token_ids)

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # a stopped one does not end when Ray asks it to
    with open_llm(llama, 1):
        assert arenas(pid) == []


def test_the_command_clears_running_stores(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and disk, so it is the last test that shares this cluster."""
    ask(llm, tokens(7, 200))
    evict(llm)
    kv_command(capsys, "clear", *ADDRESS)
    (left,) = llm.kv_stats().values()

    assert left["host"]["pieces"] == left["disk"]["files"] == 0


# A Ray of two nodes needs a driver of its own.
TWO_HOSTS = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from actors.placement import HOST_LABEL
from tests.integration.test_kv_store import ask, evict, open_llm, tokens

node = dict(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
cluster = Cluster(True, head_node_args={**node, "labels": {HOST_LABEL: "a"}})
cluster.add_node(**node, labels={HOST_LABEL: "b"})
address = f"ray.address={cluster.address}"
with open_llm(sys.argv[1], 2, address, "device=cpu", *sys.argv[2:]) as llm:
    prompt = tokens(1, 500)
    turn = [*prompt, *ask(llm, prompt).outputs[0].token_ids, *tokens(2, 40)]
    evict(llm)
    output = ask(llm, turn)
    print(json.dumps([turn, output.outputs[0].token_ids, output.restored.tokens_by_tier]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.campaign
@pytest.mark.parametrize("with_tls", [False, True])
def test_pieces_of_another_host_come_by_flight(llama: Path, tmp_path: Path, with_tls: bool) -> None:
    """Each of two hosts wrote half of every block, and needs whole ones."""
    overrides = []
    if with_tls:
        files = write_certificates(tmp_path / "tls", "stores.ringspan")
        overrides = [
            f"kv_store.ssl_certfile={files.cert}",
            f"kv_store.ssl_keyfile={files.key}",
            f"kv_store.ssl_ca_certs={files.ca}",
            "kv_store.ssl_server_name=stores.ringspan",
        ]
    run = subprocess.run(
        [sys.executable, "-c", TWO_HOSTS, str(llama), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )
    assert run.returncode == 0, run.stderr
    turn, answer, tiers = json.loads(run.stdout.splitlines()[-1])

    assert sum(tiers.values()) == 512
    assert tiers.keys() == {"host", "remote"}
    assert_greedy(llama, turn, answer)
