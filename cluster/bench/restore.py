"""Prompts whose prefix is only in the store: every way to bring it back, over links of many speeds.

One rank, in this process (`cluster.bench.restore_rank`). On CPU a second process holds the link
to a rate, so that the ratio of link to device is that of another machine:
rho = 2 h v_link / (bytes per element * v_device), with v_device the measured rate of projection.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.errors import ClusterError
from actors.kv.finder import StoredBlocks
from actors.kv.messages import RestoreChoice
from actors.profiler import measure as measure_rates
from actors.restore import RestorePlanner, RestoreRules
from attention import Ring, ThreadRanks
from cluster.bench.restore_cores import on_cores
from cluster.bench.restore_rank import HOST, FirstToken, Rank, load_all
from cluster.bench.restore_report import case_report, summary
from cluster.bench.restore_shapes import (
    LLAMA_2,
    LLAMA_3,
    OPT,
    SHAPES,
    is_scaled,
    random_decoder,
    shape_config,
)
from cluster.bench.restore_splits import (
    RECOMPUTED,
    RECOMPUTED_MUCH,
    Split,
    forced,
    fractions,
    recomputed,
    solved,
)
from cluster.bench.runs import interleave
from models.decoder import Decoder
from models.errors import PromptError
from models.kv_codec import Encoding
from models.rates import Rates, model_shape
from models.restore_rates import RestoreRates

RESIDENT, LOADED, NAIVE, PROJECTED = "resident", "load-only", "load-only, naive", "projection-only"
IDS, HALF, SERIAL, PIPELINED = "ids-only", "fixed half", "serial LP", "pipelined LP"
JOINT, QUANTISED = "joint LP", "quantised, int8"
# A network to which loading takes so many times as long as recomputing: 10 Gbit/s of TCP to a
# Llama 3 8B on an H200, 100K tokens.
SLOWER = 1.5
SCOUTING_ROUNDS = 2  # of splits without recomputing, after which the best fraction is known
BIT_BY_BIT = (LOADED, NAIVE)  # what they bring is what was computed
Choose = Callable[[StoredBlocks], RestoreChoice | None]
Action = Callable[[Sequence[int]], FirstToken]


@dataclass(frozen=True)
class Case:
    """One shape over one link."""

    shape: str
    rho: float | None  # None: a slow network, or a link as it is
    is_slow: bool = False
    divisor: int = 1  # of the prefix's length: over a slow link less of it says as much

    @property
    def name(self) -> str:
        """How tables call it."""
        if self.is_slow:
            return f"{self.shape}, slow network"
        return self.shape if self.rho is None else f"{self.shape}, rho {self.rho:g}"


CASES = (
    Case(OPT, 0.32),
    Case(OPT, 0.735),
    Case(LLAMA_2, 0.42),
    Case(LLAMA_2, 2.2),
    Case(LLAMA_3, None, is_slow=True, divisor=2),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument("--lengths", default="4096", help="of the prefix (4096)")
    parser.add_argument("--new-tokens", type=int, default=64, help="behind it (64)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument(
        "--link", choices=["simulated", "none"], default="simulated", help="none: as it is"
    )
    parser.add_argument(
        "--shape",
        action="append",
        choices=SHAPES,
        help="may be repeated (the scaled ones, each over its links)",
    )
    parser.add_argument("--hidden", type=int, default=1024, help="width of scaled shapes (1024)")
    parser.add_argument("--layers", type=int, default=6, help="of scaled shapes (6)")
    parser.add_argument("--block-tokens", type=int, default=256, help="of a stored block (256)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)"
    )


def measure(options: argparse.Namespace, _: Path | None, __: Path) -> dict[str, Any]:
    """Return every case's runs, and what they come to."""
    if any(length % options.block_tokens for length in options.lengths):
        raise PromptError(f"--lengths must be in whole blocks of {options.block_tokens} tokens")
    if options.new_tokens >= options.block_tokens:
        raise PromptError(
            f"--new-tokens must be fewer than a block's {options.block_tokens}: a block of them"
            " would be stored, and come back to who asks them next"
        )
    chosen = options.shape or [OPT, LLAMA_2, LLAMA_3]
    cases = [case for case in CASES if case.shape in chosen]
    if options.link == "none":
        cases = [Case(shape, None) for shape in chosen]
    elif any(not is_scaled(shape) for shape in chosen):
        raise PromptError("--shape of a full size is measured over --link none")
    reports: list[dict[str, Any]] = []
    for of_shape, divisor in dict.fromkeys((case.shape, case.divisor) for case in cases):
        alike = [case for case in cases if (case.shape, case.divisor) == (of_shape, divisor)]
        for length in options.lengths:
            blocks = max(2, length // options.block_tokens // divisor)
            reports += _shape(options, of_shape, blocks * options.block_tokens, alike)
    return {
        "new_tokens": options.new_tokens,
        "dtype": options.dtype,
        "device": options.device,
        "cases": reports,
        "summary": summary(reports),
    }


def _shape(
    options: argparse.Namespace, shape: str, length: int, cases: Sequence[Case]
) -> Iterator[dict[str, Any]]:
    """Yield what comes of each case of one shape."""
    device = torch.device(options.device)
    config = shape_config(
        shape,
        layers=options.layers,
        hidden_size=options.hidden,
        positions=length + options.new_tokens + 1,
        dtype=options.dtype,
    )
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        [ring] = stack.enter_context(ThreadRanks(1)).run(lambda ring: ring)
        decoder = random_decoder(config, device)
        rates = measure_rates(decoder, ring)
        start = functools.partial(_start, stack, options, decoder, ring, rates, length)
        exact, quantised = start("raw", keeps_both=True), start("int8", keeps_both=False)
        restore_rates = exact.measure()
        for case in cases:
            yield _Case(options, case, exact, quantised, decoder, restore_rates, length).report()


def _start(
    stack: contextlib.ExitStack,
    options: argparse.Namespace,
    decoder: Decoder,
    ring: Ring,
    rates: Rates,
    length: int,
    encoding: Encoding,
    *,
    keeps_both: bool,
) -> Rank:
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab_size, length)
    rank = Rank(
        decoder,
        ring,
        rates,
        prefix=ids.tolist(),
        new_tokens=options.new_tokens,
        block_tokens=options.block_tokens,
        encoding=encoding,
        keeps_both=keeps_both,
    )
    stack.callback(rank.close)
    rank.fill()
    return rank


