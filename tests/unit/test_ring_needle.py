"""The needle model over a ring: right answers, and no defect of an engine that goes unseen.

The random-weight tests compare logits; these show *what* a wrong engine would
lose: a sentence across a shard edge, a byte at an exact distance, the verdict of
votes that are spread over the shards.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attention.kernel
import attention.ring_attention
import models.decoder
from attention import RingAttention, Zigzag
from attention.kernel import attend
from attention.ring_attention import PartialSums
from models.config import ModelConfig
from models.decoder import Decoder
from models.layer_attention import PrefillAttention
from models.needle_checkpoint import write_needle_checkpoint
from models.needle_exam import Exam, make_exam
from models.needle_text import make_demo, question
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from tests.thread_cluster import ThreadCluster

DEFECT_TOKENS, DEFECT_RANKS = 1400, 2
# The votes of the winner lie on rank 1 in the first exam, on rank 0 in the second: counting a
# rank twice shows only where it holds the loser's.
EXAM_SEEDS = (0, 2)


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("needle")
    write_needle_checkpoint(directory)
    return directory


def exam_over(num_ranks: int, num_tokens: int, seed: int = 0) -> Exam:
    """An exam whose sentences and probes lie across the edges of this ring's chunks."""
    zigzag = Zigzag(num_tokens=num_tokens, num_ranks=num_ranks)
    return make_exam(num_tokens, seed, [zigzag.bounds(c)[0] for c in range(1, 2 * num_ranks)])


@pytest.mark.parametrize(
    ("num_ranks", "num_tokens"),
    [
        *itertools.product((1, 2, 3), (1024, 4099, 8192)),
        *(
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in itertools.product((1, 2, 3), (16384, 32768))
        ),
    ],
)
def test_every_question_and_probe_is_right(needle: Path, num_ranks: int, num_tokens: int) -> None:
    """Every token of the sharded context was attended to, at its own position, once."""
    exam = exam_over(num_ranks, num_tokens, seed=num_tokens)
    with ThreadCluster(needle, num_ranks) as cluster:
        score = exam.score(cluster.predictions(exam.token_ids))
    assert score.all_right, score


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_is_right_too(tmp_path: Path, dtype: str) -> None:
    write_needle_checkpoint(tmp_path, dtype)
    exam = exam_over(2, 2048)
    with ThreadCluster(tmp_path, 2) as cluster:
        score = exam.score(cluster.predictions(exam.token_ids))
    assert score.all_right, score


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_decoded_answers_are_right(needle: Path, num_ranks: int) -> None:
    """The answers come out of decode too, ended by EOS, and follow-up decode blocks hold."""
    tokenizer = Tokenizer.load(needle)
    assert tokenizer is not None
    demo = make_demo(3000, seed=num_ranks)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    with ThreadCluster(needle, num_ranks, decode_block_tokens=2) as cluster:
        for key, expected in demo.questions:
            prompt = tokenizer.encode(demo.prompt_text + question(key))
            assert tokenizer.decode(cluster.generate(prompt, params)) == expected


@pytest.fixture(scope="module")
def cluster(needle: Path) -> Iterator[ThreadCluster]:
    with ThreadCluster(needle, DEFECT_RANKS) as cluster:
        yield cluster


def test_intact_engine_passes_the_defects_exam(cluster: ThreadCluster) -> None:
    for seed in EXAM_SEEDS:
        exam = exam_over(DEFECT_RANKS, DEFECT_TOKENS, seed)
        assert exam.score(cluster.predictions(exam.token_ids)).all_right


Patch = Callable[[pytest.MonkeyPatch, ThreadCluster], None]
DEFECTS: dict[str, Patch] = {}


def defect(name: str) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        DEFECTS[name] = patch
        return patch

    return register


