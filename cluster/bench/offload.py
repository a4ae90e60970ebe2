"""What the KV store costs and what it gives: steps with write-behind, prompts that come back."""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.errors import ClusterError
from cluster.bench.contestants import NewTokens, Ours, closing_all
from cluster.bench.runs import Pair, entry, interleave, paired_ratios
from models.config import read_model_config

PLAIN, STORES = "N=2", "N=2, write-behind"
RESTORED, ANEW = "N=2, from the store", "N=2, computed anew"
DECODE = ", decode"
DECODE_STEPS = 64
SETTLED_S = 1.0  # without a change in the store
PAIRS: list[Pair] = [(STORES, PLAIN), (STORES + DECODE, PLAIN + DECODE)]
RESTORE_PAIRS: list[Pair] = [(ANEW, RESTORED)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is measured."""
    parser.add_argument(
        "--lengths", default="8192", help="of prompts whose blocks are written behind (8192)"
    )
    parser.add_argument(
        "--restored", type=int, default=32768, help="tokens that come back, in all (32768)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")


def measure(options: argparse.Namespace, checkpoint: Path, profile: Path) -> dict[str, Any]:
    """Return each contestant's runs and the ratios of their times.

    With write-behind a run's time ends with its step; the writing of its last blocks goes on
    under the next one's.
    """
    longest = max(*options.lengths, options.restored) + DECODE_STEPS + 1
    start = functools.partial(
        Ours, checkpoint=checkpoint, max_tokens=longest, profile=profile, ranks=2, threads=1
    )
    config = read_model_config(checkpoint)
    token_bytes = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    store_bytes = 2 * token_bytes * longest
    plain, stores = start(PLAIN), start(STORES, store_bytes=store_bytes)
    with closing_all([plain, stores]):
        tokens = NewTokens(config.vocab_size)
        runs = [
            each
            for length in options.lengths
            for each in written(plain, stores, tokens, length, options.repeats)
        ]
        back = restored(plain, stores, tokens, options.restored, options.repeats)
    return {
        "runs": [*runs, *back],
        "ratios": paired_ratios(runs, PAIRS) + paired_ratios(back, RESTORE_PAIRS),
    }


def written(
    plain: Ours, stores: Ours, tokens: NewTokens, length: int, repeats: int
) -> list[dict[str, Any]]:
    """Return entries of prefills and decode steps with and without write-behind."""
    tokens.context(1)
    actions = {each.name: each.prefill for each in (plain, stores)}
    actions |= {
        each.name + DECODE: functools.partial(each.decode, steps=DECODE_STEPS)
        for each in (plain, stores)
    }
    interleave(actions, [tokens(length)])  # warm up
    measured = interleave(actions, (tokens(length) for _ in range(repeats)))
    print(f"{length} tokens written: {repeats} rounds", file=sys.stderr)
    return [entry(name, done, tokens=length) for name, done in measured.items()]


def restored(
    plain: Ours, stores: Ours, tokens: NewTokens, length: int, repeats: int
) -> Sequence[dict[str, Any]]:
    """Return entries of one prompt's time to its first token, from the store and computed."""
    prompt = tokens.context(length)
    stores.first_token(prompt)
    settle(stores)
    actions = {RESTORED: stores.first_token, ANEW: plain.first_token}
    measured = interleave(actions, (prompt for _ in range(repeats)))
    for run in measured[RESTORED]:
        # What was not found would be computed, and measured as something else.
        if run.steps[0].prefill_tokens > length // 8:
            raise ClusterError(
                f"only {run.steps[0].cached_tokens} of {length} tokens came back: is the store"
                " large enough?"
            )
    print(f"{length} tokens restored: {repeats} rounds", file=sys.stderr)
    return [entry(name, done, tokens=length) for name, done in measured.items()]


def settle(stores: Ours) -> None:
    """Wait until nothing is written behind any more."""
    before = None
    while (now := stores.llm.status()["kv_store"]) != before:
        before = now
        time.sleep(SETTLED_S)
