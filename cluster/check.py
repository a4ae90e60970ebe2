"""``ringspan check``: whether the ring gives a model's own answers on this machine.

The model runs on one rank, then on the ring, over the same prompts: random
tokens of several lengths, in which passages come back far from where they first
stood, so that a right next token depends on keys of other ranks. A second turn goes
on behind each answer, over the KV of the first. Tokens and log-probabilities are compared
step by step, for pass-KV and for pass-Q unless the configuration says which.

With a lossy ``kv_cache_dtype`` both sides have it, and what it costs is measured as well
(`cluster.check_loss`): that is no error of the ring.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.messages import CompletionOutput, RequestOutput
from cluster.arguments import add_cluster_flags, cluster_options
from cluster.check_loss import Loss, as_json, describe, measure_loss, text_prompt
from cluster.llm import LLM
from cluster.prompt import Prompt
from configs import load
from models.config import read_model_config
from models.errors import PromptError
from models.sampling import SamplingParams

LENGTHS = (1, 2, 5, 63, 1000, 4097)
PASSAGE_TOKENS = 24
TOP = 10  # log-probabilities compared at every step
# How far apart log-probabilities of the same sum in another order may be.
TOLERANCES = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
# The same where the last bit of a value may round it to another code.
CODE_TOLERANCES = {"auto": 0.0, "int8": 0.05, "fp8": 0.2}


@dataclass(frozen=True)
class Comparison:
    """One prompt on one rank and on the ring."""

    algorithm: str  # of the ring
    cached_tokens: int  # on the ring
    prompt_tokens: int
    answer_tokens: int
    equal_tokens: int  # before the first difference
    gap: float  # between the best two at the first difference, by one rank; 0 where none
    logprob_error: float  # largest difference of a log-probability up to there

    def is_right(self, tolerance: float) -> bool:
        """Say whether only the order of summation tells the two apart."""
        tied = self.equal_tokens == self.answer_tokens or self.gap <= tolerance
        return tied and self.logprob_error <= tolerance


def add_command(commands: Any) -> None:
    """Add ``check`` to the command line."""
    parser = commands.add_parser("check", help="compare the ring with one rank on your own model")
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), help="of the prompts, in tokens"
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer (32)")
    parser.add_argument("--seed", type=int, default=0, help="other prompts for another seed")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="over which the loss of quantised KV is measured (the longest prompt)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, print a verdict; return 0 only if the ring gives the model's own answers."""
    settings = cluster_options(options)
    flags = {key: settings[key] for key in settings.keys() - {"config_file", "overrides"}}
    values = {"model": options.model, **flags}
    config = load(settings["config_file"], values, settings["overrides"])
    num_ranks = config.context_parallel_size
    if num_ranks < 2:
        raise PromptError("check compares one rank with a ring: give -cp 2 or more")
    vocab_size = read_model_config(Path(options.model)).vocab_size
    lengths = _lengths(options.lengths)
    prompts = [passages(length, vocab_size, options.seed) for length in lengths]
    text = {"prompt_token_ids": prompts[-1]} if options.text is None else text_prompt(options.text)
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=0.0, ignore_eos=True, logprobs=TOP
    )
    asked = config.ring.algorithm
    compared: list[Comparison] = []
    alone: list[RequestOutput] = []
    for ranks, algorithm in [
        (1, asked),
        *((num_ranks, each) for each in (("pass_kv", "pass_q") if asked == "auto" else (asked,))),
    ]:
        _say(options, f"running {len(prompts)} prompts, two turns each, on {ranks} rank(s) ...")
        overrides = [*settings["overrides"], f"ring.algorithm={algorithm}"]
        given = {**settings, "overrides": overrides, "context_parallel_size": ranks}
        with LLM(options.model, **given) as llm:
            dtype = llm.info.workers[0].dtype
            turns = _two_turns(llm, prompts, params, alone)
        # One rank may hold shorter prompts only; they come in order of length.
        compared += [compare(*pair, algorithm) for pair in zip(alone, turns, strict=False)]
        alone = alone or turns
    for left_out in lengths[len(alone) // 2 :]:
        _say(options, f"left out: {left_out} prompt tokens do not fit max_model_len on one rank")
    loss = _loss(options, settings, config.kv_cache_dtype, text)
    tolerance = max(TOLERANCES[dtype], CODE_TOLERANCES[config.kv_cache_dtype])
    return report(options, compared, num_ranks, dtype, tolerance, loss)


def _loss(
    options: argparse.Namespace, settings: dict[str, Any], kv_cache_dtype: str, text: Prompt
) -> Loss | None:
    if kv_cache_dtype == "auto":
        return None
    _say(options, f"measuring what kv_cache_dtype={kv_cache_dtype} costs ...")
    return measure_loss(options.model, settings, text, kv_cache_dtype)


def _two_turns(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    alone: Sequence[RequestOutput],
) -> list[RequestOutput]:
    """Return two answers a prompt; the second turn goes on behind the answer of one rank."""
    outputs = []
    for index, prompt in enumerate(prompts):
        if 2 * len(prompt) + 2 * params.max_tokens > llm.info.max_model_len:
            break
        first = llm.generate({"prompt_token_ids": prompt}, params)[0]
        answer = (alone[2 * index] if alone else first).outputs[0].token_ids
        # It goes on with the prompt again, by which a model that copies has something to copy.
        turn = [*prompt, *answer, *prompt[: max(1, len(prompt) // 2)]]
        outputs += [first, llm.generate({"prompt_token_ids": turn}, params)[0]]
    return outputs


def passages(length: int, vocab_size: int, seed: int) -> list[int]:
    """Return random tokens in which passages return a half and a whole prompt later.

    The prompt ends within a passage, so that a model that copies has something
    to copy from far away.
    """
    rng = np.random.default_rng([seed, length])
    ids = rng.integers(0, vocab_size, length)
    passage = rng.integers(0, vocab_size, PASSAGE_TOKENS)
    for start in (length // 50, length // 2):
        room = min(PASSAGE_TOKENS, length - start)
        ids[start : start + room] = passage[:room]
    ending = min(PASSAGE_TOKENS // 2, length)
    ids[length - ending :] = passage[:ending]
    return [int(token_id) for token_id in ids]


def compare(alone: RequestOutput, ring: RequestOutput, algorithm: str) -> Comparison:
    """Compare the two answers to one prompt up to their first different token."""
    one, other = alone.outputs[0], ring.outputs[0]
    steps = len(one.token_ids)
    equal = next((i for i in range(steps) if one.token_ids[i] != other.token_ids[i]), steps)
    errors = [_error(one, other, step) for step in range(min(equal + 1, steps))]
    return Comparison(
        algorithm=algorithm,
        cached_tokens=ring.num_cached_tokens,
        prompt_tokens=len(alone.prompt_token_ids),
        answer_tokens=steps,
        equal_tokens=equal,
        gap=_gap(one, other.token_ids[equal], equal) if equal < steps else 0.0,
        logprob_error=max(errors),
    )


def _error(one: CompletionOutput, other: CompletionOutput, step: int) -> float:
    """The largest difference over the tokens that both sides list at a step."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    first, second = one.logprobs[step], other.logprobs[step]
    return max(abs(first[i].logprob - second[i].logprob) for i in first.keys() & second.keys())


def _gap(one: CompletionOutput, chosen: int, step: int) -> float:
    """How much worse than its own token one rank finds the token that the ring chose."""
    assert one.logprobs is not None
    listed = one.logprobs[step]
    worst = min(entry.logprob for entry in listed.values())
    best = listed[one.token_ids[step]].logprob
    return best - (listed[chosen].logprob if chosen in listed else worst - 1.0)


def report(
    options: argparse.Namespace,
    compared: Sequence[Comparison],
    num_ranks: int,
    dtype: str,
    tolerance: float,
    loss: Loss | None,
) -> int:
    """Print what was compared, and the verdict; return the exit status."""
    right = bool(compared) and all(entry.is_right(tolerance) for entry in compared)
    if options.json:
        told = {
            "model": options.model,
            "num_ranks": num_ranks,
            "dtype": dtype,
            "tolerance": tolerance,
            "exact": right,
            "prompts": [dataclasses.asdict(entry) for entry in compared],
            "loss": as_json(loss),
        }
        print(json.dumps(told))
        return 0 if right else 1
    print(f"{'':10}{'prompt':>8} {'cached':>8} {'equal tokens':>14} {'logprobs differ by':>20}")
    for entry in compared:
        note = "" if entry.is_right(tolerance) else "  WRONG"
        if entry.equal_tokens < entry.answer_tokens:
            note += f"  (gap of {entry.gap:.1e} at the first difference)"
        tokens = f"{entry.equal_tokens} of {entry.answer_tokens}"
        print(
            f"{entry.algorithm:10}{entry.prompt_tokens:>8} {entry.cached_tokens:>8}"
            f" {tokens:>14} {entry.logprob_error:>20.1e}{note}"
        )
    if loss is not None:
        print(describe(loss))
    verdict = "gives this model's own answers" if right else "does NOT give this model's answers"
    print(f"{dtype}: a ring of {num_ranks} ranks {verdict} (tolerance {tolerance:g})")
    return 0 if right else 1


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted(int(word) for word in text.split(","))
    except ValueError:
        raise PromptError(f"--lengths must be integers with commas, got {text!r}") from None
    if lengths[0] < 1:
        raise PromptError(f"--lengths must be >= 1, got {lengths[0]}")
    return lengths


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text)
