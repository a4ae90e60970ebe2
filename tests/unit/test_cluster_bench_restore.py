"""`ringspan bench restore`: its ways do what they are called, and what is made of their times."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import ClusterError
from actors.profiler import measure as measure_rates
from actors.restore import RestorePlanner, RestoreRules
from attention import ThreadRanks
from cluster.__main__ import main
from cluster.bench.restore import CASES, JOINT, LOADED, QUANTISED, RESIDENT
from cluster.bench.restore_rank import HOST, Rank, load_all
from cluster.bench.restore_report import summary
from cluster.bench.restore_shapes import SHAPES, random_decoder, shape_config
from cluster.bench.restore_splits import Split, forced, fractions, recomputed, solved
from models.kvpr import Objective
from models.rates import Affine, Curve, model_shape
from models.restore_plan import plan_restore
from models.restore_rates import RestoreRates

BLOCK, BLOCKS = 32, 6
NEW = [5, 9, 7, 3]
SMALL = ["--lengths", "192", "--new-tokens", "8", "--repeats", "1", "--block-tokens", "32"]
NARROW = ["--hidden", "64", "--layers", "2"]
# A link and a projection between which a split pays.
RATES = RestoreRates(load=Affine(0.0, 1e6), save=Affine(0.0, 1e9), project=Curve.proportional(1e-5))


StartRank = Callable[[], Rank]


@pytest.fixture(scope="module")
def start_rank() -> Iterator[StartRank]:
    config = shape_config("llama-2", layers=2, hidden_size=64, positions=512, dtype="float32")
    decoder = random_decoder(config, torch.device("cpu"))
    with ThreadRanks(1) as ranks:
        [ring] = ranks.run(lambda ring: ring)
        rates = measure_rates(decoder, ring)
        prefix = np.random.default_rng(0).integers(0, 4096, BLOCK * BLOCKS).tolist()

        def start() -> Rank:
            one = Rank(
                decoder,
                ring,
                rates,
                prefix=prefix,
                new_tokens=len(NEW),
                block_tokens=BLOCK,
                keeps_both=True,
            )
            one.fill()
            return one

        yield start


@pytest.fixture(scope="module")
def rank(start_rank: StartRank) -> Iterator[Rank]:
    one = start_rank()
    yield one
    one.close()


@pytest.fixture
def planner(rank: Rank) -> RestorePlanner:
    rules = RestoreRules(
        method="auto",
        objective="pipelined",
        activations="auto",
        block_tokens=BLOCK,
        max_chunk_tokens=8192,
        rank_hosts=(HOST,),
        copies_compute=False,
    )
    shape = shape_config("llama-2", layers=2, hidden_size=64, positions=512, dtype="float32")
    return RestorePlanner(model_shape(shape, 4), rank.chooser, RATES, rules)


@pytest.mark.parametrize("split", [Split(0, 0), Split(0, 6), Split(0, 3), Split(2, 1), Split(5, 0)])
def test_a_split_is_what_comes_back(rank: Rank, planner: RestorePlanner, split: Split) -> None:
    """Else times would be those of another one; the token is that of the prefix on the device."""
    token = rank.restore(NEW, forced(split, planner))

    assert token.restored is not None
    assert token.restored.recomputed_tokens == split.recomputed * BLOCK
    assert token.restored.projected_tokens == split.projected * BLOCK
    assert token.restored.tokens == (BLOCKS - split.recomputed) * BLOCK
    assert token.token_id == rank.resume(NEW).token_id


def test_all_may_be_computed_anew(rank: Rank, planner: RestorePlanner) -> None:
    token = rank.restore(NEW, forced(Split(BLOCKS, 0), planner))

    assert token.restored is None
    assert token.token_id == rank.resume(NEW).token_id


def test_naively_the_same_comes_back(rank: Rank) -> None:
    """Over a link that is held to a rate, too."""
    rank.open_link(2e7)
    token = rank.restore_naively(NEW, load_all)
    rank.open_link(None)

    assert token.restored is not None
    assert token.restored.tokens == BLOCKS * BLOCK
    assert token.token_id == rank.resume(NEW).token_id


def test_less_than_was_chosen_is_refused(start_rank: StartRank) -> None:
    """A block that is lost is computed, and that is other work."""
    rank = start_rank()

    def choose(found: Any) -> Any:
        block = found.blocks[2]
        rank._kv_store.drop([source.piece for source in (*block.sources, *block.inputs)])
        return load_all(found)

    with pytest.raises(ClusterError, match="of 192 tokens came back"):
        rank.restore(NEW, choose)
    rank.close()


@pytest.mark.parametrize("objective", ["pipelined", "serial"])
def test_what_is_solved_without_ids_recomputes_nothing(
    rank: Rank, planner: RestorePlanner, objective: Objective
) -> None:
    """The paper's own plans know no token ids; by these rates half a split pays."""
    token = rank.restore(NEW, solved(planner, objective=objective))

    assert token.choice is not None
    assert token.choice.recompute_to == 0
    assert token.restored is not None
    assert token.restored.projected_tokens > 0


