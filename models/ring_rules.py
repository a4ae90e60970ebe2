"""The rules of arXiv 2411.01783 that choose between pass-KV and pass-Q by a threshold.

They are here to be compared with the priced choice (`models.cost`). C and BW are
of one GPU: peak or, better, achieved figures. T = new tokens, P = cached tokens.

What to know before trusting them: both algorithms count attention without its
causal half, so that a full prefill's threshold is half of the right one; with C
and BW of the data sheet they choose worse than with achieved ones; and the
paper's own Table 4 cannot tell the two algorithms apart between 3 and 5 %.
"""

import math
from typing import Literal

from models.rates import ModelShape

Algorithm = Literal["pass_kv", "pass_q"]


def hides_kv(
    new_tokens: int, model: ModelShape, num_ranks: int, flops_per_s: float, bytes_per_s: float
) -> bool:
    """Equation 2: T >= N C N_KV e / (2 N_H BW), where attention hides the transfer of KV."""
    kv_per_query_head = model.num_kv_heads * model.kv_element_bytes / (2 * model.num_heads)
    return new_tokens >= num_ranks * flops_per_s * kv_per_query_head / bytes_per_s


def algorithm_1(
    new_tokens: int,
    cached_tokens: int,
    model: ModelShape,
    num_ranks: int,
    flops_per_s: float,
    bytes_per_s: float,
) -> Algorithm:
    """Equations 1 and 2: pass-KV if it is hidden, or if KV is smaller than Q.

    That pass-Q's outputs must return is not counted.
    """
    miss_rate = new_tokens / (new_tokens + cached_tokens)
    hidden = hides_kv(new_tokens, model, num_ranks, flops_per_s, bytes_per_s)
    if hidden or miss_rate >= 2 * model.num_kv_heads / model.num_heads:
        return "pass_kv"
    return "pass_q"


def algorithm_5(
    new_tokens: int,
    cached_tokens: int,
    model: ModelShape,
    num_ranks: int,
    flops_per_s: float,
    bytes_per_s: float,
) -> Algorithm:
    """Equations 2 and 5: as algorithm 1, counting the All2All that returns pass-Q's outputs.

    The inequality holds though each of its printed terms is N times too large.
    """
    miss_rate = new_tokens / (new_tokens + cached_tokens)
    hidden = hides_kv(new_tokens, model, num_ranks, flops_per_s, bytes_per_s)
    returned = 4 * new_tokens * bytes_per_s / (num_ranks * flops_per_s * model.kv_element_bytes)
    if hidden or miss_rate >= 2 * model.num_kv_heads / model.num_heads - returned:
        return "pass_kv"
    return "pass_q"


def empirical(new_tokens: int, cached_tokens: int) -> Algorithm:
    """Appendix D: pass-KV if h = alpha ln T + beta ln(T / (T + P)) + gamma > 0, as printed.

    Fitted on one machine up to about 3000 new tokens: beyond, it takes pass-Q
    even for a full prefill, and loses 5.1 s over the rows of Table 4.
    """
    miss_rate = new_tokens / (new_tokens + cached_tokens)
    h = -1.059 * math.log(new_tokens) + 1.145 * math.log(miss_rate) + 12.112
    return "pass_kv" if h > 0 else "pass_q"
