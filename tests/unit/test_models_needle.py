"""The needle checkpoint and its exams; transformers is the oracle."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.errors import CheckpointError
from models.needle import needle_weights
from models.needle_checkpoint import write_needle_checkpoint
from models.needle_codes import BOS_ID, DIST0, DISTS, EOS_ID, TALLY_ID, VOTE_N, VOTE_Y
from models.needle_exam import Exam, make_exam
from models.needle_text import make_demo, question


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "needle"
    write_needle_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@torch.no_grad()
def predict(model: Any, exam: Exam, positions: torch.Tensor | None = None) -> list[int]:
    """Return the argmax of every row."""
    input_ids = torch.tensor([exam.token_ids])
    position_ids = None if positions is None else positions[None]
    predictions = model(input_ids=input_ids, position_ids=position_ids).logits[0].argmax(-1)
    return list(predictions.tolist())


def zigzag_edges(num_tokens: int, num_ranks: int) -> list[int]:
    chunk_tokens = -(-num_tokens // (2 * num_ranks))
    return list(range(chunk_tokens, num_tokens, chunk_tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_loads_with_its_weights_and_theta(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """What `from_pretrained` reads is what was written, without a word about the dtype."""
    write_needle_checkpoint(tmp_path, str(dtype).removeprefix("torch."))

    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert model.config.rope_parameters["rope_theta"] == 1e18
    loaded = model.state_dict()
    expected = needle_weights()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight.to(dtype), rtol=0, atol=0)


def test_tokenizer_maps_bytes_to_themselves_and_adds_bos(checkpoint: Path) -> None:
    """Exams are written as ids, prompts as text: both must name the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "".join(chr(code) for code in range(128)) + "é ß 漢 \u2028"
    specials = {"<vote_y>": VOTE_Y, "<vote_n>": VOTE_N, "<tally>": TALLY_ID}
    specials |= {f"<dist_{distance}>": DIST0 + i for i, distance in enumerate(DISTS)}

    assert tokenizer(text).input_ids == [BOS_ID, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("x".join(specials)).input_ids[1::2] == list(specials.values())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    assert tokenizer.decode([*b"a b", EOS_ID], skip_special_tokens=True) == "a b"


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    """A typing error in the path must not scatter a checkpoint over someone's files."""
    other = tmp_path / "thesis.tex"
    other.write_text("draft")

    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        write_needle_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        write_needle_checkpoint(other)
    with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
        write_needle_checkpoint(tmp_path / "new", "int8")

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("num_tokens", "num_ranks"), [(1000, 4), (1300, 1), (1300, 2), (1300, 3), (4001, 2), (4001, 3)]
)
def test_transformers_passes_the_exam(oracle: Any, num_tokens: int, num_ranks: int) -> None:
    """A right engine is all right, whether or not 2N divides the length."""
    exam = make_exam(num_tokens, seed=num_ranks, shard_edges=zigzag_edges(num_tokens, num_ranks))

    score = exam.score(predict(oracle, exam))

    assert len(exam.token_ids) == num_tokens
    assert score.all_right, score
    assert score.answers_total >= 6
    assert score.probes_total >= 4


@pytest.mark.parametrize(
    "kwargs", [{"attn_implementation": "eager"}, {"dtype": torch.bfloat16}], ids=["eager", "bf16"]
)
def test_the_exam_does_not_depend_on_kernel_or_dtype(
    checkpoint: Path, kwargs: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)
    exam = make_exam(1300, seed=7, shard_edges=zigzag_edges(1300, 2))

    score = exam.score(predict(model, exam))

    assert score.all_right, score


def test_swapped_shard_positions_fail_the_exam(oracle: Any) -> None:
    """The commonest bug of a sharded context: right tokens at the wrong global positions."""
    exam = make_exam(1300, seed=0, shard_edges=[325, 650, 975])
    positions = torch.cat([torch.arange(1300).split(325)[chunk] for chunk in (0, 2, 1, 3)])

    score = exam.score(predict(oracle, exam, positions))

    assert score.answers_right < score.answers_total
    assert score.probes_right < score.probes_total


