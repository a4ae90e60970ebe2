"""Plans of restores: the digest's worked examples, and the best of all plans that there are."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from models.kvpr import SplitProblem, best_split
from models.restore_plan import RestorePlan, plan_restore
from models.restore_plan_cache import PlanCache
from models.restore_relaxation import relax
from models.restore_simulator import Piece, Resource, Staging, sending_order, simulate
from models.restore_ways import EACH_ALONE, STAGED_FIRST, Blocks, RestoreTask, Segment, Way


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, as one layer's widths; ``feed_forward`` counts all its matrices' columns."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int

    @property
    def kv_width(self) -> int:
        return self.kv_heads * 128


OPT = Shape(32, 4096, 32, 32, 2 * 16384)
LLAMA_3_8B = Shape(32, 4096, 32, 8, 3 * 14336)
H200 = {"gemm": 700e12, "prefill": 525e12, "memory": 4.3e12}
EXTRA_BITS = {"int8": 8.125, "int4": 4.5}  # codes and, of 4 bits, scale and offset of 64


def h200_segments(
    shape: Shape,
    tokens: int,
    link_bytes_per_s: float,
    names: Sequence[str] = ("kv", "activations", "ids"),
    *,
    count: int = 64,
    network_bytes_per_s: float | None = None,
    remote: int = 0,
) -> list[Segment]:
    """A prompt on an H200, its first ``remote`` segments in another host's memory."""
    size = tokens // count
    segments = []
    for index in range(count):
        stored = [
            _stored(shape, name, link_bytes_per_s, network_bytes_per_s if index < remote else None)
            for name in names
            if name != "ids"
        ]
        attention = 4 * shape.heads * 128 * (index + 0.5) * size
        linear = 8 * shape.hidden * shape.heads * 128 / 2 + 4 * shape.hidden * shape.kv_width
        linear += 2 * shape.hidden * shape.feed_forward
        ids_s = shape.layers * (linear + attention) / H200["prefill"]
        ids = [Way(name="ids", seconds={"device": ids_s})] if "ids" in names else []
        segments.append(Segment(start=index * size, tokens=size, ways=(*stored, *ids)))
    return segments


def _stored(
    shape: Shape, name: str, link_bytes_per_s: float, network_bytes_per_s: float | None
) -> Way:
    kv_bytes = shape.layers * 4 * shape.kv_width
    device_s = 0.0
    num_bytes = kv_bytes * EXTRA_BITS.get(name, 16) / 16
    if name == "activations":
        num_bytes = shape.layers * 2 * shape.hidden
        flops = shape.layers * 4 * shape.hidden * shape.kv_width
        device_s = flops / H200["gemm"] + (num_bytes + kv_bytes) / H200["memory"]
    elif name != "kv":
        device_s = (num_bytes + kv_bytes) / H200["memory"]
    seconds: dict[Resource, float] = {"link": num_bytes / link_bytes_per_s, "device": device_s}
    if network_bytes_per_s:
        seconds["network"] = num_bytes / network_bytes_per_s
    return Way(name=name, tier="remote" if network_bytes_per_s else "host", seconds=seconds)


def task(layers: int = 32, **changes: Any) -> RestoreTask:
    return RestoreTask(**{"num_layers": layers, "block_tokens": 1, **changes})


def share(plan: RestorePlan, way: str) -> float:
    """The share of all tokens that comes back in a way, from whatever tier."""
    tokens = plan.tokens()
    return sum(n for (name, _), n in tokens.items() if name == way) / sum(tokens.values())


def check_whole(plan: RestorePlan, segments: Sequence[Segment], block_tokens: int) -> None:
    """Every token once, in a way that it has; ids as a prefix of whole blocks."""
    at = segments[0].start
    end = segments[-1].start + segments[-1].tokens
    for part in plan.parts:
        assert part.start == at
        assert part.tokens > 0
        at += part.tokens
        for segment in segments:
            if segment.start < at and part.start < segment.start + segment.tokens:
                assert (part.way, part.tier) in {(way.name, way.tier) for way in segment.ways}
    assert at == end
    ids = [part for part in plan.parts if part.way == "ids"]
    assert ids == list(plan.parts[: len(ids)])
    assert plan.recompute_to == segments[0].start + sum(part.tokens for part in ids)
    assert (plan.recompute_to - segments[0].start) % block_tokens == 0 or plan.recompute_to == end


