"""Made-up rates, under which one way of a prefill is clearly the cheapest."""

import dataclasses

from models.rates import Affine, Curve, Rates

NOTHING = Curve.proportional(1e-9)
QUICK = Affine(latency_s=1e-9, bytes_per_s=1e12)
SLOW = Affine(latency_s=1.0, bytes_per_s=1e12)

# Nothing takes any time but messages, of whichever kind: one rank does it alone.
SLOW_RING = Rates(
    linear=NOTHING,
    causal_key=NOTHING,
    dense_key=NOTHING,
    paged_key=NOTHING,
    call_s=1e-9,
    merge=NOTHING,
    store=QUICK,
    gather=QUICK,
    hop=SLOW,
    returns=SLOW,
    collective=SLOW,
    overlap=1.0,
)
# All but computing is free: the ring always pays.
FREE_RING = dataclasses.replace(
    SLOW_RING, linear=Curve.proportional(1.0), hop=QUICK, returns=QUICK, collective=QUICK
)
# Bytes on a hop are dear, returns are not: pass-Q wherever few tokens are new.
NARROW_HOPS = dataclasses.replace(FREE_RING, hop=Affine(latency_s=1e-9, bytes_per_s=1.0))
