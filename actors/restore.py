"""How a stored prefix comes back: what of it is loaded, projected and recomputed. No Ray, no clock.

Prices what the stores have by measured rates, has the linear program solved
(`models.restore_plan`), and learns from every restore.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.choice import Chooser
from actors.kv.finder import Source, StoredBlocks
from actors.kv.messages import RestoreChoice, RestoreTimes, StoredPrefix, Tier
from actors.kv.pieces import ACTIVATIONS as STORED_ACTIVATIONS
from actors.records import Restored
from actors.restore_corrections import RestoreCorrections
from models.activation_share import activation_share
from models.cost import SequenceShape
from models.rates import Affine, ModelShape
from models.restore_plan import RestorePlan
from models.restore_plan_cache import PlanCache
from models.restore_rates import RestoreRates, capped
from models.restore_simulator import Resource
from models.restore_ways import ACTIVATIONS, IDS, KV, STAGED_FIRST, RestoreTask, Segment, Way

Method = Literal["auto", "load", "recompute"]
Objective = Literal["pipelined", "serial"]
KEPT_RESTORES = 20  # of which is told how well they were predicted
PRICED_POSITIONS = 32  # between which the price of recomputing a token is taken to be the same
LINK_BUFFERS = 3  # pieces on their way or not used yet: see `actors.kv.link`


@dataclass(frozen=True, kw_only=True)
class RestoreRules:
    """What the planner keeps to; see `configs.RestoreConfig`."""

    method: Method
    objective: Objective
    activations: Literal["auto", "never", "always", "both"]
    block_tokens: int
    max_chunk_tokens: int
    rank_hosts: tuple[str, ...]
    copies_compute: bool  # on CPU who copies and verifies takes from who computes
    link_bytes_per_s: float | None = None  # of a link that is slowed down


class RestorePlanner:
    """Plans restores of one cluster."""

    def __init__(
        self,
        model: ModelShape,
        chooser: Chooser,
        rates: RestoreRates | None,
        rules: RestoreRules,
    ) -> None:
        """Take what was measured (None: then all that is stored is loaded)."""
        self._model = model
        self._chooser = chooser
        self._measured = rates
        self._rules = rules
        self._corrections = RestoreCorrections()
        self._plans = PlanCache()
        self._recent: deque[Restored] = deque(maxlen=KEPT_RESTORES)
        self._num_restores = self._num_tokens = self._num_recomputed = 0
        self.activation_share = self._share()  # of new blocks, stored as layer inputs

    def choose(self, stored: StoredBlocks) -> RestoreChoice | None:
        """Return how a prefix is to come back, or None where all of it is to be recomputed."""
        rules, start = self._rules, stored.lookup.start
        if rules.method == "recompute":
            return None
        problem = self.problem(stored)
        if problem is None:
            return RestoreChoice(recompute_to=start)
        segments, task = problem
        plan = self._plans.plan(segments, task)
        loads_all = rules.method == "load"
        if plan.recompute_to >= stored.end and not loads_all:
            return None
        recompute_to = start if loads_all else plan.recompute_to
        loading = segments[0].ways[0].name
        return RestoreChoice(
            recompute_to=recompute_to,
            takes_activations=frozenset() if loads_all else projected_blocks(plan, task),
            predicted_s=plan.alternatives_s[loading] if loads_all else plan.predicted_s,
            load_s=sum(each.ways[0].seconds["link"] * each.tokens for each in segments)
            if loads_all
            else plan.busy_s["link"],
            alternatives_s=dict(plan.alternatives_s),
            link_bytes_per_s=rules.link_bytes_per_s,
        )

    def problem(self, stored: StoredBlocks) -> tuple[list[Segment], RestoreTask] | None:
        """Return what is solved: the ways of each block, and the task; None without rates."""
        rates = self._rates()
        return None if rates is None else (self._segments(stored, rates), self._task(stored))

    def warm_up(self) -> None:
        """Solve something small: the first time takes as long as loading the solver does."""
        device, link = Way(name=IDS, seconds={"device": 1.0}), Way(name=KV, seconds={"link": 1.0})
        segment = Segment(start=0, tokens=self._rules.block_tokens, ways=(device, link))
        self._plans.plan([segment], RestoreTask(num_layers=1, block_tokens=segment.tokens))

    def observe(self, stored: StoredPrefix, times: Sequence[RestoreTimes | None]) -> None:
        """Learn from a restore; ``times`` are those of all ranks, None where one took no part."""
        if self._measured is None:
            return
        measured = capped(self._measured, self._rules.link_bytes_per_s)
        num_layers, block_tokens = self._model.num_layers, self._rules.block_tokens
        for rank, of_rank in enumerate(times):
            if of_rank is None:
                continue
            parts = [part for part in stored.parts if part.rank == rank]
            load_s = sum(
                num_layers * measured.load(part.lease.size_bytes / num_layers) for part in parts
            )
            self._corrections.observe("load", load_s, of_rank.link_s)
            blocks = of_rank.activation_tokens / block_tokens
            project_s = num_layers * measured.project(block_tokens) * blocks
            self._corrections.observe("activations", project_s, of_rank.project_s)
        tiers = {part.tier for part in stored.parts}
        laws: dict[Tier, Affine | None] = {"disk": measured.disk_read, "remote": measured.remote}
        for tier, law in laws.items():
            if tiers == {tier} and law is not None and tier != "host":
                staged_s = sum(map(law, stored.record_bytes)) / self._num_hosts
                self._corrections.observe(tier, staged_s, stored.stage_s)

    def note(self, restored: Restored) -> None:
        """Keep what is told of the last restores, and learn from what they recomputed."""
        self._corrections.observe("ids", restored.recompute_predicted_s, restored.recompute_s)
        self._recent.append(restored)
        self._num_restores += 1
        self._num_tokens += restored.tokens
        self._num_recomputed += restored.recomputed_tokens

    def status(self) -> dict[str, Any]:
        """Return what restores are planned by and what came of the last ones."""
        errors = [
            abs(each.predicted_s / each.measured_s - 1)
            for each in self._recent
            if each.predicted_s is not None and each.measured_s
        ]
        rates = self._rates()
        return {
            "restores": self._num_restores,
            "tokens": self._num_tokens,
            "recomputed_tokens": self._num_recomputed,
            "activation_share": self.activation_share,
            "link_bytes_per_s": None if rates is None else rates.load.bytes_per_s,
            "link_is_simulated": self._rules.link_bytes_per_s is not None,
            "prediction_error": statistics.median(errors) if errors else None,  # of the last ones
            "last": self._recent[-1].line() if self._recent else None,
        }

    def _share(self) -> float:
        """Return the share of new blocks that restores fastest if stored as layer inputs."""
        asked = self._rules.activations
        if asked != "auto":
            return 0.0 if asked == "never" else 1.0
        rates = self._rates()
        if rates is None:
            return 0.0
        tokens, model = self._rules.block_tokens, self._model
        return activation_share(
            activation_bytes=tokens * model.hidden_size * model.kv_element_bytes,
            kv_bytes=tokens * model.kv_bytes_per_token,
            tokens=tokens,
            load=rates.load,
            project=rates.project,
            objective=self._rules.objective,
        )

    def _rates(self) -> RestoreRates | None:
        if self._measured is None:
            return None
        return self._corrections.corrected(capped(self._measured, self._rules.link_bytes_per_s))

    @property
    def _num_hosts(self) -> int:
        return len(set(self._rules.rank_hosts))

    def _task(self, stored: StoredBlocks) -> RestoreTask:
        rules = self._rules
        return RestoreTask(
            num_layers=self._model.num_layers,
            suffix_s=self._suffix_s(stored),
            objective=rules.objective,
            chains=STAGED_FIRST,
            block_tokens=rules.block_tokens,
            step_tokens=rules.max_chunk_tokens,
            step_s=self._chooser.dispatch_s,
            num_ranks=self._spread(stored)[0],
            buffers=LINK_BUFFERS,
            order="interleaved",
        )

    def _segments(self, stored: StoredBlocks, rates: RestoreRates) -> list[Segment]:
        """Return what there is, block by block; like ones have the very same ways."""
        known: dict[object, tuple[Way, ...]] = {}
        ids = self._ids(stored)
        segments = []
        for block in stored.blocks:
            forms = block.sources, block.inputs
            key = tuple(tuple(map(_form, form)) for form in forms)
            if key not in known:
                ways = [self._load(_name(block.sources), block.sources, stored, rates)]
                if block.has_both:
                    ways.append(self._load(ACTIVATIONS, block.inputs, stored, rates))
                known[key] = tuple(ways)
            segments.append(
                Segment(
                    start=block.start,
                    tokens=self._rules.block_tokens,
                    ways=(*known[key], *([] if ids is None else [ids(block.start)])),
                )
            )
        return segments

    def _ids(self, stored: StoredBlocks) -> Callable[[int], Way] | None:
        """Return the way of token ids by position, from prices at some positions."""
        start, end, home = stored.lookup.start, stored.end, stored.lookup.home
        block_tokens = self._rules.block_tokens
        num_points = min(len(stored.blocks), PRICED_POSITIONS)
        stride = -(-len(stored.blocks) // num_points) * block_tokens
        positions = range(start, end, stride)
        prices_s = [self._chunk_s(home, position, stride) for position in positions]
        if None in prices_s:
            return None
        factor = self._corrections.factor("ids") / stride

        def way(position: int) -> Way:
            price_s = prices_s[(position - start) // stride] or 0.0
            return Way(name=IDS, seconds={"device": factor * price_s})

        return way

    def _load(
        self, name: str, sources: Sequence[Source], stored: StoredBlocks, rates: RestoreRates
    ) -> Way:
        """Return what it takes to load a block from these sources."""
        num_layers, ranks_hosts = self._model.num_layers, self._spread(stored)
        num_ranks, num_hosts = ranks_hosts
        uses: defaultdict[Resource, float] = defaultdict(float)
        for source in sources:
            layer_bytes = source.size_bytes / num_layers
            uses["link"] += num_layers * rates.load(layer_bytes) / num_ranks
            if self._rules.copies_compute and self._measured is not None:
                uses["device"] += num_layers * self._measured.load(layer_bytes) / num_ranks
            if source.piece.encoding == STORED_ACTIVATIONS:
                project_s = rates.project(source.end - source.start)
                uses["device"] += num_layers * project_s / num_ranks
            if source.tier == "disk" and rates.disk_read is not None:
                uses["disk"] += rates.disk_read(source.size_bytes) / num_hosts
            if source.tier == "remote" and rates.remote is not None:
                uses["network"] += rates.remote(source.size_bytes) / num_hosts
        tokens = self._rules.block_tokens
        return Way(
            name=name,
            tier="+".join(sorted({source.tier for source in sources})),
            seconds={resource: seconds / tokens for resource, seconds in uses.items()},
        )

    def _spread(self, stored: StoredBlocks) -> tuple[int, int]:
        """Return over how many ranks, and hosts, a prefix is spread."""
        if stored.lookup.home is not None:
            return 1, 1
        return len(self._rules.rank_hosts), self._num_hosts

    def _suffix_s(self, stored: StoredBlocks) -> float:
        """The price of the chunk behind the prefix."""
        left = len(stored.lookup.entry.generation.context()) - stored.end
        count = max(1, min(left, self._rules.max_chunk_tokens))
        return self._chunk_s(stored.lookup.home, stored.end, count) or 0.0

    def _chunk_s(self, home: int | None, start: int, count: int) -> float | None:
        """The predicted seconds of computing so many tokens behind ``start`` others."""
        ranks = len(self._rules.rank_hosts)
        rows = [-(-start // ranks)] * ranks
        if home is not None:
            rows = [start if rank == home else 0 for rank in range(ranks)]
        shape = SequenceShape(new_tokens=count, cached_rows=tuple(rows), whole_rank=home)
        return self._chooser.prefill([shape]).predicted_s


def projected_blocks(plan: RestorePlan, task: RestoreTask) -> frozenset[int]:
    """Return the blocks that are to come as layer inputs, where there is a choice."""
    tokens = task.block_tokens
    return frozenset(
        block
        for part in plan.parts
        if part.way == ACTIVATIONS
        for block in range(part.start // tokens, (part.start + part.tokens) // tokens)
    )


def _name(sources: Sequence[Source]) -> str:
    encodings = {source.piece.encoding for source in sources}
    return ACTIVATIONS if encodings == {STORED_ACTIVATIONS} else KV


def _form(source: Source) -> tuple[object, ...]:
    return source.start, source.end, source.tier, source.size_bytes, source.piece.encoding
