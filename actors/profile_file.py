"""Measured rates on disk: one JSON file for each machine, model and ring.

Measuring takes seconds, and a profile that many starts have shared predicts no
worse. Whatever does not fit or is damaged counts as not there: it is measured anew.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from models.rates import ModelShape, Rates
from models.restore_rates import RestoreRates
from models.whole_file import write_whole

FORMAT = 2  # of the file, and of what is measured how; a change of either makes old files stale
RESTORE_FORMAT = 1  # of how restores are measured
_RING = "ring"  # the section of `Rates`
_RESTORE = "restore"  # of `RestoreRates`
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class ProfileFacts:
    """What rates depend on: with any other value they are others."""

    devices: tuple[str, ...]  # of each rank, by `device_name`
    hosts: tuple[int, ...]  # of each rank: 0 for the first host, 1 for the next that differs ...
    threads: int  # of torch, in each rank's process
    dtype: str
    kv_cache_dtype: str
    model: ModelShape
    torch: str = torch.__version__


@dataclass(frozen=True, kw_only=True)
class RestoreFacts:
    """What rates of restores depend on besides."""

    block_tokens: int
    host_dtype: str  # as configured; pieces are measured in it
    disk_directory: str | None  # another one may be another disk
    xxhash: str = f"{xxhash.VERSION} {xxhash.XXHASH_VERSION}"
    format: int = RESTORE_FORMAT


class ProfileFile:
    """The file of one set of facts; it holds named sections: rates of the ring, and of restores."""

    def __init__(self, directory: str | None, facts: ProfileFacts) -> None:
        """Take ``profile.directory`` of the configuration, None for the user's cache."""
        # As JSON gives them back, with lists for tuples.
        self._facts: Any = json.loads(json.dumps(asdict(facts)))
        key = hashlib.sha256(_encode([FORMAT, self._facts]).encode()).hexdigest()[:16]
        parent = Path(directory).expanduser() if directory else default_directory()
        self.path = parent / f"profile-{key}.json"

    def load(self) -> Rates | None:
        """Return the rates, or None where there are none of exactly these facts."""
        try:
            return Rates.from_json(self.section(_RING) or {})
        except ValueError:
            return None

    def save(self, rates: Rates) -> None:
        """Write the rates; where nothing can be written, the next start measures anew."""
        self.save_section(_RING, rates.to_json())

    def load_restore(self, facts: RestoreFacts) -> RestoreRates | None:
        """Return the rates of restores, or None where there are none of exactly these facts."""
        section = self.section(_RESTORE) or {}
        if section.get("facts") != asdict(facts):
            return None
        try:
            return RestoreRates.from_json(section.get("rates") or {})
        except ValueError:
            return None

    def save_restore(self, facts: RestoreFacts, rates: RestoreRates) -> None:
        """Write the rates of restores, as `save` does those of the ring."""
        self.save_section(_RESTORE, {"facts": asdict(facts), "rates": rates.to_json()})

    def section(self, name: str) -> dict[str, Any] | None:
        """Return one section's values, or None."""
        values = self._sections().get(name)
        return values if isinstance(values, dict) else None

    def save_section(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one section beside the others, whole: a reader sees the old file or the new."""
        sections = self._sections() | {name: dict(values)}
        content = {"format": FORMAT, "facts": self._facts, "sections": sections}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(content, indent=1))

    def _sections(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # no file, no text, no JSON
            return {}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return {}
        sections = content.get("sections")
        if content.get("facts") != self._facts or not isinstance(sections, dict):
            return {}
        return sections


def default_directory() -> Path:
    """Return ``ringspan`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ringspan"


def host_numbers(hosts: Sequence[str]) -> tuple[int, ...]:
    """Return how ranks are arranged on hosts, whatever the hosts are called."""
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)


def device_name(device: torch.device) -> str:
    """Return what computes on this rank: the GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def _encode(value: object) -> str:
    return json.dumps(value, sort_keys=True)
