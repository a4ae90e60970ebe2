"""How many ranks go where, and which number each gets."""

import itertools
import time
from typing import Any, Literal

import pytest

from actors.errors import PlacementError
from actors.placement import (
    HOST_LABEL,
    Host,
    alive_hosts,
    number_ranks,
    settle_shares,
    share_out,
    shares_once_there,
)


def hosts(*gpus: int) -> list[Host]:
    """Return hosts with these numbers of GPUs, their names in order."""
    return [
        Host(node_id=f"node{i}", name=f"10.0.0.{i}", gpus=count) for i, count in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    ("num_hosts", "num_ranks", "expected"),
    [
        (1, 1, [1]),
        (1, 5, [5]),
        (2, 4, [2, 2]),
        (3, 8, [3, 3, 2]),
        (4, 2, [1, 1]),
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_ranks_on_cpu_are_spread_evenly(
    num_hosts: int, num_ranks: int, expected: list[int]
) -> None:
    """Memory and cores are what counts there, and every host has some."""
    assert share_out(hosts(*[0] * num_hosts), num_ranks, "cpu") == expected


@pytest.mark.parametrize(
    ("gpus", "num_ranks", "expected"),
    [
        ([8], 1, [1]),
        ([8], 8, [8]),
        ([8, 8], 8, [8]),
        ([8, 8], 9, [8, 1]),
        ([2, 8, 4], 9, [8, 1]),
        ([2, 8, 4], 14, [8, 4, 2]),
        ([0, 1, 0, 1], 2, [1, 1]),
    ],
)
def test_ranks_on_cuda_use_as_few_hosts_as_possible(
    gpus: list[int], num_ranks: int, expected: list[int]
) -> None:
    """Links inside a host are faster; each rank has a GPU of its own, a head node has none."""
    assert share_out(hosts(*gpus), num_ranks, "cuda") == expected


@pytest.mark.parametrize(("gpus", "total"), [([2, 1, 0], 3), ([0, 0, 0], 0)])
def test_more_ranks_than_gpus_are_refused(gpus: list[int], total: int) -> None:
    """At once and with the numbers, where Ray would wait for GPUs to appear."""
    message = (
        rf"^context_parallel_size is 4, but the Ray cluster has {total} GPUs on 3 nodes: lower it,"
        " add GPUs, or pass --device cpu$"
    )
    with pytest.raises(PlacementError, match=message):
        share_out(hosts(*gpus), 4, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_rank_is_lost(device: Literal["cpu", "cuda"]) -> None:
    """Shares add up, and a bundle is never empty: Ray refuses one."""
    for gpus in itertools.product([1, 3], repeat=3):
        for num_ranks in range(1, sum(gpus) + 1):
            shares = share_out(hosts(*gpus), num_ranks, device)
            assert sum(shares) == num_ranks
            assert min(shares) >= 1
            assert len(shares) <= len(gpus)


def test_neighbours_in_the_ring_share_a_host() -> None:
    """Then only as many links as there are hosts cross the network."""
    places = number_ranks([2, 1, 3], hosts(0, 0, 0))

    assert [place.rank for place in places] == [0, 1, 2, 3, 4, 5]
    assert [place.bundle for place in places] == [0, 0, 1, 2, 2, 2]
    assert [place.host for place in places] == [f"10.0.0.{i}" for i in (0, 0, 1, 2, 2, 2)]
    assert [place.ranks_on_host for place in places] == [2, 2, 1, 3, 3, 3]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_numbering_does_not_depend_on_the_order_of_bundles(order: tuple[int, ...]) -> None:
    """Ray lists them in no stable order, but a restart must number the same ranks alike."""
    shares, nodes = [2, 1, 3], hosts(0, 0, 0)
    expected = [(place.rank, place.host) for place in number_ranks(shares, nodes)]

    places = number_ranks([shares[i] for i in order], [nodes[i] for i in order])

    assert [(place.rank, place.host) for place in places] == expected
    # The bundle of each is still the one on that host.
    assert [nodes[order[place.bundle]].name for place in places] == [host for _, host in expected]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_alike_bundles_get_their_shares_by_name(order: tuple[int, ...]) -> None:
    """Three hosts for five CPU ranks: which host has one rank only is no matter of chance."""
    nodes = hosts(0, 0, 0)

    settled = settle_shares([2, 1, 2], [nodes[i] for i in order])

    assert [settled[order.index(i)] for i in range(3)] == [2, 2, 1]


def test_hosts_of_one_name_are_ordered_by_node() -> None:
    """Two Ray nodes on one machine share its address."""
    nodes = [Host(node_id=node_id, name="127.0.0.1", gpus=0) for node_id in ("b", "a")]

    assert [place.bundle for place in number_ranks([1, 1], nodes)] == [1, 0]


def node(node_id: str, address: str, **changes: Any) -> dict[str, Any]:
    """Return a node as `ray.nodes` describes it."""
    return {
        "NodeID": node_id,
        "NodeManagerAddress": address,
        "Alive": True,
        "Resources": {"CPU": 8.0, "memory": 1e9},
        "Labels": {},
        **changes,
    }


def test_label_of_a_host_comes_before_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods get new addresses when they come back; their label is what stays."""
    nodes = [
        node("n0", "10.0.0.1", Labels={HOST_LABEL: "ring-b", "other": "x"}),
        node("n1", "10.0.0.2", Labels={HOST_LABEL: "ring-a"}),
        node("n2", "10.0.0.3", Labels={"other": "x"}),
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)

    found = alive_hosts()

    assert [host.name for host in found] == ["ring-b", "ring-a", "10.0.0.3"]
    assert [place.bundle for place in number_ranks([1, 1, 1], found)] == [2, 1, 0]


def test_only_living_hosts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray goes on listing the dead; an old Ray has no labels, and a CPU node no GPU entry."""
    unlabelled = node("n2", "10.0.0.3", Resources={"GPU": 4.0})
    del unlabelled["Labels"]
    nodes = [node("n0", "10.0.0.1"), node("n1", "10.0.0.2", Alive=False), unlabelled]
    monkeypatch.setattr("ray.nodes", lambda: nodes)

    assert alive_hosts() == [
        Host(node_id="n0", name="10.0.0.1", gpus=0),
        Host(node_id="n2", name="10.0.0.3", gpus=4),
    ]


def test_gpus_that_are_still_to_come_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a Ray cluster comes up, its first nodes are there minutes before those with GPUs."""
    seen = iter([hosts(0), hosts(0, 4), hosts(0, 4, 4)])
    monkeypatch.setattr("actors.placement.alive_hosts", lambda: next(seen))
    monkeypatch.setattr("actors.placement.POLL_S", 0.01)
    assert shares_once_there(8, "cuda", timeout_s=10.0) == [4, 4]


def test_gpus_that_do_not_come_are_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.placement.alive_hosts", lambda: hosts(0, 4))
    start_s = time.monotonic()
    for timeout_s in (0.0, 0.2):
        with pytest.raises(PlacementError, match="8, but the Ray cluster has 4 GPUs on 2 nodes"):
            shares_once_there(8, "cuda", timeout_s)
    assert 0.2 <= time.monotonic() - start_s < 2.0
