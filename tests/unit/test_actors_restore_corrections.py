"""Corrections follow what restores take, and neither stalls nor noise."""

import dataclasses
import itertools
from typing import get_args

import pytest

from actors.ratios import KEPT, Ratios
from actors.restore_corrections import LEAST_OBSERVED, Kind, RestoreCorrections
from models.rates import Affine
from tests.unit.test_models_restore_rates import DISK

KINDS: tuple[Kind, ...] = get_args(Kind)


def observed(ratios: list[float], kind: Kind = "load") -> RestoreCorrections:
    """Return corrections that saw these ratios of measured to predicted time."""
    corrections = RestoreCorrections()
    for ratio in ratios:
        corrections.observe(kind, 1e-2, 1e-2 * ratio)
    return corrections


def test_rates_are_believed_at_first() -> None:
    """Nothing was observed."""
    corrections = RestoreCorrections()

    assert [corrections.factor(kind) for kind in KINDS] == [1.0] * len(KINDS)
    assert corrections.corrected(DISK) == DISK


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_corrected_alone(kind: Kind) -> None:
    """A disk that is busy says nothing of the link."""
    corrections = observed([2.0] * LEAST_OBSERVED, kind)

    assert corrections.factor(kind) == pytest.approx(2.0)
    assert all(corrections.factor(other) == 1.0 for other in KINDS if other != kind)


def test_corrected_rates_predict_what_was_measured() -> None:
    """Laws and curves alike, latency and all; what is not there stays so."""
    corrections = RestoreCorrections()
    factors: dict[Kind, float] = {"load": 2.0, "activations": 3.0, "disk": 0.5, "remote": 4.0}
    for kind, factor in factors.items():
        for _ in range(LEAST_OBSERVED):
            corrections.observe(kind, 1.0, factor)

    rates = corrections.corrected(DISK)

    assert rates.load(1e6) == pytest.approx(2.0 * DISK.load(1e6))
    assert rates.project(100) == pytest.approx(3.0 * DISK.project(100))
    assert rates.disk_read is not None
    assert DISK.disk_read is not None
    assert rates.disk_read(1e6) == pytest.approx(0.5 * DISK.disk_read(1e6))
    assert rates.remote is None
    assert (rates.save, rates.disk_write) == (DISK.save, DISK.disk_write)
    remote = dataclasses.replace(DISK, remote=Affine(1e-3, 1e8))
    corrected = corrections.corrected(remote).remote
    assert corrected is not None
    assert corrected(1e6) == pytest.approx(4.0 * (1e-3 + 1e-2))


def test_few_observations_change_nothing() -> None:
    """The first restore of all warms up."""
    assert observed([3.0] * (LEAST_OBSERVED - 1)).factor("load") == 1.0


def test_a_stall_changes_nothing() -> None:
    """The middle is believed, and what is beyond all rates is not even kept."""
    assert observed([1.2, 1.2, 15.0, 1.2, 1000.0]).factor("load") == pytest.approx(1.2)
    assert observed([1000.0] * 20).factor("load") == 1.0


def test_noise_does_not_swing_the_factor() -> None:
    """Plans that follow every per cent are other plans every time."""
    corrections = observed([1.5] * LEAST_OBSERVED)
    factors = set()
    for ratio in itertools.islice(itertools.cycle([1.46, 1.54, 1.5, 1.56, 1.45]), 50):
        corrections.observe("load", 1.0, ratio)
        factors.add(corrections.factor("load"))

    assert factors == {1.5}


def test_it_errs_to_the_slow_side() -> None:
    """Of two middle ones: who expects too much loses more."""
    assert observed([1.0, 1.0, 2.0, 2.0]).factor("load") == pytest.approx(2.0)


def test_an_old_load_is_forgotten() -> None:
    """Whoever used the link too has gone."""
    corrections = observed([4.0] * KEPT)
    for _ in range(KEPT):
        corrections.observe("load", 1.0, 1.0)

    assert corrections.factor("load") == pytest.approx(1.0)


@pytest.mark.parametrize("predicted_s", [None, 0.0])
def test_without_a_prediction_there_is_no_ratio(predicted_s: float | None) -> None:
    """A part that was no part of the plan."""
    ratios = Ratios(limit=4.0)
    ratios.keep("load", predicted_s, 1.0)

    assert ratios.count("load") == 0
    assert ratios.middle("load") == 1.0
