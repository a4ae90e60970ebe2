"""Many requests at once: time between tokens, throughput, and time outside the model."""

import argparse
from pathlib import Path
from typing import Any

from cluster.bench import latency, latency_report, outside, throughput
from cluster.bench.contestants import VOCABULARY
from cluster.bench.runs import heading
from models.config import read_model_config

THREADS = 2  # of all ranks of a ring, and of transformers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument("--ranks", type=int, default=2, help="of the ring (2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--streams", type=int, default=8, help="short requests, streamed (8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each of them (64)")
    parser.add_argument("--answer", type=int, default=48, help="tokens of each's answer (48)")
    parser.add_argument(
        "--long", type=int, default=16384, help="tokens of the prompt beside them (16384)"
    )
    parser.add_argument("--mixed", type=int, default=16, help="requests of the throughput (16)")
    parser.add_argument(
        "--mixed-prompts", default="32,1024", help="their tokens, least and most (32,1024)"
    )
    parser.add_argument(
        "--mixed-answers", default="16,128", help="tokens of their answers (16,128)"
    )


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return all three parts; the contestants of each run interleaved."""
    # Prompts are of the first ids only: the demo model's others are commands.
    vocabulary = min(VOCABULARY, read_model_config(checkpoint).vocab_size)
    threads = max(1, THREADS // options.ranks)
    return {
        "ranks": options.ranks,
        **latency.measure(options, checkpoint, profile, vocabulary, threads),
        **throughput.measure(options, checkpoint, profile, vocabulary, threads),
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as text."""
    return "\n".join(
        [
            heading(report),
            "",
            *latency_report.lines(report["latency"]),
            "",
            *throughput.lines(report["throughput"]),
            "",
            *outside.lines(report["outside"]),
        ]
    )
