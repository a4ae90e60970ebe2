"""The command itself: its kinds and flags, the model, and where results go."""

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.bench import (
    choice,
    conversation,
    offload,
    prediction,
    requests,
    restore,
    restore_report,
    runs,
    serve,
    serve_report,
    speed,
    tiers,
)
from cluster.launch import connect_ray, disconnect_ray
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


@dataclass(frozen=True)
class Kind:
    """One kind of measurement."""

    what: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    # Options, checkpoint, directory for measured rates or files: what to add to the report.
    measure: Callable[[argparse.Namespace, Path, Path], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    has_model: bool = True  # else it takes no --model, starts no Ray, and gets no checkpoint


KINDS = {
    "prefill": Kind(
        "N=1, N=2, the ideal, two threads, transformers",
        lambda parser: speed.add_flags(parser, "1024,4096,16384"),
        speed.measure_prefill,
        runs.ratio_table,
    ),
    "decode": Kind(
        "a step behind a context, against transformers",
        lambda parser: speed.add_flags(parser, "1024,8192,32768"),
        speed.measure_decode,
        runs.ratio_table,
    ),
    "conversation": Kind(
        "a second turn behind a cached first one, against transformers with its cache",
        conversation.add_flags,
        conversation.measure,
        runs.ratio_table,
    ),
    "choice": Kind(
        "pass-KV, pass-Q and what auto chooses, over the miss rate",
        choice.add_flags,
        choice.measure,
        choice.table,
    ),
    "requests": Kind(
        "many requests: time between tokens, throughput against transformers, time outside the"
        " model",
        requests.add_flags,
        requests.measure,
        requests.table,
    ),
    "serve": Kind(
        "a served load through the handle, gRPC and HTTP: latencies, goodput, the doors' cost",
        serve.add_flags,
        serve.measure,
        serve_report.table,
    ),
    "offload": Kind(
        "steps with and without write-behind, and a prompt from the KV store or computed anew",
        offload.add_flags,
        offload.measure,
        runs.ratio_table,
    ),
    "prediction": Kind(
        "predicted against measured seconds, over new and cached tokens",
        prediction.add_flags,
        prediction.measure,
        prediction.table,
    ),
    "kv": Kind(
        "tiers of the KV store against memcpy, TCP and read(); start of a disk tier",
        tiers.add_flags,
        tiers.measure,
        tiers.table,
        has_model=False,
    ),
    "restore": Kind(
        "every way to bring a stored prefix back, over links of many speeds",
        restore.add_flags,
        restore.measure,
        restore_report.table,
        has_model=False,
    ),
}


def add_command(commands: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = commands.add_parser("bench", help="measure on this machine's CPU")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        bench = kinds.add_parser(name, help=kind.what)
        if kind.has_model:
            bench.add_argument(
                "--model", default="width768", help="width768, needle, or a checkpoint"
            )
        kind.add_flags(bench)
        bench.add_argument("--json", action="store_true", help="print JSON, for programs")
        bench.add_argument("--output", type=Path, metavar="DIR", help="write JSON and a picture")
        bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the results; return the exit status."""
    kind = KINDS[options.kind]
    for name, read in _READERS.items():
        if hasattr(options, name):
            setattr(options, name, read(name, getattr(options, name)))
    with tempfile.TemporaryDirectory(prefix="ringspan-bench-") as directory:
        results = _measure(kind, options, Path(directory))
    report = {
        "benchmark": f"ringspan bench {options.kind}",
        "kind": options.kind,
        **({"model": options.model} if kind.has_model else {}),
        "repeats": options.repeats,
        "machine": _machine(),
        **results,
    }
    print(json.dumps(report) if options.json else kind.table(report))
    if options.output is not None:
        _write(report, options)
    return 0


def _measure(kind: Kind, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    runs_already = getattr(options, "url", None) or getattr(options, "target", None)
    if not kind.has_model or runs_already:
        return kind.measure(options, directory / "model", directory / "scratch")
    checkpoint = _checkpoint(options.model, directory / "model")
    owns_ray = connect_ray(None)
    try:
        # Rates are measured now: those of an earlier start may be of a busy machine.
        return kind.measure(options, checkpoint, directory / "profile")
    finally:
        if owns_ray:
            disconnect_ray()


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    from cluster.bench.picture import draw

    options.output.mkdir(parents=True, exist_ok=True)
    of_model = f"_{Path(options.model).name}" if "model" in report else ""
    stem = options.output / f"{options.kind}{of_model}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(KINDS[options.kind].table(report) + "\n")
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


def read_count(name: str, value: int, *, least: int = 1) -> int:
    """Return a number that must not be too small."""
    if value < least:
        raise PromptError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    return value


def read_counts(name: str, text: str, *, least: int = 1) -> list[int]:
    """Return integers of a flag, in their order, each once.

    Raises:
        PromptError: There is none, or one is no integer or too small.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        flag = name.replace("_", "-")
        raise PromptError(f"--{flag} must be integers with commas, got {text!r}") from None
    read_count(name, min(counts), least=least)
    return list(dict.fromkeys(counts))


def read_range(name: str, text: str) -> tuple[int, int]:
    """Return the two ends of a flag's range.

    Raises:
        PromptError: There are not two, or they are no integers >= 1 in ascending order.
    """
    try:
        first, last = (int(word) for word in text.split(","))
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise PromptError(
            f"--{name.replace('_', '-')} must be the least and the most with a comma, both >= 1,"
            f" got {text!r}"
        )
    return first, last


def read_percents(name: str, text: str) -> list[float]:
    """Return percentages of a flag, in their order, each once.

    Raises:
        PromptError: There is none, or one is no number or not in (0, 100].
    """
    try:
        percents = [float(word) for word in text.split(",")]
    except ValueError:
        raise PromptError(f"--{name} must be numbers with commas, got {text!r}") from None
    for percent in percents:
        if not 0 < percent <= 100:
            raise PromptError(f"--{name} must be per cent in (0, 100], got {percent:g}")
    return list(dict.fromkeys(percents))


# By option, whichever kind has it.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "lengths": read_counts,
    "hidden": lambda name, value: read_count(name, value, least=64),
    "layers": read_count,
    "block_tokens": lambda name, value: read_count(name, value, least=16),
    "new": read_counts,
    "cached": lambda name, text: read_counts(name, text, least=0),
    "miss": read_percents,
    "repeats": read_count,
    "sizes_mib": read_counts,
    "pass_mib": read_count,
    "blocks": read_count,
    "steps": read_count,
    "tokens": read_count,
    "new_tokens": read_count,
    "ranks": read_count,
    "streams": read_count,
    "num_prompts": read_count,
    "prompt": read_count,
    # Time between tokens needs two of them.
    "answer": lambda name, value: read_count(name, value, least=2),
    "long": read_count,
    "mixed": read_count,
    "mixed_prompts": read_range,
    "mixed_answers": read_range,
}


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
