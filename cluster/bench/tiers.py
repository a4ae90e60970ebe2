"""The tiers of the KV store: their bandwidth as a share of what the system gives, their start."""

import argparse
import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.kv.disk import DiskTier
from actors.kv.disk_file import FileName
from actors.kv.pieces import PieceId
from cluster.bench.runs import entry, heading, interleave
from cluster.bench.tier_passes import (
    LAYOUT,
    MAX_PIECES,
    cached_disk_passes,
    disk_passes,
    memory_passes,
    network_passes,
    shared_pieces,
)

MiB = 2**20
START_GOAL_S = 5.0  # of a disk tier of 20,000 blocks


@dataclass(frozen=True)
class Goal:
    """The share of a yardstick's bandwidth that a tier shall have."""

    tier: str
    yardstick: str
    share: float


GOALS = [
    Goal("own host", "memcpy", 0.8),
    Goal("own host, verified", "memcpy", 0.6),
    Goal("another host", "TCP", 0.6),
    Goal("disk, cached", "read, cached", 0.7),
    Goal("disk", "read", 0.7),
]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument("--sizes-mib", default="4,32", help="of a piece (4,32)")
    parser.add_argument("--pass-mib", type=int, default=256, help="moved at a time (256)")
    parser.add_argument("--repeats", type=int, default=9, help="passes through each tier (9)")
    parser.add_argument("--blocks", type=int, default=20_000, help="on disk at the start (20000)")
    parser.add_argument(
        "--directory", type=Path, help="for the disk tier (the system's for temporary files)"
    )


def measure(options: argparse.Namespace, _: Path | None, scratch: Path) -> dict[str, Any]:
    """Return each tier's passes, their shares of the yardsticks, and the start of a disk tier."""
    directory = options.directory or scratch
    directory.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for size_mib in options.sizes_mib:
        count = min(max(options.pass_mib // size_mib, 1), MAX_PIECES)
        with shared_pieces(size_mib * MiB, count) as pieces:
            # Those that run in turns find memory and page cache as the others left them.
            for tier in (memory_passes, network_passes, cached_disk_passes, disk_passes):
                with tier(pieces, directory) as passes:
                    interleave(passes, [-1])  # warm up
                    measured = interleave(passes, range(options.repeats))
                runs += [
                    entry(name, done, size_mib=size_mib, bytes=len(pieces.source))
                    for name, done in measured.items()
                ]
        print(f"{size_mib} MiB: {options.repeats} rounds", file=sys.stderr)
    return {
        "runs": runs,
        "shares": shares(runs),
        "start": start(directory / "start", options.blocks, options.repeats),
    }


def shares(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians of paired ratios of bandwidths: a tier's over its yardstick's."""
    by_key = {(run["size_mib"], run["name"]): run["seconds"] for run in runs}
    return [
        {
            "size_mib": size_mib,
            "of": goal.tier,
            "over": goal.yardstick,
            "median": statistics.median(
                plain / ours
                for plain, ours in zip(
                    by_key[size_mib, goal.yardstick], by_key[size_mib, goal.tier], strict=True
                )
            ),
            "goal": goal.share,
        }
        for size_mib in dict.fromkeys(run["size_mib"] for run in runs)
        for goal in GOALS
    ]


def start(directory: Path, blocks: int, repeats: int) -> dict[str, Any]:
    """Return how long a disk tier of small files takes to open."""
    tier = DiskTier(directory, 2**62, LAYOUT)
    for index in range(blocks):
        piece = PieceId(hashlib.sha256(b"%d" % index).digest(), 0, 256, "raw")
        # What is in them is not looked at: a file's name says what the index holds.
        name = FileName("0" * 16, piece, 1024, 368, "0" * 32)
        shard = tier.directory / piece.key[:1].hex()
        shard.mkdir(parents=True, exist_ok=True)
        (shard / str(name)).write_bytes(bytes(1024 + 602))
    seconds = []
    for _ in range(repeats):
        tier = DiskTier(directory, 2**62, LAYOUT)
        start_s = time.perf_counter()
        tier.open()
        seconds.append(time.perf_counter() - start_s)
    found = tier.stats()["files"]
    shutil.rmtree(directory)
    if found != blocks:
        raise RuntimeError(f"the disk tier found {found} files of {blocks}")
    return {
        "blocks": blocks,
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "goal_s": START_GOAL_S,
    }


def table(report: dict[str, Any]) -> str:
    """Return bandwidths, shares and the start as text."""
    lines = [heading(report), "", f"{'MiB':>8}  {'':22}{'median s':>10}{'GB/s':>8}"]
    lines += [
        f"{run['size_mib']:>8}  {run['name']:22}{run['median_s']:>10.4f}"
        f"{run['bytes'] / run['median_s'] / 1e9:>8.2f}"
        for run in report["runs"]
    ]
    lines += ["", "medians of paired shares of bandwidth:"]
    lines += [
        f"{share['size_mib']:>8}  ({share['of']}) / ({share['over']}) = {share['median']:.2f}"
        f"  goal {share['goal']:.2f}"
        for share in report["shares"]
    ]
    begun = report["start"]
    lines += [
        "",
        f"a disk tier of {begun['blocks']:,} files opens in {begun['median_s']:.2f} s"
        f"  goal {begun['goal_s']:.0f} s",
    ]
    return "\n".join(lines)