@pytest.mark.parametrize(
    ("link", "milliseconds", "activations", "ids"),
    [(375e9, 2.36, 0.35, 0.0), (55e9, 9.20, 0.94, 0.06), (25e9, 16.6, 0.77, 0.23)]
    + [(11.2e9, 26.5, 0.55, 0.45), (1.1e9, 47.7, 0.10, 0.90)],
)
def test_opt_on_every_link(
    link: float, milliseconds: float, activations: float, ids: float
) -> None:
    """MHA: the slower the link, the more is projected and then recomputed."""
    segments = h200_segments(OPT, 2048, link)
    plan = plan_restore(segments, task(block_tokens=16, order="interleaved", buffers=4))
    assert plan.bound_s == pytest.approx(milliseconds * 1e-3, rel=0.01)
    assert plan.predicted_s == pytest.approx(plan.bound_s, rel=0.03)
    assert share(plan, "activations") == pytest.approx(activations, abs=0.03)
    assert share(plan, "ids") == pytest.approx(ids, abs=0.03)


@pytest.mark.parametrize(
    ("link", "milliseconds", "ids", "int8", "int4"),
    [(375e9, 34.5, 0.013, 17.7, 9.8), (55e9, 221, 0.073, 116, 65.5)]
    + [(11.2e9, 896, 0.23, 506, 298), (1.1e9, 3983, 0.67, 2831, 1962)],
)
def test_llama_3_on_every_link(
    link: float, milliseconds: float, ids: float, int8: float, int4: float
) -> None:
    """GQA: never projected; what helps is recomputing the beginning, and fewer bits."""
    names = ("kv", "activations", "ids")
    prompt: dict[str, Any] = {
        "shape": LLAMA_3_8B,
        "tokens": 100_000,
        "link_bytes_per_s": link,
        "count": 50,
    }
    plan = plan_restore(h200_segments(**prompt, names=names), task(block_tokens=250))
    assert plan.bound_s == pytest.approx(milliseconds * 1e-3, rel=0.03)
    assert plan.predicted_s == pytest.approx(plan.bound_s, rel=0.03)
    assert share(plan, "activations") == 0
    assert share(plan, "ids") == pytest.approx(ids, abs=0.01)
    for name, expected in (("int8", int8), ("int4", int4)):
        lossy = plan_restore(h200_segments(**prompt, names=(*names, name)), task(block_tokens=250))
        assert lossy.bound_s == pytest.approx(expected * 1e-3, rel=0.03)
        assert share(lossy, "kv") == 0


@pytest.mark.parametrize(("lossy", "milliseconds"), [((), 432), (("int8",), 249), (("int4",), 148)])
def test_mixed_tiers(lossy: tuple[str, ...], milliseconds: float) -> None:
    """Half on a remote host: part of it is recomputed, and fewer bits pay on the network."""
    segments = h200_segments(
        LLAMA_3_8B,
        100_000,
        55e9,
        ("kv", "ids", *lossy),
        count=50,
        remote=25,
        network_bytes_per_s=11.2e9,
    )
    relaxed = relax(Blocks(segments, 250), task(block_tokens=250, chains=EACH_ALONE))
    assert relaxed.bound_s == pytest.approx(milliseconds * 1e-3, rel=0.01)
    if not lossy:
        assert relaxed.recomputed / 400 == pytest.approx(0.13, abs=0.005)


def test_one_layer_is_the_papers_split() -> None:
    """Of kv and activations alone, the joint program finds the paper's split, by both."""
    problem = SplitProblem(
        batch=32,
        tokens=1024,
        hidden_size=7168,
        kv_width=7168,
        link_bytes_per_s=32e9,
        flops_per_s=312e12,
    )
    activations: dict[Resource, float] = {
        "link": problem.activation_s,
        "device": problem.project_s,
    }
    ways = (
        Way(name="kv", tier="host", seconds={"link": problem.kv_s}),
        Way(name="activations", tier="host", seconds=activations),
    )
    segments = [Segment(start=0, tokens=1024, ways=ways)]
    serial = plan_restore(segments, task(1, objective="serial"))
    assert serial.tokens()["activations", "host"] == pytest.approx(
        best_split(problem, "serial"), abs=1
    )
    pipelined = plan_restore(segments, task(1, order="interleaved", buffers=8))
    split = best_split(problem, "pipelined")
    assert pipelined.tokens()["activations", "host"] == pytest.approx(split, abs=24)


