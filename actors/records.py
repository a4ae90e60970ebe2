"""What is told of steps and restores: records for people, programs and traces."""

from dataclasses import dataclass, field
from typing import Literal

from actors.kv.messages import Tier

# abort: by `cancel`; deadline: its time was over. What was sampled before is kept.
Phase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step was and where its time went; one for every plan, from the first day."""

    number: int
    phase: Phase
    sequence_ids: tuple[int, ...]
    prefill_tokens: int  # computed in this step
    decode_tokens: int  # sampled by decode rows in this step
    cached_tokens: int  # before it, of all these sequences
    algorithm: str  # what was chosen
    num_ranks: int
    predicted_s: float | None  # of this choice; None without measured rates
    prices_s: dict[str, float]  # of each choice there was, where they were compared
    plan_s: float  # of the coordinator, before it: which plan
    wall_s: float  # seen by the coordinator, with what it made of the results
    ranks_wall_s: tuple[float, ...]
    ranks_parts_s: tuple[dict[str, float], ...]

    @property
    def new_tokens(self) -> int:
        """All tokens of this step."""
        return self.prefill_tokens + self.decode_tokens

    def line(self) -> str:
        """Return the record as one line for people."""
        ranks = " | ".join(
            f"rank {rank} {wall_s * 1e3:.1f} ms: "
            + " ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in sorted(parts_s.items()))
            for rank, (wall_s, parts_s) in enumerate(
                zip(self.ranks_wall_s, self.ranks_parts_s, strict=True)
            )
        )
        predicted = "" if self.predicted_s is None else f", predicted {self.predicted_s * 1e3:.1f}"
        prices = " ".join(f"{name} {s * 1e3:.1f}" for name, s in sorted(self.prices_s.items()))
        return (
            f"step {self.number} {self.phase} {self.new_tokens} tokens after"
            f" {self.cached_tokens}, {self.algorithm} over {self.num_ranks} ranks,"
            f" {self.wall_s * 1e3:.1f} ms{predicted}{prices and f' of {prices}'} ({ranks})"
        )


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What came back from the KV stores instead of being computed, and in what time."""

    tokens: int
    tokens_by_tier: dict[Tier, int]
    find_s: float  # which stores have what
    stage_s: float  # from disk or another host into the arenas of the ranks' hosts
    copy_s: float  # that the ranks waited for layers: the slowest of each step
    projected_tokens: int = 0  # of these, those that came as saved layer inputs
    recomputed_tokens: int = 0  # from token ids, before them and meanwhile
    recompute_s: float = 0.0  # what the steps took that did
    recompute_predicted_s: float = 0.0  # 0: no rates
    link_bytes: int = 0  # to all ranks
    # From the choice until the chunk behind them was computed; None: no rates.
    predicted_s: float | None = None
    measured_s: float = 0.0
    alternatives_s: dict[str, float] = field(default_factory=dict)  # predicted, of other ways
    link_idle: float = 0.0  # share of measured_s, the mean of the ranks
    device_idle: float = 0.0
    simulated_link_bytes_per_s: float | None = None  # where the link is slowed down

    def __add__(self, other: "Restored") -> "Restored":
        """Return what came back together."""
        tiers = {**self.tokens_by_tier, **other.tokens_by_tier}
        measured_s = self.measured_s + other.measured_s
        predicted_s = None
        if self.predicted_s is not None and other.predicted_s is not None:
            predicted_s = self.predicted_s + other.predicted_s

        def mean(mine: float, others: float) -> float:
            total = mine * self.measured_s + others * other.measured_s
            return total / measured_s if measured_s else 0.0

        return Restored(
            tokens=self.tokens + other.tokens,
            tokens_by_tier={
                tier: self.tokens_by_tier.get(tier, 0) + other.tokens_by_tier.get(tier, 0)
                for tier in tiers
            },
            find_s=self.find_s + other.find_s,
            stage_s=self.stage_s + other.stage_s,
            copy_s=self.copy_s + other.copy_s,
            projected_tokens=self.projected_tokens + other.projected_tokens,
            recomputed_tokens=self.recomputed_tokens + other.recomputed_tokens,
            recompute_s=self.recompute_s + other.recompute_s,
            recompute_predicted_s=self.recompute_predicted_s + other.recompute_predicted_s,
            link_bytes=self.link_bytes + other.link_bytes,
            predicted_s=predicted_s,
            measured_s=measured_s,
            alternatives_s={
                way: seconds + other.alternatives_s[way]
                for way, seconds in self.alternatives_s.items()
                if way in other.alternatives_s
            },
            link_idle=mean(self.link_idle, other.link_idle),
            device_idle=mean(self.device_idle, other.device_idle),
            simulated_link_bytes_per_s=self.simulated_link_bytes_per_s,
        )

    def line(self) -> str:
        """Return it as one line for people."""
        tiers = ", ".join(f"{tokens} from {tier}" for tier, tokens in self.tokens_by_tier.items())
        ways = [f"{self.projected_tokens} projected from layer inputs"] * (
            self.projected_tokens > 0
        ) + [f"{self.recomputed_tokens} before them recomputed meanwhile"] * (
            self.recomputed_tokens > 0
        )
        times = f"{self.measured_s * 1e3:.1f} ms"
        if self.predicted_s is not None:
            times += f", predicted {self.predicted_s * 1e3:.1f}"
        if self.alternatives_s:
            others = (f"{way} {s * 1e3:.1f}" for way, s in sorted(self.alternatives_s.items()))
            times += f" (alone: {' '.join(others)})"
        link = "link"
        if self.simulated_link_bytes_per_s is not None:
            link = f"link (simulated, {self.simulated_link_bytes_per_s / 1e6:.1f} MB/s)"
        return (
            f"restored {self.tokens} tokens: {', '.join([tiers, *ways])}; in {times};"
            f" found in {self.find_s * 1e3:.1f} ms, staged in {self.stage_s * 1e3:.1f} ms,"
            f" waited for {self.copy_s * 1e3:.1f} ms; idle: {link} {self.link_idle:.0%},"
            f" device {self.device_idle:.0%}"
        )
