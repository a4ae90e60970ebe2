"""What restores took, against what was predicted: the measured rates follow the machine.

A profile is measured once; the link and the device are shared with whatever else runs. No
clock here: restores are observed by who executes them.
"""

import dataclasses
import statistics
from typing import Literal

from actors.ratios import Ratios
from models.rates import Affine
from models.restore_rates import RestoreRates

Kind = Literal["load", "activations", "ids", "disk", "remote"]

LEAST_OBSERVED = 3  # before anything is corrected: one stall is none of the rates
RATIO_LIMIT = 16.0  # a link may be shared by many; what lies further says nothing
HYSTERESIS = 0.05  # a factor that is off by less stays: plans must not swing with noise


class RestoreCorrections:
    """By which factor each part of a restore takes longer than its rates say."""

    def __init__(self) -> None:
        """Begin with the rates as they were measured."""
        self._ratios = Ratios(RATIO_LIMIT)
        self._factors: dict[Kind, float] = {}

    def observe(self, kind: Kind, predicted_s: float, measured_s: float) -> None:
        """Learn from a part of a restore.

        ``predicted_s`` is by the rates as they were measured, not by `corrected` ones: the
        factor is the middle of the last ratios, of two middle ones the slower. A plan that
        believes too much is slower than no plan.
        """
        self._ratios.keep(kind, predicted_s, measured_s)
        if self._ratios.count(kind) < LEAST_OBSERVED:
            return
        middle = self._ratios.middle(kind, statistics.median_high)
        if abs(middle / self.factor(kind) - 1) > HYSTERESIS:
            self._factors[kind] = middle

    def factor(self, kind: Kind) -> float:
        """Return by what the predicted seconds of a part are to be multiplied."""
        return self._factors.get(kind, 1.0)

    def corrected(self, rates: RestoreRates) -> RestoreRates:
        """Return rates that predict what restores took lately.

        Recomputing from ids has no rate here: its price times ``factor("ids")`` has.
        """
        return dataclasses.replace(
            rates,
            load=rates.load.scaled(self.factor("load")),
            project=rates.project.scaled(self.factor("activations")),
            disk_read=self._scaled(rates.disk_read, "disk"),
            remote=self._scaled(rates.remote, "remote"),
        )

    def _scaled(self, law: Affine | None, kind: Kind) -> Affine | None:
        return None if law is None else law.scaled(self.factor(kind))
