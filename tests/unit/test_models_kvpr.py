"""The paper's split: its worked example, and three ways to the same optimum."""

import random

import pytest

from models.kvpr import (
    Objective,
    SplitProblem,
    aligned_split,
    best_split,
    exhaustive_split,
    free_split,
    layer_s,
    linear_program_split,
)

OBJECTIVES: tuple[Objective, ...] = ("serial", "pipelined")


def a100(
    hidden_size: int = 4096,
    kv_width: int | None = None,
    *,
    kv_bits: float | None = None,
    max_split: int | None = None,
    other_s: float = 0.0,
    weight_bytes: float = 0.0,
) -> SplitProblem:
    """OPT-6.7B's shape at b=32, s'=1024 on an A100 behind PCIe 4, by their data sheets."""
    return SplitProblem(
        batch=32,
        tokens=1024,
        hidden_size=hidden_size,
        kv_width=kv_width or hidden_size,
        link_bytes_per_s=32e9,
        flops_per_s=312e12,
        kv_bits=kv_bits,
        max_split=max_split,
        other_s=other_s,
        weight_bytes=weight_bytes,
    )


def random_problem(rng: random.Random) -> SplitProblem:
    """MHA and GQA, quantised or not, row by row or column by column; rho from 0.01 to 100."""
    heads = rng.choice([4, 8, 32])
    head_dim = rng.choice([32, 64, 128])
    link_bytes_per_s = 10 ** rng.uniform(8, 12)
    rho = 10 ** rng.uniform(-2, 2)
    columns = rng.random() < 0.3
    tokens = rng.randint(1, 400)
    return SplitProblem(
        batch=rng.randint(1, 64),
        tokens=tokens,
        hidden_size=heads * head_dim,
        kv_width=heads * head_dim // rng.choice([1, 1, 1, 2, 4]),
        link_bytes_per_s=link_bytes_per_s,
        flops_per_s=heads * head_dim * link_bytes_per_s / rho,
        kv_bits=rng.choice([None, None, 8.125, 4.5]),
        max_split=rng.choice([None, rng.randint(0, tokens)]),
        other_s=rng.choice([0.0, 10 ** rng.uniform(-6, -3)]),
        weight_bytes=rng.uniform(0, 1e9) if columns else 0.0,
        batches=rng.randint(1, 8) if columns else 1,
    )


def check_three_ways(problem: SplitProblem, objective: Objective) -> None:
    """Closed form, linear program and trying all agree, exactly where they should."""
    split = best_split(problem, objective)
    best_s = layer_s(problem, split, objective)
    solved = linear_program_split(problem, objective)
    assert layer_s(problem, solved, objective) == pytest.approx(best_s, rel=1e-6)
    for align_tokens in (1, 16):
        aligned = aligned_split(problem, objective, align_tokens)
        tried = exhaustive_split(problem, objective, align_tokens)
        tried_s = layer_s(problem, tried, objective)
        assert layer_s(problem, aligned, objective) == pytest.approx(tried_s, rel=1e-12)
        assert best_s <= tried_s * (1 + 1e-12)
        assert 0 <= aligned <= problem.cap


def test_worked_example_as_printed() -> None:
    """The serial optimum of the paper's setting: 16.777 ms become 10.871."""
    problem = a100()
    assert problem.rho == pytest.approx(0.420, abs=5e-4)
    assert layer_s(problem, 0, "serial") == pytest.approx(16.777e-3, abs=5e-7)
    split = aligned_split(problem, "serial")
    assert split == 721
    assert layer_s(problem, split, "serial") == pytest.approx(10.871e-3, abs=5e-7)


def test_worked_example_pipelined() -> None:
    """Where activations hide too, all tokens are projected and half of the time is gone."""
    problem = a100()
    split = aligned_split(problem, "pipelined")
    assert split == 1024
    halved_s = layer_s(problem, 0, "pipelined") / 2
    assert layer_s(problem, split, "pipelined") == pytest.approx(halved_s, rel=1e-12)


@pytest.mark.parametrize(
    ("align_tokens", "split", "milliseconds"),
    [(16, 720, 10.879), (64, 704, 11.010), (128, 640, 11.534), (256, 768, 11.578)],
)
def test_alignment_costs_what_it_costs(align_tokens: int, split: int, milliseconds: float) -> None:
    """A coarser grid gives time away, and its best is not always the lower neighbour."""
    problem = a100()
    assert aligned_split(problem, "serial", align_tokens) == split
    assert layer_s(problem, split, "serial") == pytest.approx(milliseconds * 1e-3, abs=5e-7)