class _Case:
    """One case while it is measured."""

    def __init__(
        self,
        options: argparse.Namespace,
        case: Case,
        exact: Rank,
        quantised: Rank,
        decoder: Decoder,
        rates: RestoreRates,
        length: int,
    ) -> None:
        """Open its link, and plan by rates that know its speed."""
        self._options, self._case, self._length = options, case, length
        self._exact, self._quantised = exact, quantised
        self._num_blocks = length // options.block_tokens
        self._new_ids = np.random.default_rng(1)
        self._vocab_size = decoder.config.vocab_size
        self._model = model_shape(decoder.config, decoder.dtype.itemsize)
        self._link_bytes_per_s = self._rate(rates)
        for rank in (exact, quantised):
            rank.open_link(self._link_bytes_per_s)
        self._planner = RestorePlanner(
            self._model,
            exact.chooser,
            rates,
            RestoreRules(
                method="auto",
                objective="pipelined",
                activations="auto",
                block_tokens=options.block_tokens,
                max_chunk_tokens=exact.max_chunk_tokens,
                rank_hosts=(HOST,),
                copies_compute=options.device == "cpu",
                link_bytes_per_s=self._link_bytes_per_s,
            ),
        )
        self._planner.warm_up()

    def report(self) -> dict[str, Any]:
        """Measure: a few rounds to find the best fraction, then everybody."""
        num_blocks = self._num_blocks
        with on_cores([self._exact.link, self._quantised.link], self._device) as placing:
            scouts = {split: self._forced(split) for split in fractions(num_blocks)}
            # The planner learns from these rounds, as from every restore; the first warms up.
            scouted = interleave(scouts, [self._suffix() for _ in range(SCOUTING_ROUNDS)])
            best = min(scouted, key=lambda split: min(token.seconds for token in scouted[split]))
            shares = RECOMPUTED_MUCH if self._case.is_slow else RECOMPUTED
            splits = [
                *scouts,
                *recomputed(num_blocks, best.projected / num_blocks, shares),
            ]
            actions = self._actions()
            for split in splits:
                if split not in self._named:
                    actions[split] = self._forced(split)
            interleave({JOINT: self._joint}, [self._suffix()])
            done = interleave(actions, [self._suffix() for _ in range(self._options.repeats)])
            problem = self._problem()
        print(f"{self._case.name}: {self._options.repeats} rounds", file=sys.stderr)
        self._check_tokens(done)
        return case_report(
            self._facts(placing),
            {str(name): runs for name, runs in done.items() if not isinstance(name, Split)},
            {split: done[self._named.get(split, split)] for split in splits},
            problem,
            best.projected / num_blocks,
        )

    @property
    def _device(self) -> torch.device:
        return torch.device(self._options.device)

    @property
    def _named(self) -> dict[Split, str]:
        """Splits that are contestants too."""
        n = self._num_blocks
        return {Split(0, 0): LOADED, Split(0, n): PROJECTED, Split(0, round(0.5 * n)): HALF}

    def _actions(self) -> dict[str | Split, Action]:
        """Return everybody's run."""
        exact, planner = self._exact, self._planner
        named = {name: self._forced(split) for split, name in self._named.items()}
        return {
            RESIDENT: exact.resume,
            LOADED: named[LOADED],
            NAIVE: functools.partial(exact.restore_naively, choose=load_all),
            PROJECTED: named[PROJECTED],
            IDS: self._forced(Split(self._num_blocks, 0)),
            HALF: named[HALF],
            SERIAL: self._learning(solved(planner, objective="serial")),
            PIPELINED: self._learning(solved(planner, objective="pipelined")),
            JOINT: self._joint,
            QUANTISED: functools.partial(self._quantised.restore, choose=load_all),
        }

    def _joint(self, new_ids: Sequence[int]) -> FirstToken:
        return self._learning(self._planner.choose)(new_ids)

    def _forced(self, split: Split) -> Action:
        return self._learning(forced(split, self._planner))

    def _learning(self, choose: Choose) -> Action:
        """Return runs from which the planner learns, as it does from every restore."""

        def run(new_ids: Sequence[int]) -> FirstToken:
            token = self._exact.restore(new_ids, choose)
            if token.stored is not None:
                self._planner.observe(token.stored, token.times)
            if token.restored is not None:
                self._planner.note(token.restored)
            return token

        return run

    def _suffix(self) -> list[int]:
        ids: list[int] = self._new_ids.integers(
            0, self._vocab_size - 1, self._options.new_tokens
        ).tolist()
        return ids

    def _problem(self) -> Any:
        """What the planner solves by now."""
        found: list[StoredBlocks] = []

        def look(stored: StoredBlocks) -> RestoreChoice:
            found.append(stored)
            return load_all(stored)

        self._exact.restore(self._suffix(), look)
        return self._planner.problem(found[0])

    def _check_tokens(self, done: dict[Any, list[FirstToken]]) -> None:
        """Refuse a run whose token is not that of the prefix on the device.

        Raises:
            ClusterError: There is one, of a way that loses nothing.
        """
        # With fewer bits the rounding of a projection over other rows may change a token.
        is_exact = self._options.dtype == "float32"
        for name, tokens in done.items():
            expected = [token.token_id for token in done[RESIDENT]]
            must_match = name in BIT_BY_BIT or (is_exact and name != QUANTISED)
            if must_match and [token.token_id for token in tokens] != expected:
                raise ClusterError(
                    f"{self._case.name}: with {name} the first tokens were"
                    f" {[token.token_id for token in tokens]}, not {expected}"
                )

    def _rate(self, rates: RestoreRates) -> float | None:
        """Return the link's rate that gives the case's ratio to this device."""
        case, model, tokens = self._case, self._model, self._options.block_tokens
        if case.is_slow:
            ids_s = self._ids_s()
            prefix_bytes = model.num_layers * model.kv_bytes_per_token * self._length
            return prefix_bytes / (SLOWER * ids_s)
        if case.rho is None:
            return None
        projected_flops = 4 * model.hidden_size * model.num_kv_heads * model.head_dim * tokens
        flops_per_s = projected_flops / rates.project(tokens)
        return case.rho * model.kv_element_bytes * flops_per_s / (2 * model.hidden_size)

    def _ids_s(self) -> float:
        """The seconds of recomputing the prefix, by measuring it once."""
        self._exact.open_link(None)
        return self._exact.restore(self._suffix(), lambda _: None).seconds

    def _facts(self, placing: str) -> dict[str, Any]:
        model, rate = self._model, self._link_bytes_per_s
        return {
            "name": self._case.name,
            "shape": self._case.shape,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "tokens": self._length,
            "block_tokens": self._options.block_tokens,
            "rho": self._case.rho,
            "link_bytes_per_s": rate,
            "link_is_simulated": rate is not None,
            "placing": placing,
            "activation_share": self._planner.activation_share,  # that would be stored
            "has_narrow_activations": model.hidden_size < 2 * model.num_kv_heads * model.head_dim,
        }
