"""Flags that several commands share: of the prompts, the cluster, and sampling."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import PromptError, SamplingError
from models.sampling import SamplingParams

if TYPE_CHECKING:  # `ringspan doctor` is to work without torch
    from cluster.prompt import Prompt

# Flag names are configuration keys with dashes for underscores.
CLUSTER_FLAGS: dict[tuple[str, ...], dict[str, Any]] = {
    ("-cp", "--context-parallel-size"): {"type": int, "help": "ranks of the ring (1)"},
    ("-tp", "--tensor-parallel-size"): {"type": int, "help": "only 1 so far"},
    ("--device",): {"help": "auto, cpu or cuda (auto)"},
    ("--dtype",): {"help": "auto, float32, bfloat16 or float16 (auto: the checkpoint's)"},
    ("--max-model-len",): {"type": int, "help": "longest prompt and answer together, in tokens"},
    ("--max-num-seqs",): {"type": int, "help": "answers that run at once (256)"},
    ("--max-num-batched-tokens",): {
        "type": int,
        "help": "computed in one step, over all prompts and answers (8192)",
    },
    ("--gpu-memory-utilization",): {"type": float, "help": "share of each GPU to use (0.9)"},
    ("--kv-cache-dtype",): {"help": "auto, int8 or fp8 (auto: as computed, exact)"},
    ("--kv-cache-memory-bytes",): {"type": int, "help": "for KV pages, on each rank"},
}


def add_prompt_flags(parser: argparse.ArgumentParser, **model: Any) -> None:
    """Add the checkpoint (``model``: further settings of argparse), and the flags of prompts."""
    what = "directory of a Hugging Face checkpoint"
    parser.add_argument("model", metavar="MODEL", help=what, **model)
    parser.add_argument("--prompt", action="append", default=[], help="a text; may be repeated")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument(
        "--prompt-token-ids", action="append", default=[], metavar="1,2,3", help="instead of text"
    )
    parser.add_argument(
        "--cache-salt", metavar="NAME", help="a tenant: prefixes are shared within one only"
    )


def prompts(options: argparse.Namespace) -> "list[Prompt]":
    """Return the prompts that the flags give.

    Raises:
        PromptError: There is none, or one cannot be read.
    """
    given: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    given += [{"prompt": _read(path)} for path in options.prompt_file]
    given += [{"prompt_token_ids": _prompt_ids(text)} for text in options.prompt_token_ids]
    if not given:
        raise PromptError("no prompt: give --prompt, --prompt-file or --prompt-token-ids")
    salt = {} if options.cache_salt is None else {"cache_salt": options.cache_salt}
    return [{**prompt, **salt} for prompt in given]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompt file {path}: {error}") from None


def _prompt_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(f"--prompt-token-ids must be integers, got {text!r}") from None


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


# Flag names are fields of SamplingParams with dashes for underscores.
SAMPLING_FLAGS: dict[str, dict[str, Any]] = {
    "--max-tokens": {"type": int, "default": 128, "help": "of the answer (128)"},
    "--min-tokens": {"type": int, "help": "before EOS or what else stops the answer (0)"},
    "--temperature": {"type": float, "default": 0.0, "help": "0 is greedy (0)"},
    "--top-p": {"type": float, "help": "only the likeliest of this probability together (1)"},
    "--top-k": {"type": int, "help": "only the k likeliest tokens (0: all)"},
    "--min-p": {"type": float, "help": "only tokens with this share of the best one's chance (0)"},
    "--seed": {"type": int, "help": "the same seed draws the same tokens"},
    "--n": {"type": int, "help": "answers of each prompt (1)"},
    "--presence-penalty": {"type": float, "help": "-2 to 2, against tokens of the answer (0)"},
    "--frequency-penalty": {"type": float, "help": "-2 to 2, times how often they came (0)"},
    "--repetition-penalty": {"type": float, "help": "> 1: against tokens of prompt and answer (1)"},
    "--logit-bias": {"metavar": "ID=BIAS,...", "help": "added to logits; or a JSON object"},
    "--bad-words": {"action": "append", "metavar": "TEXT", "help": "barred; may be repeated"},
    "--stop": {"action": "append", "metavar": "TEXT", "help": "ends the answer; may be repeated"},
    "--stop-token-ids": {"metavar": "1,2,3", "help": "end the answer"},
    "--include-stop-str-in-output": {"action": "store_true", "help": "keep what ended the answer"},
    "--ignore-eos": {"action": "store_true", "help": "go on to --max-tokens"},
    "--logprobs": {"type": int, "help": "of so many likeliest tokens at each place (see --json)"},
    "--prompt-logprobs": {"type": int, "help": "the same for the prompt's tokens"},
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    for name, settings in SAMPLING_FLAGS.items():
        group.add_argument(name, **settings)


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Return what the flags ask of an answer.

    Raises:
        SamplingError: A value outside its range.
    """
    keys = [name.removeprefix("--").replace("-", "_") for name in SAMPLING_FLAGS]
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    for key, read in {"logit_bias": _read_bias, "stop_token_ids": _read_ids}.items():
        if key in given:
            given[key] = read(given[key])
    return SamplingParams(**given)


def _read_bias(text: str) -> object:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise SamplingError(f"--logit-bias is not JSON: {error}, got {text!r}") from None
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise SamplingError(
            f"--logit-bias must be ID=BIAS,... or a JSON object, got {text!r}"
        ) from None


def _read_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise SamplingError(f"--stop-token-ids must be integers, got {text!r}") from None


def add_output_flags(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that say what is printed; return their group."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, for programs")
    group.add_argument("--log-steps", action="store_true", help="print a line for every step")
    return group
