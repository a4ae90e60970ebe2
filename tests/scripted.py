"""A contestant of `ringspan bench` that computes nothing: its times are made up."""

from collections.abc import Sequence

from actors.records import StepRecord
from cluster.bench.runs import Measured

MACHINE = {"cpu": "a machine", "date": "2026-01-01"}


def step(
    algorithm: str = "pass_kv",
    *,
    predicted_s: float | None = 1.0,
    wall_s: float = 1.0,
    prices_s: dict[str, float] | None = None,
    decode: bool = False,
) -> StepRecord:
    """Return a step on two ranks, of which the slower takes 10 % less than the coordinator."""
    return StepRecord(
        number=0,
        phase="decode" if decode else "prefill",
        sequence_ids=(1,),
        prefill_tokens=0 if decode else 4,
        decode_tokens=4 if decode else 0,
        cached_tokens=8,
        algorithm=algorithm,
        num_ranks=2,
        predicted_s=predicted_s,
        prices_s=prices_s or {},
        plan_s=0.0,
        wall_s=wall_s,
        ranks_wall_s=(0.5 * wall_s, 0.9 * wall_s),
        ranks_parts_s=({}, {}),
    )


class Scripted:
    """Keeps what it was asked; run i takes ``seconds`` times i + 1."""

    def __init__(self, name: str, steps: tuple[StepRecord, ...] = (), seconds: float = 1.0) -> None:
        """Answer every turn with these steps."""
        self.name = name
        self.first_turns: list[list[int]] = []
        self.turns: list[list[int]] = []
        self._steps = steps
        self._seconds = seconds

    def begin(self, token_ids: Sequence[int]) -> None:
        self.first_turns.append(list(token_ids))

    def turn(self, new_ids: Sequence[int]) -> Measured:
        self.turns.append(list(new_ids))
        return Measured(self._seconds * len(self.turns), 2**20, {}, self._steps)

    def close(self) -> None:
        pass
