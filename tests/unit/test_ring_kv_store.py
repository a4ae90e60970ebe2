"""Conversations that leave the device and come back from the KV store: no token differs."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from models.kv_codec import Encoding
from models.sampling import SamplingParams
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy
from tests.thread_cluster import ThreadCluster
from tests.thread_stores import ThreadStores

GREEDY_8 = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"))


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, count).tolist()


def expected(checkpoint: Path, prompt: list[int]) -> list[int]:
    with ThreadCluster(checkpoint, 1) as alone:
        return alone.generate(prompt, GREEDY_8)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_a_conversation_comes_back_to_a_ring_of_any_size(
    checkpoint: Path, ranks: tuple[int, int]
) -> None:
    """Written by some ranks, evicted with their cluster, and gone on with by others."""
    first, then = ranks
    prompt = tokens(1, 203)
    with ThreadStores(checkpoint) as stores:
        with ThreadCluster(checkpoint, first, stores=stores, page_tokens=32, shares=True) as ring:
            answer = ring.generate(prompt, GREEDY_8)
            ring.flush()
        prompt = prompt + answer + tokens(2, 30)
        with ThreadCluster(checkpoint, then, stores=stores, page_tokens=32, shares=True) as ring:
            generation = ring.add(prompt, GREEDY_8)
            ring.run()
            ring.check_invariants()

    assert generation.num_cached_tokens == 208
    assert generation.token_ids == expected(checkpoint, prompt)


def test_what_the_pool_had_no_room_for_comes_back(checkpoint: Path) -> None:
    """Eviction from the device loses nothing: the first of five conversations goes on."""
    prompts = [tokens(seed, 180) for seed in range(5)]
    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(
            checkpoint, 2, stores=stores, page_tokens=16, num_pages=16, shares=True
        ) as ring,
    ):
        answers = [ring.generate(prompt, GREEDY_8) for prompt in prompts]
        ring.flush()
        again = prompts[0] + answers[0] + tokens(9, 20)
        generation = ring.add(again, GREEDY_8)
        ring.run()
        ring.check_invariants()
        ring.flush()
        stores.check_all_returned()

    assert generation.num_cached_tokens == 176
    assert generation.token_ids == expected(checkpoint, again)


def test_disk_survives_a_restart_of_everything(checkpoint: Path, tmp_path: Path) -> None:
    """Another process with the same secret and weights goes on; the arena is new and empty."""
    prompt = tokens(1, 130)
    with (
        ThreadStores(checkpoint, disk_directory=tmp_path) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        prompt += ring.generate(prompt, GREEDY_8)
        ring.flush()
    with (
        ThreadStores(checkpoint, disk_directory=tmp_path) as stores,
        ThreadCluster(checkpoint, 3, stores=stores, shares=True) as ring,
    ):
        generation = ring.add(prompt, GREEDY_8)
        ring.run()

    assert generation.num_cached_tokens == 128
    ((stored, _),) = generation.restored
    assert stored.tokens_by_tier == {"disk": 128}
    assert generation.token_ids == expected(checkpoint, prompt)


def test_pieces_of_two_hosts_make_one_block(checkpoint: Path) -> None:
    """Ranks of two hosts wrote each block; each host fetches by Flight what the other has."""
    prompt = tokens(1, 130)
    with ThreadStores(checkpoint, num_hosts=2) as stores:
        with ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring:
            prompt += ring.generate(prompt, GREEDY_8)
            ring.flush()
        with ThreadCluster(checkpoint, 4, stores=stores, shares=True) as ring:
            generation = ring.add(prompt, GREEDY_8)
            ring.run()

    assert generation.num_cached_tokens == 128
    ((stored, _),) = generation.restored
    assert stored.tokens_by_tier.keys() == {"host", "remote"}
    assert generation.token_ids == expected(checkpoint, prompt)


def test_tenants_share_nothing(checkpoint: Path) -> None:
    """The same prompt under another salt is computed anew, and is found by neither's keys."""
    prompt = tokens(1, 130)
    with ThreadStores(checkpoint) as stores:
        with ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring:
            ring.add(prompt, GREEDY_8, salt="a")
            ring.run()
            ring.flush()
        with ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring:
            other = ring.add(prompt, GREEDY_8, salt="b")
            same = ring.add(prompt, GREEDY_8, salt="a")
            ring.run()

    assert (other.num_cached_tokens, same.num_cached_tokens) == (0, 128)
    assert other.token_ids == same.token_ids


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pieces_are_computed_again(checkpoint: Path, seed: int) -> None:
    """A flipped bit anywhere in the arena: the answer is right, and the piece is dropped."""
    prompt = tokens(1, 130)
    with ThreadStores(checkpoint) as stores:
        with ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring:
            prompt += ring.generate(prompt, GREEDY_8)
            ring.flush()
        stores.flip_bits(np.random.default_rng(seed), 3)
        with ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring:
            generation = ring.add(prompt, GREEDY_8)
            ring.run()
            ring.flush()  # what was computed anew is being written, under leases
            ring.check_invariants()
        dropped = sum(store.stats()["host"]["dropped"] for store in stores.stores)
        stores.check_all_returned()

    assert dropped > 0
    assert generation.token_ids == expected(checkpoint, prompt)


