"""What must hold of the engine on a device: kernels, pages, the ring's attention, whole workers.

Each check is a function of the device that raises where it does not hold.
tests/gpu runs them on CUDA under pytest, `benchmarks.gpu` can run them without
pytest, and tests/unit runs them on CPU, so that the checks themselves are right.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from actors.device_memory import available_kv_bytes
from attention import (
    PagedBatch,
    PagedRows,
    PassKVAttention,
    PassQAttention,
    Ring,
    RingAttention,
    RingSequence,
    ThreadRanks,
    Zigzag,
    attend,
)
from attention.paged import copy_page, pages_shape, store_each, store_rows
from attention.quantised import RowEncoding
from attention.timing import PartTimer
from models.draw import Filters, sample
from models.needle_checkpoint import write_needle_checkpoint
from models.needle_exam import make_exam
from models.needle_text import make_demo, question
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from tests.checkpoints import write_llama_checkpoint
from tests.oracle import assert_greedy
from tests.reference import TOLERANCES, causal_mask, random_qkv, softmax_attention
from tests.staged_ring import StagedRing
from tests.thread_cluster import ThreadCluster

Check = Callable[[torch.device], None]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# The float32 kernel of CUDA forms a product as three of TF32: a few bits less than float32.
CUDA_TOLERANCES = TOLERANCES | {FLOAT32: {"rtol": 1e-4, "atol": 2e-5}}


def assert_partial(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """Assert that a float32 partial equals the definition's, in float64."""
    (out, lse), (expected_out, expected_lse) = actual, expected
    assert out.dtype is lse.dtype is FLOAT32
    torch.testing.assert_close(out.cpu().double(), expected_out, **CUDA_TOLERANCES[dtype])
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=2e-4)


def assert_attends(
    qkv: tuple[Tensor, ...], *, causal: bool = False, scale: float | None = None
) -> None:
    """Assert that `attend` returns what the definition says."""
    q, k, v = qkv
    expected = softmax_attention(q, k, v, causal_mask(len(q)) if causal else None, scale)
    assert_partial(attend(q, k, v, causal=causal, scale=scale), expected, q.dtype)


def check_head_dims(device: torch.device, dtype: torch.dtype) -> None:
    """Those of real models, and one that no CUDA kernel takes unpadded."""
    for head_dim in (20, 64, 80, 128, 256):
        qkv = random_qkv(67, 67, head_dim=head_dim, dtype=dtype)
        for causal in (False, True):
            assert_attends(tuple(x.to(device) for x in qkv), causal=causal)


def check_grouped_heads(device: torch.device, dtype: torch.dtype) -> None:
    """Head h reads KV head h // (H / K), with one query as with many."""
    for heads, kv_heads in ((4, 4), (8, 2), (6, 3), (7, 1)):
        for queries in (1, 33):
            qkv = random_qkv(queries, 300, heads=heads, kv_heads=kv_heads, dtype=dtype)
            assert_attends(tuple(x.to(device) for x in qkv))


def check_lengths(device: torch.device, dtype: torch.dtype) -> None:
    """Around the kernels' blocks: a wrong mask there shows in a few rows only."""
    for length in (1, 2, 63, 65, 129, 530):
        qkv = random_qkv(length, length, heads=2, kv_heads=1, head_dim=64, dtype=dtype)
        assert_attends(tuple(x.to(device) for x in qkv), causal=True, scale=0.3)


def check_strided_inputs(device: torch.device, dtype: torch.dtype) -> None:
    """Slices of the fused projection, and rows from the middle, are read where they lie."""
    rng = torch.Generator().manual_seed(0)
    fused_TPD = torch.randn(70, 8, 64, generator=rng).to(device, dtype)
    assert_attends(fused_TPD.split([4, 2, 2], dim=1), causal=True)
    assert_attends(fused_TPD[7:].split([4, 2, 2], dim=1))


