"""What crosses a process border: requests, plans, results, records.

Plans and tokens travel by Ray; tensors never do, they go round the ring.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.draw import Filters
from models.logits import LogitRules
from models.logprobs import TokenLogprobs
from models.sampling import SamplingParams

TokenIds = npt.NDArray[np.int32]
Algorithm = Literal["pass_kv"]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a rank must know to load its model; the same for all but ``rank``."""

    rank: int
    num_ranks: int
    checkpoint: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    page_tokens: int
    threads: int  # of torch, in this rank's process
    ranks_on_host: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None  # None: found from what is free after loading


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a rank says of itself once its weights are loaded."""

    rank: int
    pid: int
    host: str
    device: str
    dtype: str
    weights_bytes: int
    kv_bytes_per_token: int
    kv_memory_bytes: int  # available for pages
    load_s: float


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What the sampling rank needs to choose tokens of one sequence; what is not used is None."""

    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    filters: Filters | None = None
    rules: LogitRules | None = None
    logprobs: int | None = None  # so many of the likeliest are told with each token; -1: all


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One step: compute a prompt's new tokens on all ranks and sample one token.

    An answer that was interrupted goes on with a plan of the prompt and its tokens.
    """

    number: int
    sequence_id: int
    token_ids: TokenIds
    algorithm: Algorithm
    draw: Draw
    sampling_rank: int
    answer_tokens: int = 0  # so many of token_ids, the last ones, are the answer's so far
    prompt_logprobs: int | None = None  # as `Draw.logprobs`, of all token_ids but the first
    release: tuple[int, ...] = ()  # sequences whose pages are given back first


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """A burst of decode steps; it ends early at a stop id."""

    number: int
    sequence_id: int
    token_id: int  # the last token, not computed yet
    position: int  # its position
    index: int  # of the first token to be sampled, within the answer
    owners: tuple[int, ...]  # the rank that keeps the KV, for each step of the burst
    draw: Draw
    sampling_rank: int
    release: tuple[int, ...] = ()


Plan = PrefillPlan | DecodePlan


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One rank's account of a plan; the sampled tokens come from every rank alike."""

    rank: int
    number: int
    token_ids: tuple[int, ...]
    wall_s: float
    parts_s: dict[str, float]
    logprobs: TokenLogprobs | None = None  # of the sampled tokens, from the sampling rank
    prompt_logprobs: TokenLogprobs | None = None  # of the tokens that follow this rank's own


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step was and where its time went; one for every plan, from the first day."""

    number: int
    phase: Literal["prefill", "decode"]
    sequence_ids: tuple[int, ...]
    new_tokens: int  # computed in this step: the chunk of a prefill, the burst of a decode
    cached_tokens: int
    algorithm: str
    num_ranks: int
    predicted_s: float | None
    wall_s: float  # seen by the coordinator
    ranks_wall_s: tuple[float, ...]
    ranks_parts_s: tuple[dict[str, float], ...]

    def line(self) -> str:
        """Return the record as one line for people."""
        ranks = " | ".join(
            f"rank {rank} {wall_s * 1e3:.1f} ms: "
            + " ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in sorted(parts_s.items()))
            for rank, (wall_s, parts_s) in enumerate(
                zip(self.ranks_wall_s, self.ranks_parts_s, strict=True)
            )
        )
        return (
            f"step {self.number} {self.phase} {self.new_tokens} tokens after"
            f" {self.cached_tokens}, {self.algorithm} over {self.num_ranks} ranks,"
            f" {self.wall_s * 1e3:.1f} ms ({ranks})"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with what is asked of its answer. Exactly one of the prompt's forms is set."""

    request_id: str
    text: str | None = None
    token_ids: TokenIds | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the prefill of a request has come."""

    request_id: str
    total_tokens: int
    done_tokens: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """How likely a token was, by the model alone: no sampling parameter has changed it."""

    logprob: float
    rank: int  # 1 is the likeliest token
    decoded_token: str | None  # None where the checkpoint has no tokenizer


Logprobs = dict[int, Logprob]  # of one place: its own token first, then the likeliest


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. ``text`` is empty where the checkpoint has no tokenizer."""

    index: int
    text: str
    token_ids: tuple[int, ...]  # with the one that ended the answer
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None  # the stop token or text; None for EOS and "length"
    logprobs: tuple[Logprobs, ...] | None = None  # of each of token_ids, where asked for
    cumulative_logprob: float | None = None  # of token_ids


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Times of one request, in seconds from its arrival at the coordinator."""

    queue_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request's answers, and how they came about."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    metrics: RequestMetrics
    steps: tuple[StepRecord, ...]
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None  # None for the first token

    def explain(self) -> str:
        """Return what was chosen and measured, step by step."""
        head = (
            f"{self.request_id}: {len(self.prompt_token_ids)} prompt tokens"
            f" ({self.num_cached_tokens} cached), first token after {self.metrics.ttft_s:.3f} s"
        )
        return "\n".join([head, *(record.line() for record in self.steps)])
