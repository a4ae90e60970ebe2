"""Bringing stored prefixes back over the device's own link: `ringspan bench restore` on a GPU."""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import RowWriter
from benchmarks.rows import Row
from benchmarks.shapes import GB
from benchmarks.sizes import Restore, Sizes

NEEDED = ("ray", "omegaconf", "pyarrow", "scipy")  # of the command; the other sections need none


def measure_restore(sizes: Sizes, device: torch.device, rows: RowWriter) -> None:
    """Time to the first token of prompts whose prefix is in the store, as planned and as loaded."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        rows.write({"skipped": f"no {', '.join(missing)}"})
        return
    for restore in sizes.restores:
        labels = {"shape": restore.shape, "tokens": restore.num_tokens}
        rows.measure(labels, partial(_restore, restore, device))


def _restore(restore: Restore, device: torch.device) -> Row:
    from cluster.bench.restore import IDS, JOINT, LOADED, NAIVE, RESIDENT, add_flags, measure

    parser = argparse.ArgumentParser()
    add_flags(parser)
    options = parser.parse_args(["--link", "none", "--device", device.type])
    options.shape, options.lengths = [restore.shape], [restore.num_tokens]
    options.dtype, options.repeats = restore.dtype, restore.repeats
    options.hidden, options.layers = restore.hidden_size, restore.num_layers
    (case,) = measure(options, None, Path())["cases"]
    runs = {run["name"]: run for run in case["runs"]}
    joint, loaded = runs[JOINT], runs[LOADED]
    names = {"resident": RESIDENT, "loaded": LOADED, "naive": NAIVE, "ids": IDS}
    return {
        "ms": joint["median_s"] * 1e3,
        **{f"{key}_ms": runs[name]["median_s"] * 1e3 for key, name in names.items()},
        "best_found_ms": case["found"]["median_s"] * 1e3,
        "of_load": joint["of_strong"],
        "recomputed": max(joint["recomputed"], default=restore.num_tokens),
        "projected": max(joint["projected"], default=0),
        "loaded_gb_per_s": loaded["link_bytes"] / loaded["median_s"] / GB,
    }