def random_segments(rng: random.Random, most_blocks: int = 9) -> tuple[list[Segment], RestoreTask]:
    """Some blocks: rho from 0.05 to 20, dear and cheap ids, one form or both, two tiers."""
    count, tokens = rng.randint(1, most_blocks), rng.choice([16, 256])
    kv_s = 10 ** rng.uniform(-6, -3)
    width = rng.choice([0.5, 0.5, 0.75, 1.0, 2.0])  # of activations, K and V being 1
    project_s = kv_s * 10 ** rng.uniform(-1.3, 1.3)
    ids_s, steeper = project_s * rng.uniform(2, 12), rng.uniform(0, 0.5)
    latency_s = rng.choice([0.0, kv_s * tokens * rng.uniform(0, 0.5)])
    forms = rng.choice(["both", "both", "either", "kv"])
    network_s = rng.choice([0.0, 0.0, kv_s * rng.uniform(0, 3)])
    has_ids = rng.random() < 0.8
    segments = []
    for index in range(count):
        remote = bool(network_s) and rng.random() < 0.5
        one = rng.choice(["kv", "activations"]) if forms == "either" else None
        ways = []
        for name, size, device_s in (("kv", 1.0, 0.0), ("activations", width, project_s)):
            if name == (one or name) and (forms != "kv" or name == "kv"):
                seconds: dict[Resource, float] = {"link": kv_s * size, "device": device_s}
                if remote:
                    seconds["network"] = network_s * size
                tier = "remote" if remote else "host"
                ways.append(Way(name=name, tier=tier, seconds=seconds, fixed_s={"link": latency_s}))
        if has_ids:
            ways.append(Way(name="ids", seconds={"device": ids_s * (1 + steeper * index)}))
        last = rng.randint(1, tokens) if index == count - 1 else tokens
        segments.append(Segment(start=index * tokens, tokens=last, ways=tuple(ways)))
    prompt_s = kv_s * tokens * count
    return segments, RestoreTask(
        num_layers=rng.randint(1, 6),
        suffix_s=rng.choice([0.0, prompt_s * rng.uniform(0, 1)]),
        block_tokens=tokens,
        buffers=rng.randint(1, 4),
        order=rng.choice(["activations_first", "interleaved"]),
        chains=rng.choice([EACH_ALONE, STAGED_FIRST]),
        step_s=rng.choice([0.0, prompt_s * 0.05]),
    )


def executed_s(
    task: RestoreTask, recomputed: Sequence[Segment], loaded: Sequence[tuple[Segment, Way]]
) -> float:
    """The simulated time of a choice made block by block, without the planner."""
    pieces = [
        Piece(
            link_s=way.block_s("link", segment.tokens) / task.num_layers,
            device_s=way.block_s("device", segment.tokens) / task.num_layers,
            network_s=way.block_s("network", segment.tokens),
        )
        for segment, way in loaded
    ]
    recompute_s = sum(s.ways[-1].block_s("device", s.tokens) for s in recomputed)
    staging: Staging = "whole" if task.chains == STAGED_FIRST else "piece"
    return simulate(
        sending_order(pieces, task.order, staging),
        task.num_layers,
        recompute_s=recompute_s + task.step_s * bool(recomputed),
        suffix_s=task.suffix_s,
        buffers=task.buffers,
        staging=staging,
    ).total_s


def exhaustive_s(segments: Sequence[Segment], task: RestoreTask) -> tuple[float, float]:
    """Return the time of the best plan, and of the best that uses one method alone.

    All ends of recomputing, and for each all numbers of blocks loaded as activations.
    """
    has_ids = segments[0].ways[-1].name == "ids"
    times: dict[tuple[int, int], float] = {}
    for end in range(len(segments) + 1 if has_ids else 1):
        rest = segments[end:]
        both = [segment for segment in rest if sum(w.name != "ids" for w in segment.ways) == 2]
        for activations in range(len(both) + 1):
            chosen = {segment.start for segment in both[:activations]}
            loaded = [(s, s.ways[int(s.start in chosen)]) for s in rest]
            times[end, activations] = executed_s(task, segments[:end], loaded)
    whole = max(activations for end, activations in times if end == 0)
    pure_s = min(times[0, 0], times[0, whole], times.get((len(segments), 0), math.inf))
    return min(times.values()), pure_s