def check_empty_sides(device: torch.device, dtype: torch.dtype) -> None:
    """A short prompt leaves chunks empty."""
    for queries, keys in ((0, 4), (4, 0), (0, 0)):
        q, k, v = (x.to(device) for x in random_qkv(queries, keys, dtype=dtype))
        out, lse = attend(q, k, v)
        assert torch.equal(out.cpu(), torch.zeros(queries, 4, 32))
        assert torch.equal(lse.cpu(), torch.full((queries, 4), -torch.inf))


def check_pages(device: torch.device, dtype: torch.dtype) -> None:
    """Read in place, by the paged kernel and gathered; what no row was written to is nan."""
    for capacity, page_ids, queries in (
        (256, [1, 2, 3], 1),
        (256, [6, 2, 5], 1),
        (256, [6, 2, 5], 3),
        (4, [5, 1, 2], 1),
        (4, [0, 1, 2], 2),
    ):
        num_rows = 2 * capacity + 3
        q, k, v = random_qkv(queries, num_rows, head_dim=64, dtype=dtype)
        shape = pages_shape(device, num_pages=8, page_tokens=capacity, num_kv_heads=2, head_dim=64)
        pages = torch.full((2, *shape), torch.nan, dtype=dtype, device=device)
        for of_what, rows in zip(pages, (k, v), strict=True):
            store_rows(of_what, page_ids, 0, rows[:5].to(device))
            store_rows(of_what, page_ids, 5, rows[5:].to(device))
        paged = PagedRows(pages[0], pages[1], page_ids, num_rows)
        assert_partial(paged.attend(q.to(device)), softmax_attention(q, k, v), dtype)
        some = slice(capacity - 1, num_rows - 2)
        partial_ = paged.attend(q.to(device), rows=(some.start, some.stop))
        assert_partial(partial_, softmax_attention(q, k[some], v[some]), dtype)
        copied = torch.empty(some.stop - some.start, 4, 64, dtype=dtype, device=device)
        paged.copy_into(some.start, copied)
        assert torch.equal(copied.cpu(), torch.cat([k, v], dim=1)[some])
        copy_page(pages, page_ids[0], 7, 3)
        copy = PagedRows(pages[0], pages[1], [7], 3).attend(q.to(device))
        assert_partial(copy, softmax_attention(q, k[:3], v[:3]), dtype)


