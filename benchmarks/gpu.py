"""``python -m benchmarks.gpu``: test and measure everything that one GPU can.

Each section runs in a process of its own: what is broken or slow in one loses
nothing of the others. Results go to benchmarks/results/. Without CUDA this says
what it would do; ``--device cpu --quick`` runs every section at toy sizes.
It needs torch, numpy, safetensors, tokenizers and transformers; no Ray but for restores, which
are skipped without it.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.plan import SECTIONS, START_S, describe
from benchmarks.report import Outcome, add_ratios, status_of, summary, write_files
from benchmarks.rows import read_rows
from benchmarks.sizes import FULL, ON_CPU, QUICK, Sizes

ROOT = Path(__file__).parents[1]
NEED_RATES = {"attention", "prefill", "decode"}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    options = _parse(arguments)
    names = [name for name in SECTIONS if name in options.only and name not in options.skip]
    if NEED_RATES.intersection(names) and "rates" not in names and "rates" not in options.skip:
        names = [name for name in SECTIONS if name in {*names, "rates"}]
    reason = _why_only_plan(options)
    if reason is not None:
        print(f"{reason}: this is what would be done.\n")
        print(describe(QUICK if options.quick else FULL, names))
        return 0
    device = "cpu" if options.device == "cpu" else "cuda"
    sizes = _sizes(device, options.quick)
    if options.section:
        return _run_section(options.section, sizes, device, options.rows)
    return _run_all(names, sizes, device, options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    for flag, default in (("--only", list(SECTIONS)), ("--skip", [])):
        parser.add_argument(
            flag,
            nargs="+",
            choices=list(SECTIONS),
            default=default,
            metavar="SECTION",
            help="of " + ", ".join(SECTIONS),
        )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--plan", action="store_true", help="only say what would be done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--time-limit-s", type=float, default=7200.0, help="of the whole run")
    parser.add_argument("--commit", help="where the checkout itself cannot tell")
    parser.add_argument(
        "--nccl-preload", type=Path, metavar="FILE", help="libnccl.so.2, an .xz of it, or a wheel"
    )
    parser.add_argument("--fetch-nccl", action="store_true", help="download one with pip")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _why_only_plan(options: argparse.Namespace) -> str | None:
    """Return why nothing is run, or None."""
    if options.plan:
        return "--plan"
    if options.device == "cpu":
        return None if options.quick else "Without --quick the sizes are those of a GPU"
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def _sizes(device: str, quick: bool) -> Sizes:
    if device == "cpu":
        return ON_CPU
    return QUICK if quick else FULL


def _run_all(names: list[str], sizes: Sizes, device: str, options: argparse.Namespace) -> int:
    """Run sections one after the other, each in a process; write and print what came of them."""
    import torch

    from benchmarks.machine import facts

    outcomes: dict[str, Outcome] = {}
    end_s = time.monotonic() + options.time_limit_s
    with tempfile.TemporaryDirectory() as directory:
        preload = _preload(options, Path(directory)) if "nccl" in names else {}
        found = facts(torch.device(device), options.commit)
        print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        for name in names:
            left_s = end_s - time.monotonic()
            if left_s < START_S:
                outcomes[name] = Outcome(status="not run", error="no time was left")
                continue
            print(f"{name}: {SECTIONS[name].title}", flush=True)
            timeout_s = min(left_s, SECTIONS[name].timeout_s)
            command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
            command += ["--device", device, *(["--quick"] if options.quick else [])]
            rows = Path(directory) / f"{name}.jsonl"
            command += ["--rows", str(rows)]
            environment = os.environ | (preload if name == "nccl" else {})
            outcomes[name] = _outcome(command, rows, environment, timeout_s)
            add_ratios(outcomes)
            write_files(options.out, found, outcomes)
        path = write_files(options.out, found, outcomes)
    print(f"\n{summary(outcomes)}\n{path} and .md")
    return 0 if all(outcome.status != "failed" for outcome in outcomes.values()) else 1


def _outcome(
    command: list[str], rows_path: Path, environment: dict[str, str], timeout_s: float
) -> Outcome:
    """Run one section's process; return its rows, all those before a failure included."""
    start_s, error = time.monotonic(), ""
    # In a session of its own, so that what it has started ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout_s)
        error = f"its process ended with status {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"not done after {timeout_s:.0f} s"
    finally:
        _end(process)
    rows = read_rows(rows_path)
    return Outcome(
        status=status_of(rows, error), seconds=time.monotonic() - start_s, error=error, rows=rows
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its group, if any of it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _preload(options: argparse.Namespace, directory: Path) -> dict[str, str]:
    """Return the environment that puts another NCCL in the place of torch's."""
    import torch

    from benchmarks.nccl_library import fetched, unpacked

    if options.nccl_preload:
        return {"LD_PRELOAD": str(unpacked(options.nccl_preload, directory))}
    if options.fetch_nccl and torch.version.cuda:
        return {"LD_PRELOAD": str(fetched(torch.version.cuda, directory))}
    return {}


def _run_section(name: str, sizes: Sizes, device_type: str, rows_path: Path) -> int:
    """Run one section in this process."""
    import torch

    from benchmarks import correctness, kernel_rates, llama, needle, restore
    from benchmarks.measure import RowWriter

    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    runners = {
        "nccl": correctness.run_nccl,
        "checks": correctness.run_checks,
        "rates": kernel_rates.measure_rates,
        "attention": kernel_rates.measure_attention,
        "prefill": llama.measure_prefill,
        "decode": llama.measure_decode,
        "restore": restore.measure_restore,
        "needle": needle.measure_needle,
    }
    runners[name](sizes, device, RowWriter(rows_path, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