@pytest.mark.parametrize("encoding", ["int8", "fp8", "int4"])
def test_lossy_tiers_have_a_class_of_their_own(
    checkpoint: Path, tmp_path: Path, encoding: Encoding
) -> None:
    """Quantised blocks come back to who asked for them; a lossless cluster never finds them."""
    prompt = tokens(1, 130)
    with (
        ThreadStores(checkpoint, disk_directory=tmp_path, dtypes={"host": encoding}) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        prompt += ring.generate(prompt, GREEDY_8)
        ring.flush()
        ring.cache.clear()
        lossy = ring.add(prompt, GREEDY_8)
        ring.run()
    with (
        ThreadStores(checkpoint, disk_directory=tmp_path) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        exact = ring.add(prompt, GREEDY_8)
        ring.run()

    assert lossy.num_cached_tokens == 128
    assert len(lossy.token_ids) == 8
    assert exact.num_cached_tokens == 0
    assert exact.token_ids == expected(checkpoint, prompt)


def test_lossy_disk_and_lossy_way_between_hosts(checkpoint: Path, tmp_path: Path) -> None:
    """Quantised on disk or under way only: what comes back is of that encoding."""
    prompt = tokens(1, 130)
    dtypes: dict[str, Encoding] = {"remote": "int8", "disk": "fp8"}
    with (
        ThreadStores(checkpoint, num_hosts=2, disk_directory=tmp_path, dtypes=dtypes) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        prompt += ring.generate(prompt, GREEDY_8)
        ring.flush()
        ring.cache.clear()
        near = ring.add(prompt, GREEDY_8)
        ring.run()
    with (
        ThreadStores(checkpoint, num_hosts=2, disk_directory=tmp_path, dtypes=dtypes) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        far = ring.add(prompt, GREEDY_8)
        ring.run()

    ((near_stored, _),), ((far_stored, _),) = near.restored, far.restored
    assert {part.lease.piece.encoding for part in near_stored.parts} == {"raw", "int8"}
    assert {part.lease.piece.encoding for part in far_stored.parts} == {"fp8"}
    assert near.num_cached_tokens == far.num_cached_tokens == 128


class Broken:
    """A store whose process is gone."""

    def __getattr__(self, name: str) -> object:
        raise ConnectionError("the store is gone")


def test_a_lost_store_costs_no_answer(checkpoint: Path) -> None:
    """Lost while blocks are written: requests end with the right tokens."""
    prompt = tokens(1, 130)
    with (
        ThreadStores(checkpoint) as stores,
        ThreadCluster(checkpoint, 2, stores=stores, shares=True) as ring,
    ):
        first = ring.generate(prompt, GREEDY_8)
        for worker in ring.workers:
            assert worker._executor.store is not None
            worker._executor.store.writer._client._store = cast(Any, Broken())
        assert ring.finder is not None
        for handle in ring.finder._stores.values():
            cast(Any, handle)._store = Broken()
        ring.cache.clear()
        again = ring.generate(prompt, GREEDY_8)
        assert all(worker.flush_store(5.0) for worker in ring.workers)

    assert first == again == expected(checkpoint, prompt)


def damage_files(directory: Path, rng: np.random.Generator) -> None:
    """Damage some files of a disk tier: a flipped bit, a cut, an empty file, another's bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in rng.choice(np.array(files), 3):
        data = bytearray(path.read_bytes())
        kind = rng.integers(0, 4)
        if kind == 0:
            at = int(rng.integers(0, max(1, len(data))))
            data[at : at + 1] = bytes([data[at] ^ 1 << int(rng.integers(0, 8))]) if data else b""
        elif kind == 1:
            data = data[: int(rng.integers(0, len(data) + 1))]
        elif kind == 2:
            data = bytearray()
        else:
            data = bytearray(Path(rng.choice(np.array(files))).read_bytes())
        path.write_bytes(data)


def check_faults(checkpoint: Path, directory: Path, seed: int) -> None:
    """Write conversations, damage arena or files, and go on with them on another ring."""
    rng = np.random.default_rng(seed)
    prompts = [tokens(int(rng.integers(0, 10**6)), int(rng.integers(40, 150))) for _ in range(2)]
    ranks, then = (int(count) for count in rng.integers(1, 4, 2))
    on_disk = bool(rng.integers(0, 2))
    with ThreadStores(checkpoint, disk_directory=directory) as stores:
        with ThreadCluster(checkpoint, ranks, stores=stores, page_tokens=16, shares=True) as ring:
            answers = [ring.generate(prompt, GREEDY_8) for prompt in prompts]
            ring.flush()
        prompts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        if not on_disk:
            stores.flip_bits(rng, 5)
            go_on(checkpoint, stores, then, prompts)
    if on_disk:
        damage_files(directory, rng)
        with ThreadStores(checkpoint, disk_directory=directory) as stores:
            go_on(checkpoint, stores, then, prompts)


def go_on(checkpoint: Path, stores: ThreadStores, num_ranks: int, prompts: list[list[int]]) -> None:
    with ThreadCluster(checkpoint, num_ranks, stores=stores, page_tokens=16, shares=True) as ring:
        generations = [ring.add(prompt, GREEDY_8) for prompt in prompts]
        ring.run()
        ring.check_invariants()
        ring.flush()
    stores.check_all_returned()
    for prompt, generation in zip(prompts, generations, strict=True):
        assert_greedy(checkpoint, prompt, generation.token_ids)


@pytest.mark.parametrize("seed", range(3))
def test_faults_never_give_a_wrong_token(checkpoint: Path, tmp_path: Path, seed: int) -> None:
    """Bits, lengths and whole files, in the arena or on disk."""
    check_faults(checkpoint, tmp_path, seed)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_faults_never_give_a_wrong_token(checkpoint: Path, tmp_path: Path, seed: int) -> None:
    """The same, more often."""
    check_faults(checkpoint, tmp_path, seed)


def check_conversations(checkpoint: Path, directory: Path, count: int, held: int) -> None:
    """Have ``count`` conversations through stores that hold so many, and come back to some."""
    rng = np.random.default_rng(0)
    with ThreadStores(checkpoint, block_tokens=16) as probe:
        with ThreadCluster(checkpoint, 2, stores=probe, page_tokens=16) as ring:
            ring.generate(tokens(0, 50), GREEDY_8)
            ring.flush()
        one = probe.stores[0].stats()["host"]["used_bytes"]
    with (
        ThreadStores(
            checkpoint,
            capacity_bytes=held * one,
            disk_directory=directory,
            disk_bytes=held * one,
        ) as stores,
        ThreadCluster(
            checkpoint, 2, stores=stores, page_tokens=16, num_pages=8, shares=True
        ) as ring,
    ):
        known: list[list[int]] = []
        back = 0
        for number in range(count):
            prompt = tokens(number, 50)
            if len(known) >= held and rng.random() < 0.4:
                earlier = known[-int(rng.integers(held // 2, held * 4 // 5))]  # not on the device
                prompt = earlier + tokens(number, 5)
            generation = ring.add(prompt, GREEDY_8)
            ring.run()
            ring.check_invariants()
            back += bool(generation.restored)
            if number % max(1, count // 30) == 0:
                assert_greedy(checkpoint, prompt, generation.token_ids)
            known.append((prompt + generation.token_ids)[:60])
            host = stores.stores[0].stats()["host"]
            assert host["used_bytes"] <= host["capacity_bytes"]
        ring.flush()
        stores.check_all_returned()
        disk = stores.stores[0].stats()["disk"]
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= disk["capacity_bytes"]
    assert back > count // 20
    assert stores.stores[0].stats()["host"]["evicted"] > 0


def test_stores_keep_within_their_limits(checkpoint: Path, tmp_path: Path) -> None:
    """Forty conversations through memory and disk for twelve each: all leases come back."""
    check_conversations(checkpoint, tmp_path, 40, 12)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_thousand_conversations_keep_within_the_limits(checkpoint: Path, tmp_path: Path) -> None:
    """A thousand, through memory and disk for a hundred."""
    check_conversations(checkpoint, tmp_path, 1000, 100)