def check_random_plan(rng: random.Random, most_blocks: int = 9) -> None:
    """A plan is whole, and as good as the best of all by the simulator's clock."""
    segments, asked = random_segments(rng, most_blocks)
    plan = plan_restore(segments, asked)
    check_whole(plan, segments, asked.block_tokens)
    kept = {
        segment.start: way
        for segment in segments
        for part in plan.parts
        for way in segment.ways
        if part.start <= segment.start < part.start + part.tokens
        and (way.name, way.tier) == (part.way, part.tier)
    }
    recomputed = [s for s in segments if kept[s.start].name == "ids"]
    loaded = [(s, kept[s.start]) for s in segments if kept[s.start].name != "ids"]
    actual_s = executed_s(asked, recomputed, loaded)
    best_s, pure_s = exhaustive_s(segments, asked)
    assert actual_s <= 1.10 * best_s
    assert actual_s <= 1.03 * pure_s
    assert plan.predicted_s <= min(plan.alternatives_s.values()) * (1 + 1e-9)
    assert plan.predicted_s >= plan.bound_s * (1 - 1e-6)
    for segment, way in loaded:
        others = [other for other in segment.ways if other.name == "kv"]
        if way.name == "activations" and others:
            assert way.seconds["link"] < others[0].seconds["link"]


@pytest.mark.parametrize(("cases", "most_blocks"), [(1000, 9), (50, 30)])
def test_plans_are_nearly_the_best_there_are(cases: int, most_blocks: int) -> None:
    """Within 1.10 of the exhaustive best and 1.03 of the best single method."""
    rng = random.Random(f"plans {most_blocks}")
    for _ in range(cases):
        check_random_plan(rng, most_blocks)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("cases", "most_blocks"), [(10_000, 9), (1000, 40)])
def test_plans_are_nearly_the_best_there_are_at_length(cases: int, most_blocks: int) -> None:
    """As above, more and longer prompts."""
    rng = random.Random(f"plans, campaign {most_blocks}")
    for _ in range(cases):
        check_random_plan(rng, most_blocks)


def ways_of(
    *,
    kv: dict[Resource, float] | None = None,
    activations: dict[Resource, float] | None = None,
    ids_s: float | None = None,
    tier: str = "host",
) -> tuple[Way, ...]:
    """Ways of the given costs; None: there is no such way."""
    ways = []
    if kv is not None:
        ways.append(Way(name="kv", tier=tier, seconds=kv))
    if activations is not None:
        ways.append(Way(name="activations", tier=tier, seconds=activations))
    if ids_s is not None:
        ways.append(Way(name="ids", seconds={"device": ids_s}))
    return tuple(ways)


def row(*ways: tuple[Way, ...], tokens: int = 1, start: int = 0) -> list[Segment]:
    """Segments of equal length, one after another."""
    return [
        Segment(start=start + index * tokens, tokens=tokens, ways=of)
        for index, of in enumerate(ways)
    ]


def test_nothing_to_restore_is_planned_too() -> None:
    """A prompt without stored blocks takes its own time."""
    plan = plan_restore([], task(4, suffix_s=2.0))
    assert plan.parts == ()
    assert plan.predicted_s == pytest.approx(2.0)
    assert plan.link_idle == 1.0


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("ids_s", "way"), [(0.5, "ids"), (2.0, "kv")])
def test_one_block_takes_the_faster_way(layers: int, ids_s: float, way: str) -> None:
    """With nothing to split there is only a choice."""
    plan = plan_restore(row(ways_of(kv={"link": 1.0}, ids_s=ids_s)), task(layers))
    assert [part.way for part in plan.parts] == [way]
    assert plan.predicted_s == pytest.approx(min(1.0, ids_s))
    assert plan.alternatives_s == pytest.approx({"kv": 1.0, "ids": ids_s})


def test_recomputing_ends_where_ids_end() -> None:
    """Blocks whose ids are not to be used, and all behind them, are loaded."""
    cheap, none = ways_of(kv={"link": 9.0}, ids_s=1.0), ways_of(kv={"link": 9.0})
    plan = plan_restore(row(cheap, cheap, none, cheap, tokens=256), task(block_tokens=256))
    assert plan.recompute_to == 512
    assert share(plan, "kv") == 0.5


