"""``ringspan kv``: what KV stores hold, of running clusters or in a directory on disk."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.errors import StoreNotFound
from actors.kv.disk import DiskTier
from actors.kv.disk_layouts import find_layouts
from actors.kv.pieces import Layout
from actors.kv.ray_store import ask_running_stores
from cluster.launch import connect_ray, disconnect_ray
from configs import ConfigError, load

ANSWER_S = 600.0  # a disk is verified in minutes
MiB = 2**20
SILENT = "no answer, or (on disk) no description of its layout: start its store again"
ACTIONS = {
    "stats": "counters and sizes",
    "verify": "verify everything, remove what is bad, and exit with 1 if there was any",
    "clear": "remove everything; what the ranks of a running cluster hold stays on them",
}


def add_command(commands: Any) -> None:
    """Add ``kv`` to the command line."""
    parser = commands.add_parser("kv", help="look at KV stores, verify or clear them")
    parser.add_argument(
        "action",
        choices=ACTIONS,
        metavar="ACTION",
        help="; ".join(f"{name}: {does}" for name, does in ACTIONS.items()),
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster (RAY_ADDRESS): all stores there"
    )
    parser.add_argument(
        "--disk-directory", type=Path, metavar="DIR", help="the files of a store, running or not"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="ray.address or kv_store.disk_directory, instead of the flags",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what is asked; return the exit status, 1 where something is bad or a store is silent."""
    address, directory = _places(options)
    if directory is not None:
        answers = {str(directory): _ask_disk(directory, options.action)}
    else:
        answers = _ask_running(address, options.action)
    if options.json:
        print(json.dumps({options.action: answers}))
    else:
        _print(options.action, answers)
    told = [answer for of in answers.values() for answer in of.values()]
    return 0 if all(_is_good(options.action, answer) for answer in told) else 1


def _places(options: argparse.Namespace) -> tuple[str, Path | None]:
    """Return the address of a Ray cluster, or the directory of a disk tier."""
    unused = [
        word
        for word in options.overrides
        if word.partition("=")[0] not in ("ray.address", "kv_store.disk_directory")
    ]
    if unused:
        raise ConfigError(
            f"ringspan kv takes ray.address and kv_store.disk_directory only, got {unused[0]!r}"
        )
    config = load(overrides=options.overrides)
    address = options.address or config.ray.address
    directory = options.disk_directory or config.kv_store.disk_directory
    if address and directory:
        raise ConfigError(
            "give the address of a Ray cluster or a disk directory, not both: got"
            f" {address} and {directory}"
        )
    if directory:
        return "", Path(directory).expanduser()
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        raise ConfigError(
            "no KV store to look at: give --address (or RAY_ADDRESS) of the Ray cluster on which"
            " it runs, or --disk-directory of its files"
        )
    return address, None


def _ask_running(address: str, action: str) -> dict[str, dict[str, Any]]:
    """Return what each store on a Ray cluster says, by cluster and host."""
    owns_ray = connect_ray(address)
    try:
        answers = ask_running_stores(action, ANSWER_S)
    finally:
        if owns_ray:
            disconnect_ray()
    if not answers:
        raise StoreNotFound(
            f"no KV store runs on the Ray cluster at {address}: a cluster has one where"
            " kv_store.host_memory_bytes is greater than 0"
        )
    return {f"cluster {name}": hosts for name, hosts in answers.items()}


def _ask_disk(directory: Path, action: str) -> dict[str, Any]:
    """Return what is found out of each layout in a disk tier's directory."""
    try:
        layouts = find_layouts(directory)
        return {digest: _ask_tier(directory, layouts[digest], action) for digest in layouts}
    except OSError as error:
        raise StoreNotFound(
            f"cannot read the disk tier {error.filename or directory}: {error.strerror or error};"
            " give the directory that kv_store.disk_directory names"
        ) from None


def _ask_tier(directory: Path, layout: Layout | None, action: str) -> dict[str, Any] | None:
    """Do what is asked with the files of one layout; None where it is not described."""
    if layout is None:
        return None
    tier = DiskTier(directory, sys.maxsize, layout)
    tier.open()
    counts = {
        "stats": lambda: {name: tier.stats()[name] for name in ("files", "bytes")},
        "verify": tier.verify,
        "clear": lambda: {"cleared": tier.clear()},
    }[action]()
    return {"layout": asdict(layout), "disk": counts}


def _is_good(action: str, answer: Mapping[str, Mapping[str, Any]] | None) -> bool:
    if answer is None:
        return False
    return action != "verify" or not any(counts.get("bad") for counts in answer.values())


def _print(action: str, answers: Mapping[str, Mapping[str, Any]]) -> None:
    for place, of in answers.items():
        if not of:
            print(f"nothing is stored in {place}")
        for name, answer in of.items():
            print(f"{place}, {name}:" + (f" {SILENT}" if answer is None else ""))
            for tier, counts in (answer or {}).items():
                print(f"  {tier:7} {_line(counts, with_zeros=action != 'stats')}")


def _line(counts: Mapping[str, Any], *, with_zeros: bool) -> str:
    """Return counters for people; bytes are told in MiB."""
    words = []
    for name, value in counts.items():
        if value == 0 and not with_zeros:
            continue
        is_bytes = name.endswith("bytes")
        label = name.removesuffix("bytes").replace("_", " ").strip()
        words.append(f"{label} {value / MiB:.1f} MiB".strip() if is_bytes else f"{label} {value}")
    return ", ".join(words) or "nothing"
