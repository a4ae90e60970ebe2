"""A checkpoint: whether it can be served, and on what."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.doctor.finding import Finding, gib, ok, problem, warning


def judge_checkpoint(facts: Mapping[str, Any]) -> list[Finding]:
    """Judge configuration, weights and tokenizer by the facts of the probe ``checkpoint``."""
    errors = facts["errors"]
    if "config" in errors:
        return [problem("model", errors["config"], "see README.md for what is served")]
    told = f"{facts['architecture']}, {gib(facts['weights_bytes'])} of weights in {facts['dtype']}"
    found = [ok("model", f"{told}, up to {facts['max_model_len']} tokens")]
    if "weights" in errors:
        found.append(problem("weights", errors["weights"], "download the checkpoint again"))
    else:
        found.append(ok("weights", f"all files are there, with {facts['tensors']} tensors"))
    if "tokenizer" in errors:
        advice = "download the tokenizer's files again"
        found.append(problem("tokenizer", errors["tokenizer"], advice))
    elif not facts["has_tokenizer"]:
        sentence = "there is none: prompts and answers are token ids, and texts are refused"
        found.append(warning("tokenizer", sentence, "add the tokenizer's files for texts"))
    elif not facts["has_template"]:
        sentence = "it has no chat template: chats are refused, completions are not"
        found.append(warning("tokenizer", sentence, "add a chat_template for chats"))
    else:
        found.append(ok("tokenizer", "it is there, with a chat template"))
    return found


def judge_memory(
    facts: Mapping[str, Any],
    gpus: Sequence[Mapping[str, Any]],
    *,
    num_ranks: int,
    device: str,
    gpu_memory_utilization: float,
    is_local: bool,
) -> Finding:
    """Compare weights and keys and values of one longest sequence with a rank's memory.

    Args:
        facts: Of the probe ``checkpoint``, without an error in its configuration.
        gpus: Of this machine.
        num_ranks: Each has all weights and an even share of the keys and values.
        device: auto, cpu or cuda.
        gpu_memory_utilization: Share of a GPU that is used.
        is_local: Whether all ranks run on this machine; else a rank's host is like this one.
    """
    longest = facts["max_model_len"]
    kv_bytes = facts["kv_bytes_per_token"] * -(-longest // num_ranks)
    needed = (
        f"a rank needs {gib(facts['weights_bytes'])} for weights and {gib(kv_bytes)} for its"
        f" share of {longest} tokens"
    )
    if device != "cpu" and gpus:
        smallest = min(gpus[:num_ranks], key=lambda gpu: gpu["free_bytes"])
        usable = smallest["free_bytes"] - (1 - gpu_memory_utilization) * smallest["total_bytes"]
        where, room, weights = "of the GPU's memory", int(max(0, usable)), facts["weights_bytes"]
    else:
        # Half of what is free is for pages; weights are read before that is reckoned.
        ranks_here = num_ranks if is_local else 1
        where, weights = "of this host's memory, for each rank", facts["weights_bytes"]
        room = 2 * facts["free_bytes"] // ranks_here
        kv_bytes *= 2
    if weights > room:
        sentence = f"{needed}, but {gib(room)} {where} are free: the weights do not fit"
        return problem("memory", sentence, "use a smaller --dtype, or devices with more memory")
    if weights + kv_bytes > room:
        fitting = int(longest * (room - weights) / kv_bytes)
        sentence = f"{needed}, but {gib(room)} {where} are free: {fitting} tokens fit"
        advice = "use more ranks (-cp), or lower --max-model-len"
        # Unless it is asked for, the longest context is what fits.
        judged = problem if facts["is_len_asked"] else warning
        return judged("memory", sentence, advice)
    return ok("memory", f"{needed}; {gib(room)} {where} are free")