def check_batches(device: torch.device, dtype: torch.dtype) -> None:
    """One query each of sequences of any lengths, one of them without rows, stored at once."""
    for capacity, kv_heads in ((256, 2), (256, 4), (4, 2)):
        runs: list[tuple[list[int], int]] = [([3, 1], capacity + 2), ([], 0), ([6], 1)]
        runs.append(([2, 5, 0], 3 * capacity))
        num_rows = sum(rows for _, rows in runs)
        q, k, v = random_qkv(4, num_rows, kv_heads=kv_heads, head_dim=64, dtype=dtype)
        shape = pages_shape(
            device, num_pages=8, page_tokens=capacity, num_kv_heads=kv_heads, head_dim=64
        )
        pages = torch.full((2, *shape), torch.nan, dtype=dtype, device=device)
        slots = [
            page_ids[row // capacity] * capacity + row % capacity
            for page_ids, rows in runs
            for row in range(rows)
        ]
        store_each(pages, torch.tensor(slots, device=device), torch.cat([k, v], dim=1).to(device))
        parts = (x.split([rows for _, rows in runs]) for x in (k, v))
        expected = [softmax_attention(*qkv) for qkv in zip(q.split(1), *parts, strict=True)]
        outs, lses = zip(*expected, strict=True)
        batch = PagedBatch(runs, page_tokens=capacity, device=device)
        actual = batch.attend(q.to(device), pages[0], pages[1])
        assert_partial(actual, (torch.cat(outs), torch.cat(lses)), dtype)


def check_ring_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Both algorithms over 1 to 3 ranks of this device equal one causal attention.

    Of 281 tokens 70 are cached, spread unevenly and, on rank 0, in pages that lie apart.
    """
    q, k, v = random_qkv(281, 281, head_dim=64, dtype=dtype)
    expected, _ = softmax_attention(q, k, v, causal_mask(281))
    kv_TJD = torch.cat([k, v], dim=1)
    for num_ranks, algorithm in itertools.product((1, 2, 3), (PassKVAttention, PassQAttention)):
        zigzag = Zigzag(num_tokens=211, num_ranks=num_ranks, start=70, first_rank=num_ranks - 1)
        edges = [70 * 3**rank // 3**num_ranks for rank in range(num_ranks)] + [70]
        edges[0] = 0
        held = tuple(b - a for a, b in itertools.pairwise(edges))

        def attend_share(
            ring: Ring,
            zigzag: Zigzag = zigzag,
            edges: list[int] = edges,
            held: tuple[int, ...] = held,
            algorithm: type[RingAttention] = algorithm,
        ) -> Tensor:
            own = zigzag.positions(ring.rank)
            shape = pages_shape(device, num_pages=20, page_tokens=4, num_kv_heads=2, head_dim=64)
            pages = torch.full((2, *shape), torch.nan, dtype=dtype, device=device)
            page_ids = list(range(20))[:: 1 if ring.rank else -1]
            first = edges[ring.rank]
            for of_what, rows in zip(pages, (k, v), strict=True):
                store_rows(of_what, page_ids, 0, rows[first : first + held[ring.rank]].to(device))
            cached = PagedRows(pages[0], pages[1], page_ids, held[ring.rank])
            around_ring = algorithm(
                [RingSequence(zigzag, held)],
                StagedRing(ring),
                PartTimer(device),
                piece_bytes=20 * kv_TJD[0].nbytes,
            )
            return around_ring(q[own].to(device), kv_TJD[own].to(device), [cached]).cpu()

        with ThreadRanks(num_ranks) as ranks:
            for rank, out in enumerate(ranks.run(attend_share)):
                wanted = expected[zigzag.positions(rank)]
                torch.testing.assert_close(out.double(), wanted, **CUDA_TOLERANCES[dtype])


def check_needle_exam(device: torch.device, dtype: torch.dtype) -> None:
    """Every question about a context on one and on two ranks of this device is right."""
    with tempfile.TemporaryDirectory() as directory:
        write_needle_checkpoint(Path(directory), str(dtype).removeprefix("torch."))
        for num_ranks in (1, 2):
            zigzag = Zigzag(num_tokens=2500, num_ranks=num_ranks)
            edges = [zigzag.bounds(chunk)[0] for chunk in range(1, 2 * num_ranks)]
            exam = make_exam(2500, num_ranks, edges)
            with ThreadCluster(Path(directory), num_ranks, device=_type(device)) as cluster:
                score = exam.score(cluster.predictions(exam.token_ids))
            assert score.all_right, f"{num_ranks} ranks: {score}"


def check_decoded_answers(device: torch.device, dtype: torch.dtype) -> None:
    """Answers come out of prefill and decode plans, on one and on two ranks of this device."""
    demo = make_demo(1500, seed=1)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    with tempfile.TemporaryDirectory() as directory:
        write_needle_checkpoint(Path(directory), str(dtype).removeprefix("torch."))
        tokenizer = Tokenizer.load(Path(directory))
        assert tokenizer is not None
        for num_ranks in (1, 2):
            with ThreadCluster(Path(directory), num_ranks, device=_type(device)) as cluster:
                for key, expected in demo.questions[:2]:
                    prompt = tokenizer.encode(demo.prompt_text + question(key))
                    answer = tokenizer.decode(cluster.generate(prompt, params))
                    assert answer == expected, f"{num_ranks} ranks: {answer!r}, not {expected!r}"


def check_llama_equals_transformers(device: torch.device) -> None:
    """Greedy tokens of a random Llama in float32 are those of transformers on CPU."""
    rng = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_llama_checkpoint(Path(directory))
        for num_ranks, length in ((1, 5), (1, 700), (2, 700)):
            prompt = torch.randint(0, 500, (length,), generator=rng).tolist()
            with ThreadCluster(checkpoint, num_ranks, device=_type(device)) as cluster:
                assert_greedy(checkpoint, prompt, cluster.generate(prompt))


def check_quantised_kv(device: torch.device) -> None:
    """A ring that reads codes in pages, chunk after chunk, answers as one prefill does."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 500, (300,), generator=rng).tolist()
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    encodings: tuple[RowEncoding, ...] = ("int8", "fp8")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_llama_checkpoint(Path(directory))
        for encoding in encodings:
            with ThreadCluster(
                checkpoint,
                2,
                device=_type(device),
                kv_cache_dtype=encoding,
                long_prefill_token_threshold=100,
            ) as ring:
                answer = ring.generate(prompt, params)
            with ThreadCluster(
                checkpoint, 1, device=_type(device), kv_cache_dtype=encoding
            ) as alone:
                logits_AV = alone.logits([*prompt, *answer])[len(prompt) - 1 : -1]
            chosen_A = logits_AV.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            # A last bit rounds some values to another code; what codes cost is far more.
            assert (logits_AV.amax(1) - chosen_A).max() < 0.1


def check_restores(device: torch.device) -> None:
    """KV goes to the store behind a step and comes back loaded, projected and recomputed."""
    from actors.kv.messages import RestoreChoice
    from tests.thread_stores import ThreadStores

    rng = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    choice = RestoreChoice(recompute_to=128, takes_activations=frozenset({3, 4, 7}))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_llama_checkpoint(Path(directory), num_key_value_heads=4)
        for ranks, link_bytes_per_s in ((1, None), (2, None), (2, 20e6)):
            prompt = torch.randint(0, 500, (700,), generator=rng).tolist()
            with (
                ThreadStores(
                    checkpoint,
                    block_tokens=64,
                    activation_share=1.0,
                    keeps_both=True,
                    link_bytes_per_s=link_bytes_per_s,
                ) as stores,
                ThreadCluster(
                    checkpoint, ranks, device=_type(device), stores=stores, shares=True
                ) as cluster,
            ):
                prompt += cluster.generate(prompt, params)
                cluster.flush()
                cluster.cache.clear()
                cluster.choose = lambda found: choice
                generation = cluster.add([*prompt, 5, 6, 7], params)
                cluster.run()
                cluster.check_invariants()
            assert generation.num_cached_tokens == 704 - 128
            assert_greedy(checkpoint, [*prompt, 5, 6, 7], generation.token_ids)


def check_sampling_is_the_cpus(device: torch.device) -> None:
    """A seed draws the same tokens on every device."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for index in range(20):
        for filters in (None, Filters(top_k=50, min_p=0.01)):
            here, there = (
                sample(x, temperature=0.8, seed=3, index=index, filters=filters)
                for x in (logits, logits.to(device))
            )
            assert here == there


def check_memory_is_found(device: torch.device) -> None:
    """The page pool is sized from what the device has free."""
    assert available_kv_bytes(device, 0.9, 1) > 2**20


def _type(device: torch.device) -> Literal["cpu", "cuda"]:
    return "cuda" if device.type == "cuda" else "cpu"


_IN_ALL = (
    check_head_dims,
    check_grouped_heads,
    check_lengths,
    check_strided_inputs,
    check_empty_sides,
    check_pages,
    check_batches,
    check_ring_attention,
)
_OF_MODELS = (check_needle_exam, check_decoded_answers)
CHECKS: dict[str, Check] = {
    **{
        f"{check.__name__}[{str(dtype).removeprefix('torch.')}]": partial(check, dtype=dtype)
        for checks, dtypes in (
            (_IN_ALL, (FLOAT32, BFLOAT16, FLOAT16)),
            (_OF_MODELS, (FLOAT32, BFLOAT16)),
        )
        for check in checks
        for dtype in dtypes
    },
    "check_llama_equals_transformers": check_llama_equals_transformers,
    "check_quantised_kv": check_quantised_kv,
    "check_sampling_is_the_cpus": check_sampling_is_the_cpus,
    "check_memory_is_found": check_memory_is_found,
}
with contextlib.suppress(ModuleNotFoundError):  # without these there are no KV stores
    import pyarrow  # noqa: F401
    import xxhash  # noqa: F401

    CHECKS["check_restores"] = check_restores
