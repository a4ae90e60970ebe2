"""``ringspan bench``: prefill and decode, ours against the ideal and against transformers.

All contestants run interleaved in one call, several times; what is compared are
the medians of ratios of runs that followed each other.
"""

import argparse
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import contestants
from cluster.contestants import Contestant, DecodeContestant, Measured
from cluster.launch import connect_ray, disconnect_ray
from models.config import read_model_config
from models.errors import PromptError
from models.needle_checkpoint import write_needle_checkpoint

# A Llama shape that two cores can prefill in seconds.
WIDTH_768 = {
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 8192,
    "max_position_embeddings": 65536,
}


def add_command(commands: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = commands.add_parser("bench", help="measure prefill and decode on this machine's CPU")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, lengths, what in (
        ("prefill", "1024,4096,16384", "N=1, N=2, the ideal, two threads, transformers"),
        ("decode", "1024,8192,32768", "a step behind a context, against transformers"),
    ):
        bench = kinds.add_parser(kind, help=what)
        bench.add_argument("--model", default="width768", help="width768, needle, or a checkpoint")
        bench.add_argument("--lengths", default=lengths, help=f"of the context ({lengths})")
        bench.add_argument("--repeats", type=int, default=5)
        bench.add_argument("--steps", type=int, default=32, help="decode steps of a run (32)")
        bench.add_argument("--json", action="store_true", help="print JSON, for programs")
        bench.add_argument("--output", type=Path, metavar="DIR", help="write JSON and a picture")
        bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the results; return the exit status."""
    lengths = _lengths(options.lengths)
    with tempfile.TemporaryDirectory(prefix="ringspan-bench-") as directory:
        checkpoint = _checkpoint(options.model, Path(directory) / "model")
        owns_ray = connect_ray(None)
        try:
            runs = _measure(options, checkpoint, lengths)
        finally:
            if owns_ray:
                disconnect_ray()
    report = {
        "benchmark": f"ringspan bench {options.kind}",
        "model": options.model,
        "repeats": options.repeats,
        "machine": _machine(),
        "runs": runs,
        "ratios": _ratios(options.kind, runs),
    }
    print(json.dumps(report) if options.json else table(report))
    if options.output is not None:
        _write(report, options)
    return 0


def _measure(
    options: argparse.Namespace, checkpoint: Path, lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Return one entry for each length and contestant, with every run."""
    config = read_model_config(checkpoint)
    rng = np.random.default_rng(0)
    max_tokens = max(lengths) + options.steps
    people: Sequence[Contestant]
    runs: dict[str, Callable[[list[int]], Measured]]
    if options.kind == "prefill":
        people = prefill_people = _prefill_contestants(checkpoint, max_tokens)
        runs = {person.name: person.prefill for person in prefill_people}
    else:
        people = decode_people = _decode_contestants(checkpoint, max_tokens)
        runs = {
            person.name: functools.partial(person.decode, steps=options.steps)
            for person in decode_people
        }
    entries: list[dict[str, Any]] = []
    try:
        for length in lengths:
            ids = rng.integers(0, min(256, config.vocab_size), length).tolist()
            measured: dict[str, list[Measured]] = {name: [] for name in runs}
            if length == lengths[0]:  # warm up
                for run_once in runs.values():
                    run_once(ids)
            for repeat in range(options.repeats):
                for name, run_once in runs.items():
                    measured[name].append(run_once(ids))
                print(f"{length} tokens: round {repeat + 1} of {options.repeats}", file=sys.stderr)
            entries += [_entry(length, name, done) for name, done in measured.items()]
    finally:
        for person in people:
            person.close()
    return entries


def _decode_contestants(checkpoint: Path, max_tokens: int) -> list[DecodeContestant]:
    return [
        _ours("N=2", checkpoint, 2, 1, max_tokens),
        _ours("N=1, 2 threads", checkpoint, 1, 2, max_tokens),
        contestants.Transformers("transformers, 2 threads", checkpoint, 2),
    ]


def _prefill_contestants(checkpoint: Path, max_tokens: int) -> list[Contestant]:
    return [
        *_decode_contestants(checkpoint, max_tokens),
        _ours("N=1", checkpoint, 1, 1, max_tokens),
        contestants.Ideal("ideal N=2", checkpoint, 2, max_tokens),
    ]


def _ours(
    name: str, checkpoint: Path, num_ranks: int, threads: int, max_tokens: int
) -> contestants.Ours:
    return contestants.Ours(
        name,
        checkpoint,
        context_parallel_size=num_ranks,
        threads_per_rank=threads,
        max_model_len=max_tokens + 1,
    )


def _entry(length: int, name: str, measured: list[Measured]) -> dict[str, Any]:
    parts = {part for run in measured for part in run.parts_s}
    return {
        "tokens": length,
        "name": name,
        "seconds": [run.seconds for run in measured],
        "median_s": statistics.median(run.seconds for run in measured),
        "peak_bytes": max(run.peak_bytes for run in measured),
        "parts_s": {
            part: statistics.median(run.parts_s.get(part, 0.0) for run in measured)
            for part in sorted(parts)
        },
    }


def _ratios(kind: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of paired ratios: run i of one contestant over run i of the other."""
    pairs = [("N=1, 2 threads", "N=2"), ("transformers, 2 threads", "N=2")]
    pairs.append(("transformers, 2 threads", "N=1, 2 threads"))
    if kind == "prefill":
        pairs += [("N=1", "N=2"), ("N=2", "ideal N=2"), ("N=1", "ideal N=2")]
    by_key = {(run["tokens"], run["name"]): run["seconds"] for run in runs}
    return [
        {
            "tokens": tokens,
            "of": first,
            "over": second,
            "median": statistics.median(
                a / b for a, b in zip(by_key[tokens, first], by_key[tokens, second], strict=True)
            ),
        }
        for tokens in dict.fromkeys(run["tokens"] for run in runs)
        for first, second in pairs
    ]


def table(report: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [f"{report['benchmark']}, model {report['model']}, {report['machine']['cpu']}", ""]
    lines.append(f"{'tokens':>8}  {'':26}{'median s':>10}{'peak MiB':>10}  where (ms)")
    for run in report["runs"]:
        parts = " ".join(f"{part} {s * 1e3:.1f}" for part, s in run["parts_s"].items())
        lines.append(
            f"{run['tokens']:>8}  {run['name']:26}{run['median_s']:>10.4f}"
            f"{run['peak_bytes'] / 2**20:>10.0f}  {parts}"
        )
    lines += ["", "medians of paired ratios:"]
    lines += [
        f"{r['tokens']:>8}  ({r['of']}) / ({r['over']}) = {r['median']:.3f}"
        for r in report["ratios"]
    ]
    return "\n".join(lines)


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    from cluster.bench_picture import draw

    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"{options.kind}_{Path(options.model).name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(table(report) + "\n")
    draw(report, stem.with_suffix(".png"))


def _checkpoint(model: str, directory: Path) -> Path:
    if model == "needle":
        write_needle_checkpoint(directory)
        return directory
    if model != "width768":
        return Path(model)
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDTH_768)).save_pretrained(directory)
    return directory


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        raise PromptError(f"--lengths must be integers with commas, got {text!r}") from None
    if min(lengths) < 1:
        raise PromptError(f"--lengths must be >= 1, got {min(lengths)}")
    return lengths


def _machine() -> dict[str, str]:
    model = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": f"{model}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }
