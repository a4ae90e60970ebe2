"""How much of what is stored should be layer inputs instead of keys and values."""

from models.kvpr import Objective
from models.rates import Affine, Curve

_SLOWER = 1.1  # the device, than measured: too large a share costs more than too small a one


def activation_share(
    *,
    activation_bytes: float,
    kv_bytes: float,
    tokens: int,
    load: Affine,
    project: Curve,
    other_s: float = 0.0,
    objective: Objective = "pipelined",
) -> float:
    """Return the share of blocks, 0 to 1, that restores fastest if kept as activations.

    With share ``a`` a layer of a block takes, on average, ``a x + (1 - a) k`` of the link and
    ``a c + other_s`` of the device. Pipelined both should end together; the serial objective
    sends activations first, as `models.kvpr`. Wider activations than KV are never kept.

    Args:
        activation_bytes: One layer of one block, as stored.
        kv_bytes: Likewise, keys and values.
        tokens: Of a block.
        load: Law of the link, for the bytes of one layer of one block.
        project: Tokens to seconds of one layer, measured while the link is busy.
        other_s: Device seconds that a layer of a block costs besides.
        objective: What the plans of restores will minimise.
    """
    if activation_bytes >= kv_bytes:
        return 0.0
    activation_s, kv_s = load(activation_bytes), load(kv_bytes)
    project_s = project(tokens) * _SLOWER
    if objective == "serial":
        return kv_s / (kv_s + project_s)
    return min(max((kv_s - other_s) / (kv_s - activation_s + project_s), 0.0), 1.0)