def test_what_is_not_stored_is_recomputed_with_all_before_it() -> None:
    """Ids are a prefix: a hole costs the stored blocks before it too."""
    stored, hole = ways_of(kv={"link": 1.0}, ids_s=50.0), ways_of(ids_s=50.0)
    plan = plan_restore(row(stored, hole, stored, stored, start=7), task())
    assert plan.recompute_to == 9
    assert plan.parts[0].start == 7
    with pytest.raises(ValueError, match="block 1 is not stored"):
        plan_restore(row(ways_of(kv={"link": 1.0}), hole), task())


def test_short_last_block_is_restored_whole() -> None:
    """Only the last block may be short, and it counts for what it is."""
    ways = ways_of(kv={"link": 1.0}, ids_s=100.0)
    segments = [
        Segment(start=0, tokens=512, ways=ways),
        Segment(start=512, tokens=3, ways=ways),
    ]
    plan = plan_restore(segments, task(block_tokens=256))
    assert plan.tokens() == {("kv", "host"): 515}
    assert plan.predicted_s == pytest.approx(515.0)


@pytest.mark.parametrize(
    ("segments", "error"),
    [
        (row(ways_of(kv={}), ways_of(kv={}), tokens=3), "whole blocks"),
        ([*row(ways_of(kv={}), tokens=2), *row(ways_of(kv={}), tokens=2)], "follow each other"),
        (row(()), "no way"),
        (row(ways_of(kv={}) * 2), "there twice"),
    ],
)
def test_segments_must_be_whole_blocks_in_a_row(segments: list[Segment], error: str) -> None:
    """A gap would be a token that nobody restores."""
    with pytest.raises(ValueError, match=error):
        plan_restore(segments, task(block_tokens=2))


def test_ways_cost_finite_seconds_of_known_resources() -> None:
    """And ids nothing that is loaded."""
    with pytest.raises(ValueError, match="finite"):
        ways_of(kv={"link": math.inf})
    with pytest.raises(ValueError, match="device alone"):
        Way(name="ids", seconds={"link": 1.0})


def test_latency_of_pieces_makes_recomputing_pay() -> None:
    """What a block costs whatever its length belongs to the price of loading it."""
    quick = Way(name="kv", tier="host", seconds={"link": 1.0})
    slow = dataclasses.replace(quick, fixed_s={"link": 300.0})
    ids = Way(name="ids", seconds={"device": 2.0})
    alone = task(block_tokens=100)
    assert plan_restore(row((quick, ids), tokens=100), alone).recompute_to == 0
    assert plan_restore(row((slow, ids), tokens=100), alone).recompute_to == 100


def test_steps_of_recomputing_have_their_price() -> None:
    """Many small steps make it too dear."""
    segments = row(*[ways_of(kv={"link": 1.0}, ids_s=1.0)] * 8)
    assert plan_restore(segments, task()).recompute_to == 4
    dear = task(step_tokens=1, step_s=10.0)
    assert plan_restore(segments, dear).recompute_to == 0


def test_new_tokens_take_their_share_of_the_device() -> None:
    """The longer the rest, the less is recomputed: at last what fits beside the first layer."""
    segments = row(*[ways_of(kv={"link": 1.0}, ids_s=1.0)] * 16)
    ends = [
        plan_restore(segments, task(4, suffix_s=suffix_s)).recompute_to
        for suffix_s in (0.0, 4.0, 20.0)
    ]
    assert ends[0] == 8
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] == 3  # 13 / 4 s of loading


def test_a_price_of_the_device_buys_less_of_it() -> None:
    """Where the device has others to serve, a little time is not worth much of it."""
    segments = row(*[ways_of(kv={"link": 1.0}, ids_s=9.0)] * 16)
    free, priced = (plan_restore(segments, task(gpu_price=price)) for price in (0.0, 0.5))
    assert free.recompute_to > 0
    assert priced.recompute_to == 0
    assert priced.busy_s["device"] < free.busy_s["device"]


def test_nothing_is_computed_in_vain() -> None:
    """Where recomputing saves no time, it is not done."""
    remote = ways_of(kv={"network": 5.0}, tier="remote")
    local = ways_of(kv={"disk": 0.1}, ids_s=0.1)
    plan = plan_restore(row(*[local] * 80, *[remote] * 8), task(4))
    assert plan.predicted_s == pytest.approx(40.0)
    assert plan.recompute_to == 0
    assert plan.busy_s["device"] == 0