def test_a_forced_split_is_predicted_by_the_same_model(rank: Rank, planner: RestorePlanner) -> None:
    """A line of predictions that another model draws would say nothing of the planner."""
    problems: list[Any] = []

    def choose(found: Any) -> Any:
        problems.append(planner.problem(found))
        return load_all(found)

    rank.restore(NEW, choose)
    alternatives_s = plan_restore(*problems[0]).alternatives_s
    pure = {"kv": Split(0, 0), "activations": Split(0, BLOCKS), "ids": Split(BLOCKS, 0)}
    for name, split in pure.items():
        predicted_s = split.plan(*problems[0]).predicted_s
        assert predicted_s == pytest.approx(alternatives_s[name])


def test_at_most_nine_splits_are_tried() -> None:
    """Each is measured in every round, and few blocks must not make some the same."""
    for num_blocks in (2, 8, 16, 512):
        tried = [
            *fractions(num_blocks),
            *recomputed(num_blocks, 0.75, (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
        ]
        assert len(tried) <= 9
        assert all(s.recomputed >= 0 and s.recomputed + s.projected <= num_blocks for s in tried)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_their_families(shape: str) -> None:
    """By the bytes of inputs and KV it is decided whether inputs can ever pay."""
    config = shape_config(shape, layers=2, hidden_size=1024, positions=512, dtype="float32")

    narrow = config.hidden_size < 2 * config.num_kv_heads * config.head_dim
    assert narrow == (not shape.startswith("llama-3"))
    assert config.gated_mlp == (not shape.startswith("opt"))
    assert (config.rope is None) == shape.startswith("opt")


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case and contestant, a table, JSON and a picture; nothing is left in shared memory."""
    ours = f"ringspan-*-{os.getpid()}.arena"
    before = set(Path("/dev/shm").glob(ours))
    assert main(["bench", "restore", *SMALL, *NARROW, "--output", str(tmp_path)]) == 0

    table = capsys.readouterr().out
    report = json.loads((tmp_path / "restore.json").read_text())
    assert [case["name"] for case in report["cases"]] == [case.name for case in CASES]
    for case in report["cases"]:
        names = [run["name"] for run in case["runs"]]
        assert names[0] == RESIDENT
        assert {LOADED, JOINT, QUANTISED} < set(names)
        assert case["link_is_simulated"]
        assert all(run["same_tokens"] == 1 for run in case["runs"] if run["name"] != QUANTISED)
    assert table.count("simulated link") == len(CASES)
    assert (tmp_path / "restore.png").read_bytes().startswith(b"\x89PNG")
    assert set(Path("/dev/shm").glob(ours)) == before


def test_a_link_may_be_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU, where nothing is simulated."""
    flags = ["--link", "none", "--shape", "llama-3", "--dtype", "bfloat16"]
    assert main(["bench", "restore", *SMALL, *NARROW, *flags]) == 0
    assert "this machine's own link" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "100"], "whole blocks"),
        (["--new-tokens", "32"], "fewer than a block's 32"),
        (["--shape", "llama-3-8b"], "over --link none"),
        (["--hidden", "8"], "--hidden must be >= 64"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "restore", *SMALL, *flags]) == 1
    assert message in capsys.readouterr().err


def test_targets_are_told_as_met_or_missed() -> None:
    """Less is better but where it is told otherwise; ids-only plans have no error to count."""

    def case(name: str, rho: float | None, narrow: bool, joint: dict[str, Any]) -> dict[str, Any]:
        run = {"name": JOINT, "of_found": 1.0, "of_strong": 0.5, "projected": [0], "errors": [0.1]}
        return {
            "name": name,
            "rho": rho,
            "has_narrow_activations": narrow,
            "runs": [run | joint],
        }

    made = summary(
        [
            case("a", 0.42, True, {"of_strong": 0.7}),
            case("b", 2.2, True, {"of_found": 1.2, "errors": []}),
            case("c", None, False, {"projected": [0, 32], "errors": [0.2, 0.12]}),
        ]
    )

    told = {each["what"]: (each["value"], each["met"]) for each in made}
    assert told["b: joint over best found"] == (1.2, False)
    assert told["a: less than load-only"] == (pytest.approx(0.3), False)
    assert told["c: tokens projected"] == (32, False)
    assert told["prediction error of joint, median"] == (0.12, True)