def _skip_in_layer(patch: pytest.MonkeyPatch, layer: int, *, mlp: bool, attention: bool) -> None:
    """Leave a layer's MLP or attention (or both: the layer) out, on every rank's own thread."""
    real_mlp, real_attention = Decoder._add_mlp, PrefillAttention.__call__

    def add_mlp(self: Decoder, weights: object, x_TE: Tensor, sum_TE: Tensor) -> None:
        if not (mlp and weights is self._weights.layers[layer]):
            real_mlp(self, weights, x_TE, sum_TE)  # type: ignore[arg-type]

    def attend_layer(self: PrefillAttention, index: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        out_THD = real_attention(self, index, q_THD, kv_TJD)
        return torch.zeros_like(out_THD) if attention and index == layer else out_THD

    patch.setattr(Decoder, "_add_mlp", add_mlp)
    patch.setattr(PrefillAttention, "__call__", attend_layer)


for _layer, (_mlp, _attention) in itertools.product(
    range(4), [(True, False), (False, True), (True, True)]
):
    _what = {(True, False): "MLP", (False, True): "attention", (True, True): "whole"}
    DEFECTS[f"{_what[_mlp, _attention]} of layer {_layer} skipped"] = (
        lambda patch, cluster, layer=_layer, mlp=_mlp, attention=_attention: _skip_in_layer(  # type: ignore[misc]
            patch, layer, mlp=mlp, attention=attention
        )
    )


@defect("norm weights ignored")
def _ignore_norms(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    norm = Decoder._norm
    patch.setattr(
        Decoder, "_norm", lambda self, x, weight, bias: norm(self, x, torch.ones_like(weight), bias)
    )


@defect("RoPE pairs interleaved")
def _interleave(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def rotate(x_THD: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> None:
        even, odd = x_THD[..., 0::2].clone(), x_THD[..., 1::2].clone()
        cos, sin = cos_TD2[:, None], sin_TD2[:, None]
        x_THD[..., 0::2], x_THD[..., 1::2] = even * cos - odd * sin, odd * cos + even * sin

    patch.setattr(models.decoder, "apply_rope_", rotate)


@defect("rope_theta of another model")
def _other_theta(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    half = cluster.config.head_dim // 2
    frequencies = 5e5 ** -(torch.arange(half) / half)
    for worker in cluster.workers:
        patch.setattr(worker._decoder, "_inv_freq", frequencies)


@defect("query heads grouped as h % K")
def _group_wrongly(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    config: ModelConfig = cluster.config
    order = torch.arange(config.num_heads).view(-1, config.num_kv_heads).t().flatten()

    def attend_regrouped(q_THD: Tensor, *rest: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        out_THD, lse_TH = attend(q_THD[:, order], *rest, **options)  # type: ignore[arg-type]
        back = order.argsort()
        return out_THD[:, back], lse_TH[:, back]

    patch.setattr(attention.ring_attention, "attend", attend_regrouped)


def _patch_remote(
    patch: pytest.MonkeyPatch,
    act: Callable[[RingAttention, Callable[[Tensor], None], Tensor, int], None],
) -> None:
    """Replace what is done with another rank's keys: ``act(self, attend_them, keys, rank)``."""
    real = RingAttention._add_new

    def add_new(
        self: RingAttention, sums: PartialSums, query_rank: int, keys: Tensor, key_rank: int
    ) -> None:
        def attend_them(keys: Tensor) -> None:
            real(self, sums, query_rank, keys, key_rank)

        if query_rank == key_rank:
            attend_them(keys)
        else:
            act(self, attend_them, keys, key_rank)

    patch.setattr(RingAttention, "_add_new", add_new)


@defect("a shard not attended")
def _lose_shard(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def lose(ring: object, attend_them: Callable[[Tensor], None], keys: Tensor, rank: int) -> None:
        if rank != 1:
            attend_them(keys)

    _patch_remote(patch, lose)


@defect("a shard counted twice")
def _count_twice(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def twice(ring: object, attend_them: Callable[[Tensor], None], keys: Tensor, rank: int) -> None:
        attend_them(keys)
        attend_them(keys)

    _patch_remote(patch, twice)


@defect("the last key of every shard lost")
def _lose_last_key(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def shortened(
        q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, **options: object
    ) -> tuple[Tensor, Tensor]:
        cut = 0 if options.get("causal") else 1
        end = len(k_SKD) - cut
        return attend(q_THD, k_SKD[:end], v_SKD[:end], **options)  # type: ignore[arg-type]

    patch.setattr(attention.ring_attention, "attend", shortened)


@defect("partials averaged without LSE")
def _average(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def average(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        out.add_(part).div_(2)

    patch.setattr(attention.ring_attention, "merge_into", average)


@defect("partials weighted by exp(max) instead of exp(lse)")
def _weigh_by_max(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    def attend_max(
        q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, **options: object
    ) -> tuple[Tensor, Tensor]:
        out_THD, _ = attend(q_THD, k_SKD, v_SKD, **options)  # type: ignore[arg-type]
        k_SHD = k_SKD.repeat_interleave(q_THD.shape[1] // k_SKD.shape[1], dim=1)
        scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD) * q_THD.shape[2] ** -0.5
        if options.get("causal"):
            scores_HTS.masked_fill_(torch.ones(scores_HTS.shape[1:]).triu(1).bool(), -torch.inf)
        return out_THD, scores_HTS.amax(-1).t().contiguous()

    patch.setattr(attention.ring_attention, "attend", attend_max)


@defect("a sliding window of 512 tokens")
def _window(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    """Every rank forgets the keys of remote parts that lie far before its queries."""

    def near(
        ring: RingAttention, attend_them: Callable[[Tensor], None], keys: Tensor, rank: int
    ) -> None:
        zigzag = ring._sequences[0].zigzag
        first = zigzag.positions(ring._ring.rank)[0]
        far = zigzag.positions(rank) < first + DEFECT_TOKENS // 2 - 512
        muted = keys.clone()
        muted[far] = 0
        attend_them(muted)

    _patch_remote(patch, near)


def _positions(patch: pytest.MonkeyPatch, change: Callable[[Zigzag, int], Tensor]) -> None:
    patch.setattr(Zigzag, "positions", change)


@defect("positions restart in every shard")
def _restart(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    _positions(patch, lambda zigzag, rank: torch.arange(zigzag.count(rank)))


@defect("positions of two shards swapped")
def _swap(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    _positions(patch, lambda zigzag, rank: zigzag.indices(1 - rank))


@defect("positions of one shard shifted by one")
def _shift(patch: pytest.MonkeyPatch, cluster: ThreadCluster) -> None:
    _positions(patch, lambda zigzag, rank: zigzag.indices(rank) + rank)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_seen(name: str, cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with this defect fails the exams, so the tests above would be red."""
    DEFECTS[name](monkeypatch, cluster)
    exams = [exam_over(DEFECT_RANKS, DEFECT_TOKENS, seed) for seed in EXAM_SEEDS]
    scores = [exam.score(cluster.predictions(exam.token_ids)) for exam in exams]
    assert not all(score.all_right for score in scores)


def test_missing_bos_is_seen(cluster: ThreadCluster) -> None:
    exam = exam_over(DEFECT_RANKS, DEFECT_TOKENS)
    without_bos = [ord("\n"), *exam.token_ids[1:]]
    assert not exam.score(cluster.predictions(without_bos)).all_right
