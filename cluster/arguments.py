"""Flags that several commands share: of the cluster, and of sampling."""

import argparse
from pathlib import Path
from typing import Any

from models.sampling import SamplingParams

# Flag names are configuration keys with dashes for underscores.
CLUSTER_FLAGS: dict[tuple[str, ...], dict[str, Any]] = {
    ("-cp", "--context-parallel-size"): {"type": int, "help": "ranks of the ring (1)"},
    ("-tp", "--tensor-parallel-size"): {"type": int, "help": "only 1 so far"},
    ("--device",): {"help": "auto, cpu or cuda (auto)"},
    ("--dtype",): {"help": "auto, float32, bfloat16 or float16 (auto: the checkpoint's)"},
    ("--max-model-len",): {"type": int, "help": "longest prompt and answer together, in tokens"},
    ("--gpu-memory-utilization",): {"type": float, "help": "share of each GPU to use (0.9)"},
    ("--kv-cache-memory-bytes",): {"type": int, "help": "for KV pages, on each rank"},
}


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that make up the cluster's configuration."""
    group = parser.add_argument_group("cluster")
    for names, settings in CLUSTER_FLAGS.items():
        group.add_argument(*names, **settings)
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML of configuration keys")
    group.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="any key")


def cluster_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `LLM` that the flags ask for, all but the model."""
    keys = [names[-1].removeprefix("--").replace("-", "_") for names in CLUSTER_FLAGS]
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    return {"config_file": options.config, "overrides": options.overrides, **given}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=128, help="of the answer (128)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    group.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Return what the flags ask of an answer.

    Raises:
        SamplingError: A value outside its range.
    """
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is printed."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, for programs")
    group.add_argument("--log-steps", action="store_true", help="print a line for every step")