def test_staging_hides_behind_one_layer_at_most() -> None:
    """Sent as they come or after all are there: the time is nearly that of both together."""
    segments = row(*[ways_of(kv={"link": 1.0, "network": 1.0}, ids_s=2.0, tier="remote")] * 12)
    apart = plan_restore(segments, task(64, chains=EACH_ALONE))
    chained = plan_restore(segments, task(64))
    assert apart.bound_s == pytest.approx(8.0)
    assert chained.bound_s == pytest.approx(12.0)
    assert chained.predicted_s == pytest.approx(12.0)
    assert apart.predicted_s == pytest.approx(12.0, rel=0.02)


def test_a_prompt_may_wait_aside_until_it_is_staged() -> None:
    """Recomputing then begins behind the network, as loading does."""
    segments = row(*[ways_of(kv={"link": 1.0, "network": 1.0}, ids_s=2.0, tier="remote")] * 12)
    waits = task(64, chains=(("network", "device"), ("network", "link")))
    plan = plan_restore(segments, waits)
    assert plan.bound_s == pytest.approx(16.0)
    assert plan.predicted_s == pytest.approx(16.0)
    assert plan.recompute_to == 4


def test_serial_objective_is_the_printed_one() -> None:
    """Activations hide nothing there, so fewer are projected; its prediction is of execution."""
    segments = row(*[ways_of(kv={"link": 2.0}, activations={"link": 1.0, "device": 0.84})] * 64)
    serial = plan_restore(segments, task(objective="serial"))
    pipelined = plan_restore(segments, task())
    assert serial.bound_s == pytest.approx(128 * (1 - 0.5 / 1.42))
    assert share(serial, "activations") == pytest.approx(1 / 1.42, abs=0.01)
    assert share(pipelined, "activations") == 1
    assert pipelined.predicted_s < serial.predicted_s


def test_faster_link_is_never_slower() -> None:
    """More of a resource never hurts a plan."""
    rng = random.Random("monotone plans")
    for _ in range(30):
        segments, asked = random_segments(rng)
        faster = [
            dataclasses.replace(segment, ways=tuple(_halved(way) for way in segment.ways))
            for segment in segments
        ]
        slow_s = plan_restore(segments, asked).predicted_s
        assert plan_restore(faster, asked).predicted_s <= slow_s * (1 + 1e-9)


def _halved(way: Way) -> Way:
    half: dict[Resource, float] = {"link": way.seconds.get("link", 0.0) / 2}
    fixed_s: dict[Resource, float] = {"link": way.fixed_s.get("link", 0.0) / 2}
    return dataclasses.replace(way, seconds={**way.seconds, **half}, fixed_s=fixed_s)


def test_blocks_of_a_ring_are_shared_out_whole() -> None:
    """Three blocks on two ranks take as long as two on one: the fullest rank counts."""
    ways = ways_of(kv={"link": 0.5})  # of two links, one each
    plan = plan_restore(row(*[ways] * 3), task(num_ranks=2))
    assert plan.bound_s == pytest.approx(1.5)
    assert plan.predicted_s == pytest.approx(2.0)


def test_long_prompts_are_planned_like_short_ones() -> None:
    """A million tokens are simulated in larger pieces, and still end at the optimum."""
    segments = row(
        *[ways_of(kv={"link": 1.0}, ids_s=2.0 + index / 1000) for index in range(1000)],
        tokens=1024,
    )
    plan = plan_restore(segments, task(block_tokens=256))
    check_whole(plan, segments, 256)
    assert plan.predicted_s == pytest.approx(plan.bound_s, rel=0.01)


def test_cache_finds_plans_by_their_shape() -> None:
    """Rates that moved by less than they are known ask for no new plan; the oldest plan goes."""
    cache = PlanCache(capacity=2)

    def plan(kv_s: float) -> RestorePlan:
        return cache.plan(row(*[ways_of(kv={"link": kv_s}, ids_s=1.0)] * 4), task())

    first = plan(1.0)
    assert plan(1.0001) is first
    assert plan(2.0) is not first
    assert plan(1.0) is first
    plan(3.0)  # 2.0 goes
    assert plan(1.0) is first
    assert plan(4.0) is not plan(5.0)
    assert plan(1.0) == first
    assert plan(1.0) is not first
