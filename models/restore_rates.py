"""What it takes to bring stored KV back: measured rates of links and of projection.

Measured by `actors.restore_profiler` while the rank computes, as in a restore: a rate
measured alone promises too much, and a plan that believes it is slower than no plan.
"""

import dataclasses
from dataclasses import dataclass

from models.rates import Affine, Curve, Measured


@dataclass(frozen=True, kw_only=True)
class RestoreRates(Measured):
    """Of one rank and its host's store; each errs to the slow side."""

    load: Affine  # the store's memory to pages, verified; the bytes of one layer of one piece
    save: Affine  # pages to the store's memory; likewise
    project: Curve  # tokens -> s: one layer's saved inputs to keys and values, the link busy
    disk_read: Affine | None = None  # into the store's memory, verified; one piece, all layers
    disk_write: Affine | None = None
    remote: Affine | None = None  # another host's memory into this one's


def capped(rates: RestoreRates, link_bytes_per_s: float | None) -> RestoreRates:
    """Return the rates where the way from store to device is no faster than that.

    The way back is not throttled. None is no limit.
    """
    if link_bytes_per_s is None or link_bytes_per_s >= rates.load.bytes_per_s:
        return rates
    load = dataclasses.replace(rates.load, bytes_per_s=link_bytes_per_s)
    return dataclasses.replace(rates, load=load)
