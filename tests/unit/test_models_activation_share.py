"""What is stored as layer inputs: a question of bytes first, then of rates."""

import pytest

from models.activation_share import activation_share
from models.kvpr import Objective
from models.rates import Affine, Curve

LINK = Affine(0.0, 32e9)


def share(
    hidden_size: int,
    kv_width: int,
    *,
    rho: float = 0.3,
    link: Affine = LINK,
    other_s: float = 0.0,
    objective: Objective = "pipelined",
) -> float:
    """Of blocks of 256 tokens in 16 bits; rho of projecting a token to loading it."""
    kv_s = 2 * 2 * kv_width / LINK.bytes_per_s
    return activation_share(
        activation_bytes=256 * 2 * hidden_size,
        kv_bytes=256 * 2 * 2 * kv_width,
        tokens=256,
        load=link,
        project=Curve.proportional(rho * kv_s),
        other_s=other_s,
        objective=objective,
    )


@pytest.mark.parametrize("hidden_size", [4096, 8192, 16384])
@pytest.mark.parametrize("rho", [1e-6, 0.5, 10.0])
def test_never_for_llama_3(hidden_size: int, rho: float) -> None:
    """Activations are 2 to 8 times as wide as its keys and values."""
    assert share(hidden_size, 1024, rho=rho) == 0


def test_never_where_both_are_as_wide() -> None:
    """Groups of two heads: the same bytes, and projection on top."""
    assert share(4096, 2048, rho=0.0) == 0


@pytest.mark.parametrize(
    ("hidden_size", "kv_width"),
    [(4096, 4096), (5120, 5120), (1024, 1024)],  # OPT-6.7B, OPT-13B, Qwen3-0.6B
)
def test_all_where_the_link_is_what_is_slow(hidden_size: int, kv_width: int) -> None:
    """Half the bytes, and a device that keeps up: everything is kept as activations."""
    assert share(hidden_size, kv_width, rho=0.42) == 1
    assert 0 < share(hidden_size, kv_width, rho=2.2) < 0.5


def test_errs_to_the_low_side() -> None:
    """It stays below the optimum 2 / (1 + 2 rho) of the measured rates, but near."""
    for rho in (0.6, 1.0, 2.2, 10.0):
        best = 2 / (1 + 2 * rho)
        assert 0.9 * best < share(4096, 4096, rho=rho) < best


def test_a_busy_device_keeps_fewer() -> None:
    """Without time left it projects none."""
    kv_s = 256 * 2 * 2 * 4096 / LINK.bytes_per_s
    assert share(4096, 4096, rho=1.0, other_s=0.5 * kv_s) < share(4096, 4096, rho=1.0)
    assert share(4096, 4096, rho=1.0, other_s=2 * kv_s) == 0


def test_serial_objective_keeps_fewer() -> None:
    """As printed, activations hide behind nothing: 1 / (1 + rho)."""
    serial = share(4096, 4096, rho=0.42, objective="serial")
    assert serial == pytest.approx(1 / (1 + 1.1 * 0.42))


def test_latency_makes_bytes_count_less() -> None:
    """Where a copy mostly costs its start, fewer bytes save little; more can be projected."""
    slow = Affine(1.0, 32e9)
    assert share(4096, 4096, rho=0.42, link=slow) == 1