@pytest.mark.parametrize(
    ("hidden_size", "loading_ms", "serial", "serial_ms", "pipelined", "pipelined_cut"),
    [
        (4096, 16.777, 721, 10.871, 1024, 0.500),  # OPT-6.7B, Llama-2-7B
        (5120, 20.972, 671, 14.096, 999, 0.488),  # OPT-13B
        (7168, 29.360, 590, 20.900, 829, 0.405),  # OPT-30B
    ],
)
def test_wider_models_gain_less(
    hidden_size: int,
    loading_ms: float,
    serial: int,
    serial_ms: float,
    pipelined: int,
    pipelined_cut: float,
) -> None:
    """Projection grows with h^2, what it saves on the link with h."""
    problem = a100(hidden_size)
    loading_s = layer_s(problem, 0, "serial")
    assert loading_s == pytest.approx(loading_ms * 1e-3, abs=1e-6)
    assert round(best_split(problem, "serial")) == serial
    serial_s = layer_s(problem, best_split(problem, "serial"), "serial")
    assert serial_s == pytest.approx(serial_ms * 1e-3, abs=1e-6)
    assert round(best_split(problem, "pipelined")) == pipelined
    pipelined_s = layer_s(problem, best_split(problem, "pipelined"), "pipelined")
    assert 1 - pipelined_s / loading_s == pytest.approx(pipelined_cut, abs=6e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("hidden_size", [4096, 8192, 16384])  # Llama 3: 8B, 70B, 405B
@pytest.mark.parametrize("link_bytes_per_s", [1e9, 32e9, 375e9])
def test_grouped_queries_are_never_projected(
    objective: Objective, hidden_size: int, link_bytes_per_s: float
) -> None:
    """Activations wider than keys and values cost more of everything, on any machine."""
    problem = SplitProblem(
        batch=32,
        tokens=1024,
        hidden_size=hidden_size,
        kv_width=1024,
        link_bytes_per_s=link_bytes_per_s,
        flops_per_s=312e12,
    )
    assert best_split(problem, objective) == 0
    assert exhaustive_split(problem, objective, 64) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_quantised_kv_is_loaded_even_under_mha(objective: Objective) -> None:
    """At 4.5 bits keys and values are narrower than 16-bit activations."""
    assert aligned_split(a100(kv_bits=4.5), objective) == 0
    assert aligned_split(a100(kv_bits=16), objective) > 0


def test_projection_under_streamed_weights_is_free() -> None:
    """Column by column, 1,828 tokens are projected while the weights (12 h^2) are sent."""
    problem = a100(weight_bytes=12 * 4096**2 * 2)
    assert free_split(problem) == pytest.approx(1828, abs=1)
    assert aligned_split(problem, "pipelined") == 1024
    # The split then saves all of KV but its activations, and nothing of the weights.
    assert layer_s(problem, 1024, "pipelined") == pytest.approx(
        problem.weight_s + 1024 * problem.activation_s
    )


def test_batches_share_the_weights() -> None:
    """K batches cost K times their rows and the weights once."""
    one = a100(weight_bytes=1e9)
    four = SplitProblem(**{**vars(one), "batches": 4})
    rows_s = layer_s(one, 512, "pipelined") - one.weight_s
    assert layer_s(four, 512, "pipelined") == pytest.approx(4 * rows_s + one.weight_s)


def test_a_busy_device_projects_less() -> None:
    """Other work of the layer takes its share of the device; without time left there is none."""
    assert best_split(a100(7168, other_s=5e-3), "pipelined") < best_split(a100(7168), "pipelined")
    assert aligned_split(a100(7168, other_s=1.0), "pipelined") == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_split_ends_where_activations_end(objective: Objective) -> None:
    """Only the prompt's activations were kept (eq. 11); what is generated since is loaded."""
    assert aligned_split(a100(max_split=300), objective) == 300
    assert aligned_split(a100(max_split=0), objective) == 0
    assert aligned_split(a100(max_split=300), objective, 256) == 300


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_ways_to_the_optimum_agree(objective: Objective) -> None:
    """Closed form, HiGHS and trying every split, over 1,000 random problems."""
    rng = random.Random(f"kvpr {objective}")
    for _ in range(1000):
        check_three_ways(random_problem(rng), objective)


def test_sizes_and_rates_must_be_there() -> None:
    """A rate of zero would plan an endless transfer."""
    with pytest.raises(ValueError, match="rates > 0"):
        SplitProblem(
            batch=1,
            tokens=1,
            hidden_size=1,
            kv_width=1,
            link_bytes_per_s=0.0,
            flops_per_s=1.0,
        )
