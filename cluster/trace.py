"""``ringspan trace``: answer prompts and say what every rank did when, and which was late."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from actors.errors import TraceError
from actors.trace_summary import TraceSummary
from cluster.arguments import (
    add_cluster_flags,
    add_prompt_flags,
    add_sampling_flags,
    cluster_options,
    prompts,
    sampling_params,
)
from cluster.llm import LLM


def add_command(commands: Any) -> None:
    """Add ``trace`` to the command line."""
    parser = commands.add_parser("trace", help="record what every rank does when")
    add_prompt_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path("trace.json"), metavar="FILE")
    group.add_argument("--json", action="store_true", help="print the summary for programs")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer the prompts, write the trace, print its summary; return the exit status."""
    params, asked = sampling_params(options), prompts(options)
    check_output(options.output)
    with LLM(options.model, **cluster_options(options)) as llm:
        llm.start_trace()
        llm.generate(asked, params, use_tqdm=sys.stderr.isatty())
        summary = finish_trace(llm, options.output)
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return 0
    print(summary.text())
    print(f"written to {options.output}: open it in https://ui.perfetto.dev")
    return 0


def finish_trace(llm: LLM, path: Path) -> TraceSummary:
    """Stop the recording and write it; return its summary.

    Raises:
        TraceError: The file cannot be written.
    """
    trace = llm.stop_trace()
    trace.write(path)
    return trace.summary()


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before the work is done for nothing.

    Raises:
        TraceError: It is a directory, or lies in none, or may not be written.
    """
    directory = path.parent
    if path.is_dir():
        reason = "it is a directory"
    elif not directory.is_dir():
        reason = f"there is no directory {directory}"
    elif not os.access(path if path.exists() else directory, os.W_OK):
        reason = "permission denied"
    else:
        return
    raise TraceError(f"cannot write the trace to {path}: {reason}")
