"""The needle model over long contexts on one device: exams, and answers by a worker's plans."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from actors.generation import Generation
from actors.messages import WorkerSpec
from actors.worker import GPUWorker
from benchmarks.measure import RowWriter, synchronize
from benchmarks.one_rank import PAGE_TOKENS, SEQUENCE, LoneRing, OneRank, lone_scheduler
from benchmarks.rows import Row
from benchmarks.sizes import Needle, Sizes
from models.needle_checkpoint import write_needle_checkpoint
from models.needle_exam import make_exam
from models.needle_text import make_demo, question
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer

ANSWER_TOKENS = 24  # an answer has 9


def measure_needle(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """For each context: score every question of an exam, and generate one answer."""
    for needle in sizes.needles:
        labels = {"tokens": needle.num_tokens, "dtype": needle.dtype}
        with tempfile.TemporaryDirectory() as directory:
            write_needle_checkpoint(Path(directory), needle.dtype)
            with _worker(Path(directory), device, needle.num_tokens + ANSWER_TOKENS) as worker:
                rows.measure(labels, partial(_exam, needle, worker, device))
                if needle.answer:
                    rows.measure(labels, partial(_answer, needle, worker, Path(directory)))


@contextmanager
def _worker(checkpoint: Path, device: torch.device, num_tokens: int) -> Iterator[GPUWorker]:
    worker = GPUWorker(
        WorkerSpec(
            rank=0,
            num_ranks=1,
            checkpoint=str(checkpoint),
            device="cuda" if device.type == "cuda" else "cpu",
            dtype="auto",
            page_tokens=PAGE_TOKENS,
            piece_bytes=64 * 2**20,
            threads=torch.get_num_threads(),
            ranks_on_host=1,
            gpu_memory_utilization=0.9,
            kv_cache_memory_bytes=None,
        )
    )
    worker.load()
    worker.allocate(-(-num_tokens // PAGE_TOKENS))
    worker.join(LoneRing())
    yield worker


def _exam(needle: Needle, worker: GPUWorker, device: torch.device) -> Row:
    """Every row's prediction of one prefill, against what the exam expects."""
    exam = make_exam(needle.num_tokens, seed=needle.num_tokens)
    model = OneRank(worker._decoder, worker._pool)
    ids_T = torch.tensor(exam.token_ids, device=device)
    model.prefill(ids_T[:PAGE_TOKENS])  # loads the kernels
    synchronize(device)
    start_s = time.perf_counter()
    predictions_T = model.prefill(ids_T, all_rows=True)
    synchronize(device)
    prefill_s = time.perf_counter() - start_s
    score = exam.score(predictions_T.tolist())
    worker._pool.table.release(SEQUENCE)
    return {
        "what": "exam",
        "right": score.all_right,
        "answers": f"{score.answers_right}/{score.answers_total}",
        "probes": f"{score.probes_right}/{score.probes_total}",
        "tally": score.tally_right,
        "prefill_s": prefill_s,
    }


def _answer(needle: Needle, worker: GPUWorker, checkpoint: Path) -> Row:
    """One sentence in the middle of a text, asked for by the plans of a coordinator."""
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    demo = make_demo(needle.num_tokens - ANSWER_TOKENS, seed=1, depths=(0.5,))
    key, expected = demo.questions[0]
    prompt = tokenizer.encode(demo.prompt_text + question(key))
    generation = Generation(
        sequence_id=1,
        prompt=np.asarray(prompt, dtype=np.int32),
        params=SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0),
        seed=0,
        eos_ids=worker._decoder.config.eos_token_ids,
        max_model_len=worker._decoder.config.max_position_embeddings,
    )
    scheduler = lone_scheduler(worker)
    scheduler.add(generation)
    walls_s: list[float] = []
    while step := scheduler.next_step():
        result = worker.execute(step.plan)
        scheduler.advance(step, [result])
        walls_s.append(result.wall_s)
    worker._pool.table.release(generation.sequence_id)
    answer = tokenizer.decode(generation.token_ids)
    decoded = max(1, len(generation.token_ids) - 1)
    return {
        "what": "answer",
        "right": answer == expected,
        "answers": repr(answer),
        "prefill_s": walls_s[0],
        "decode_ms": sum(walls_s[1:]) / decoded * 1e3,
    }
