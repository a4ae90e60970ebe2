"""A short measurement gives rates that all ranks share and that price what was measured."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import profiler, stopwatch
from models.cost import SequenceShape, price_decode, price_prefill
from models.rates import Rates, model_shape
from tests.checkpoints import write_llama_checkpoint
from tests.thread_cluster import ThreadCluster


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[1, 3])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ThreadCluster]:
    with ThreadCluster(checkpoint, request.param) as threads:
        yield threads


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "SIZES", (1, 16, 64, 256, 1024))
    monkeypatch.setattr(stopwatch, "LONGEST_RUN_S", 0.02)
    monkeypatch.setattr(stopwatch, "REPEATS", 2)
    monkeypatch.setattr(profiler, "LARGE_BYTES", 2**18)


def profiled(cluster: ThreadCluster) -> list[Rates]:
    """Return what every rank measured."""
    return cluster.ranks.run(lambda ring: cluster.workers[ring.rank].profile())


@pytest.mark.usefixtures("quick")
def test_all_ranks_have_the_same_rates(cluster: ThreadCluster) -> None:
    """They may be written down by any of them, and all choose alike."""
    first, *others = profiled(cluster)

    assert all(rates == first for rates in others)
    assert Rates.from_json(first.to_json()) == first
    assert first.linear(1024) > first.linear(1) > 0
    assert first.causal_key(1024) > 0
    assert first.step_s > 0


@pytest.mark.usefixtures("quick")
def test_rates_price_a_step(cluster: ThreadCluster) -> None:
    """Within a factor that no noise of a busy machine explains; the accuracy is a benchmark's."""
    rates, model = profiled(cluster)[0], model_shape(cluster.config, 4)
    prompt = list(range(3, 403))
    for _ in range(2):
        cluster.add(prompt)
        steps = [results for _, results in cluster.run()]
    sequence = SequenceShape(new_tokens=len(prompt), cached_rows=(0,) * cluster.num_ranks)

    price = price_prefill("pass_kv", [sequence], model, rates, cluster.num_ranks)
    rows = (len(prompt) // cluster.num_ranks,) * cluster.num_ranks
    decode = price_decode([rows], model, rates, steps=16)

    for predicted_s, results in ((price.total_s, steps[0]), (decode.total_s, steps[1])):
        assert 1 / 10 < predicted_s / max(result.wall_s for result in results) < 10


@pytest.mark.usefixtures("quick")
def test_a_slow_model_is_measured_at_fewer_sizes(
    cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points make a law; no rank measures more than the others."""
    monkeypatch.setattr(stopwatch, "LONGEST_RUN_S", 0.0)

    rates = profiled(cluster)[0]

    assert [x for x, _ in rates.linear.points] == [1, 16]
    assert [x for x, _ in rates.causal_key.points] == [16, 64]


def test_a_ring_of_one_sends_nothing(checkpoint: Path) -> None:
    """Transfers that never happen have no price."""
    with ThreadCluster(checkpoint, 1) as alone:
        rates = profiled(alone)[0]

    assert rates.hop(2**30) < 1e-5
    assert rates.overlap == 0.0