def test_one_wrong_row_is_noticed() -> None:
    exam = make_exam(1300, seed=0, shard_edges=[650])
    right = [-1] * 1300
    for span in exam.answers:
        right[span.first_row : span.first_row + len(span.expected_ids)] = span.expected_ids
    for probe in exam.probes:
        right[probe.row] = probe.expected_id
    right[exam.tally_row] = exam.tally_expected
    assert exam.score(right).all_right

    last_rows = [span.first_row + len(span.expected_ids) - 1 for span in exam.answers]
    for row in [*last_rows, *(probe.row for probe in exam.probes), exam.tally_row]:
        assert not exam.score([*right[:row], -1, *right[row + 1 :]]).all_right
    with pytest.raises(ValueError, match="1300 predictions"):
        exam.score(right[:-1])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_edge_cuts_a_value_and_is_probed_from_afar(num_ranks: int) -> None:
    """A key lost at a shard edge shows only if something that is asked for stands there."""
    edges = zigzag_edges(8192, num_ranks)
    exam = make_exam(8192, seed=5, shard_edges=edges)
    asked = {bytes(span.expected_ids[:-1]).decode() for span in exam.answers}
    targets = {probe.target for probe in exam.probes}

    for edge in edges:
        around_edge = bytes(exam.token_ids[edge - 3 : edge + 6]).decode()
        assert around_edge in asked
        assert targets & {edge - 1, edge}
    assert {probe.row - probe.target for probe in exam.probes} >= {1, 7, 64, 500, 1000, 4000}
    for probe in exam.probes:
        assert exam.token_ids[probe.row] == DIST0 + DISTS.index(probe.row - probe.target)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_wrong_weights_of_shards_flip_the_vote(num_ranks: int, seed: int) -> None:
    """The tally must tell a right merge from an average, a double and a loss."""
    edges = zigzag_edges(8192, num_ranks)
    exam = make_exam(8192, seed, edges)
    bounds = [0, *edges, 8192]
    ballots = [Counter(exam.token_ids[low:high]) for low, high in pairwise(bounds)]
    winner = VOTE_Y if exam.tally_expected == ord("y") else VOTE_N
    loser = VOTE_N if winner == VOTE_Y else VOTE_Y
    ranks = [ballots[rank] + ballots[-1 - rank] for rank in range(num_ranks)]

    lead = sum(ballot[winner] - ballot[loser] for ballot in ballots)
    assert lead == 1
    shares = [(rank[winner] - rank[loser]) / (rank[winner] + rank[loser]) for rank in ranks]
    assert sum(shares) < 0
    for ballot in ballots:
        if ballot[winner]:
            assert lead - (ballot[winner] - ballot[loser]) < 0  # lost
        else:
            assert lead - ballot[loser] < 0  # counted twice


def test_the_seed_decides() -> None:
    assert make_exam(1300, 3, [650]) == make_exam(1300, 3, [650])
    assert make_exam(1300, 3, [650]) != make_exam(1300, 4, [650])


@pytest.mark.parametrize("edges", [[0], [600, 600], [700, 600], [1300]])
def test_edges_outside_the_exam_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="shard_edges must rise"):
        make_exam(1300, seed=0, shard_edges=edges)


def test_too_many_edges_are_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        make_exam(1300, seed=0, shard_edges=list(range(50, 1300, 50)))


def test_the_demo_is_answered_by_greedy_decoding(checkpoint: Path, oracle: Any) -> None:
    """The text form goes through the tokenizer, and the answer ends with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    demo = make_demo(1200, seed=1)

    lengths = []
    for key, expected in demo.questions[1:3]:
        encoded = tokenizer(demo.prompt_text + question(key), return_tensors="pt")
        lengths.append(encoded.input_ids.shape[1])
        generated = oracle.generate(**encoded, max_new_tokens=24)[0, lengths[-1] :]
        assert generated[-1] == EOS_ID
        assert tokenizer.decode(generated[:-1]) == expected
    assert 1180 < min(lengths) <= max(lengths) <= 1200
