"""Rates of restores survive a file, and laws go through what was measured."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rates import Affine, Curve
from models.restore_rates import RestoreRates, capped

RATES = RestoreRates(
    load=Affine(2e-5, 6e9), save=Affine(3e-5, 5e9), project=Curve(((16, 1e-4), (256, 1e-3)))
)
DISK = RestoreRates(
    load=RATES.load,
    save=RATES.save,
    project=RATES.project,
    disk_read=Affine(1e-3, 1e9),
    disk_write=Affine(2e-3, 5e8),
)


@pytest.mark.parametrize("rates", [RATES, DISK])
def test_rates_survive_json(rates: RestoreRates) -> None:
    """With tiers and without: the profile file holds them."""
    text = json.dumps(rates.to_json())

    assert RestoreRates.from_json(json.loads(text)) == rates


@pytest.mark.parametrize(
    "change",
    [
        {"load": None},
        {"load": {"latency_s": 0.0, "bytes_per_s": 0.0}},
        {"load": {"latency_s": 0.0}},
        {"project": {"points": [[16, 2.0], [32, 1.0]]}},
        {"project": None},
        {"disk_read": 1.0},
        {"remote": {"latency_s": float("nan"), "bytes_per_s": 1.0}},
        {"unknown": None},
    ],
)
def test_damaged_rates_are_refused(change: dict[str, object]) -> None:
    """What a truncated or foreign file holds must not become a plan."""
    with pytest.raises(ValueError, match=r".+"):
        RestoreRates.from_json(DISK.to_json() | change)


def test_a_missing_rate_is_refused() -> None:
    """Also one that may be None: the file is of another version."""
    values = DISK.to_json()
    del values["remote"]

    with pytest.raises(ValueError, match="names of rates"):
        RestoreRates.from_json(values)


@pytest.mark.parametrize(("limit", "expected"), [(None, 6e9), (1e8, 1e8), (6e9, 6e9), (1e12, 6e9)])
def test_a_throttled_link_caps_loading(limit: float | None, expected: float) -> None:
    """No link makes this machine faster; the way back and the disk are not throttled."""
    rates = capped(DISK, limit)

    assert rates.load == Affine(2e-5, expected)
    assert rates.to_json() | {"load": None} == DISK.to_json() | {"load": None}


TIMES = st.floats(1e-6, 10.0)


@given(small_s=TIMES, more_s=TIMES)
def test_a_law_goes_through_both_points(small_s: float, more_s: float) -> None:
    """Where that needs a latency below 0, it errs to the slow side."""
    small, large = (1e4, small_s), (1e6, small_s + more_s)

    law = Affine.through(small, large)

    for num_bytes, seconds in (small, large):
        if law.latency_s > 0:
            assert law(num_bytes) == pytest.approx(seconds, rel=1e-6)
        else:
            assert law(num_bytes) >= seconds * (1 - 1e-6)


def test_noise_makes_no_law_fall() -> None:
    """A larger piece that was quicker than a smaller one: both take as long as the smaller."""
    law = Affine.through((1e4, 2e-3), (1e6, 1e-3))

    assert law(1e4) == pytest.approx(2e-3)
    assert law(1e6) == pytest.approx(2e-3)


def test_scaled_laws_take_so_many_times_as_long() -> None:
    """A machine that is busy does everything later."""
    assert Affine(1e-3, 1e9).scaled(2.0)(1e6) == pytest.approx(2 * Affine(1e-3, 1e9)(1e6))
    curve = Curve(((1, 1e-3), (16, 4e-3)))
    assert [curve.scaled(0.5)(x) for x in (1, 8, 100)] == pytest.approx(
        [0.5 * curve(x) for x in (1, 8, 100)]
    )
