"""KVPR's own problem (arXiv 2411.17089): one layer, one split of the tokens.

Keys and values of ``tokens`` tokens lie in host memory. For the first ``l`` of them the layer
input (activations) is sent instead, which is narrower under multi-head attention, and projected
on the device; keys and values of the rest are sent as they are. Per layer (eq. 6-11):

    t_X = b l h p / v_link    t_KV = 2 b (s' - l) kv p / v_link    t_rec = 4 b l h kv / v_device

Row by row (weights resident) one batch is computed at a time. Column by column the weights go
over the link too, once for K batches; they count as K t_KV does, for projection needs only W_K
and W_V, which are sent first. Both are here, the second with ``weight_bytes`` and ``batches``:

    serial      K t_X + max(K t_rec, K t_KV + t_W) + K t_other    as printed: activations, then all
    pipelined   max(K t_X + K t_KV + t_W, K t_rec + K t_other)    two buffers: all hides all

The paper prints the serial form for K = 1, t_W = t_other = 0. Its column form could not be read;
the one here is derived. `models.restore_plan` solves the problem of a whole prompt.
"""

import math
from dataclasses import dataclass
from typing import Literal

Objective = Literal["serial", "pipelined"]


@dataclass(frozen=True, kw_only=True)
class SplitProblem:
    """One layer of the model on one device and one link."""

    batch: int  # b
    tokens: int  # s': of each sequence so far
    hidden_size: int  # h: width of the activations
    kv_width: int  # K heads x head dim: width of the keys, and of the values
    link_bytes_per_s: float
    flops_per_s: float  # of the projection, measured while the link is busy
    element_bytes: float = 2.0  # p
    kv_bits: float | None = None  # of an element of KV on the link; None: those of element_bytes
    max_split: int | None = None  # tokens whose activations were kept (eq. 11: the prompt)
    other_s: float = 0.0  # a batch's attention and MLP
    weight_bytes: float = 0.0  # of the layer, where they are sent too (column by column)
    batches: int = 1  # K: batches computed with the weights once sent

    def __post_init__(self) -> None:
        counts = (self.batch, self.tokens, self.hidden_size, self.kv_width, self.batches)
        if min(counts) < 1 or min(self.link_bytes_per_s, self.flops_per_s) <= 0:
            raise ValueError(f"sizes must be >= 1 and rates > 0, got {self}")

    @property
    def cap(self) -> int:
        """The largest split."""
        return self.tokens if self.max_split is None else min(self.tokens, self.max_split)

    @property
    def activation_s(self) -> float:
        """One token's activations on the link, all batches."""
        elements = self.batches * self.batch * self.hidden_size
        return elements * self.element_bytes / self.link_bytes_per_s

    @property
    def kv_s(self) -> float:
        """One token's keys and values on the link, all batches."""
        bits = 8 * self.element_bytes if self.kv_bits is None else self.kv_bits
        elements = self.batches * self.batch * 2 * self.kv_width
        return elements * bits / 8 / self.link_bytes_per_s

    @property
    def project_s(self) -> float:
        """One token's keys and values out of its activations, all batches."""
        flops = 4 * self.batches * self.batch * self.hidden_size * self.kv_width
        return flops / self.flops_per_s

    @property
    def weight_s(self) -> float:
        """The layer's weights on the link."""
        return self.weight_bytes / self.link_bytes_per_s

    @property
    def rho(self) -> float:
        """Projecting a token over loading it; ``2 h v_link / (p v_device)`` where MHA is exact."""
        return self.project_s / self.kv_s


def layer_s(problem: SplitProblem, split: float, objective: Objective) -> float:
    """Return the seconds of the layer, all batches, if ``split`` tokens are projected."""
    return max(slope * split + at_zero for slope, at_zero in _lines(problem, objective))


def best_split(problem: SplitProblem, objective: Objective) -> float:
    """Return the split, not rounded, where link and device take equally long; closed form.

    Where keys and values are no wider than activations it is 0, on any machine.
    """
    kv_s, activation_s = problem.kv_s, problem.activation_s
    if kv_s <= activation_s:
        return 0.0
    link_s = kv_s * problem.tokens + problem.weight_s
    if objective == "serial":
        split = link_s / (kv_s + problem.project_s)
    else:
        link_s -= problem.batches * problem.other_s
        split = link_s / (kv_s - activation_s + problem.project_s)
    return min(max(split, 0.0), float(problem.cap))


def linear_program_split(problem: SplitProblem, objective: Objective) -> float:
    """Return the same as `best_split`, solved by HiGHS as the paper's linear program."""
    from scipy.optimize import linprog  # not where a machine only computes

    lines = _lines(problem, objective)
    # The variables are the split's share of all tokens and the time in units of pure loading:
    # then no coefficient is near the solver's tolerances.
    unit_s = layer_s(problem, 0, objective)
    solved = linprog(
        [0, 1],
        A_ub=[[slope * problem.tokens / unit_s, -1] for slope, _ in lines],
        b_ub=[-at_zero / unit_s for _, at_zero in lines],
        bounds=[(0, problem.cap / problem.tokens), (0, None)],
        method="highs",
    )
    if solved.status != 0:
        raise RuntimeError(f"the split of {problem} was not solved: {solved.message}")
    return float(solved.x[0]) * problem.tokens


def aligned_split(problem: SplitProblem, objective: Objective, align_tokens: int = 1) -> int:
    """Return the best split that is a multiple of ``align_tokens``, or the cap.

    The time is convex in the split, so the best is one of the optimum's two neighbours. 0 and
    the cap are tried too.
    """
    below = math.floor(best_split(problem, objective) / align_tokens) * align_tokens
    candidates = sorted({0, below, min(below + align_tokens, problem.cap), problem.cap})
    return min(candidates, key=lambda split: layer_s(problem, split, objective))


def exhaustive_split(problem: SplitProblem, objective: Objective, align_tokens: int = 1) -> int:
    """Return the best of all splits `aligned_split` may return, each one tried."""
    candidates = [*range(0, problem.cap, align_tokens), problem.cap]
    return min(candidates, key=lambda split: layer_s(problem, split, objective))


def free_split(problem: SplitProblem) -> float:
    """Return the tokens whose projection takes no longer than sending the weights alone.

    Column by column, with a layer's weights 12 h^2 p and MHA: ``3 p v_device / (K b v_link)``.
    """
    return problem.weight_s / problem.project_s


def _lines(problem: SplitProblem, objective: Objective) -> tuple[tuple[float, float], ...]:
    """``(slope, at zero)`` of device and link; the layer takes the longer of the two."""
    other_s = problem.batches * problem.other_s
    link = problem.activation_s - problem.kv_s, problem.kv_s * problem.tokens + problem.weight_s
    if objective == "serial":
        return (problem.activation_s + problem.project_s, other_s), (link[0], link[1] + other_s)
    return (problem.project_s, other_s), link
