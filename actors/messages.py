"""What crosses a process border: requests, plans, results, records.

Plans and tokens travel by Ray; tensors never do, they go round the ring.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actors.kv.messages import RestoreOrder, RestoreTimes, StoreBlocks
from actors.records import Restored, StepRecord
from attention import Zigzag
from attention.spans import StepSpans
from models.draw import Filters
from models.logits import LogitRules
from models.logprobs import TokenLogprobs
from models.page_pool import KVCacheDtype
from models.page_table import CacheOp
from models.sampling import SamplingParams

TokenIds = npt.NDArray[np.int32]
Algorithm = Literal["pass_kv", "pass_q"]
FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a rank must know to load its model; the same for all but ``rank``."""

    rank: int
    num_ranks: int
    checkpoint: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    page_tokens: int
    piece_bytes: int  # of a message in the ring
    threads: int  # of torch, in this rank's process
    ranks_on_host: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None  # None: found from what is free after loading
    kv_cache_dtype: KVCacheDtype = "auto"


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a rank says of itself once its weights are loaded."""

    rank: int
    pid: int
    host: str
    device: str
    device_name: str
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
class PrefillChunk:
    """New tokens of one sequence, all computed in one step, after those that the ranks hold."""

    sequence_id: int
    token_ids: TokenIds  # the new ones
    cached_rows: tuple[int, ...]  # of each rank, before this chunk
    home: int | None  # the rank that computes it whole; None: it is sharded over the ring
    first_rank: int  # of the zigzag: the rank that holds the last new token
    draw: Draw | None  # None: nothing is sampled yet, more chunks follow
    # All tokens up to here, of which the last answer_tokens are the answer's so far; only where
    # the draw depends on them.
    context_ids: TokenIds | None = None
    answer_tokens: int = 0
    prompt_logprobs: int | None = None  # as `Draw.logprobs`, of the tokens that follow these
    next_token_id: int | None = None  # in the prompt, behind these; None: they are its last
    behind_restored: bool = False  # among earlier rows are some that come back: these are awaited

    @property
    def start(self) -> int:
        """The position of the first new token."""
        return sum(self.cached_rows)

    @property
    def sampling_rank(self) -> int:
        """The rank that holds the last new token, and samples what follows it."""
        return self.first_rank if self.home is None else self.home

    def zigzag(self) -> Zigzag:
        """Return the cut of the new tokens over the ring."""
        return Zigzag(
            num_tokens=len(self.token_ids),
            num_ranks=len(self.cached_rows),
            start=self.start,
            first_rank=self.first_rank,
        )


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One sequence of a burst of decode steps; it leaves the burst at a stop id."""

    sequence_id: int
    token_id: int | None  # the last one, not computed yet; None: that of the plan before this one
    position: int  # its position
    index: int  # of the first token to be sampled, within the answer
    owners: tuple[int, ...]  # the rank that keeps the KV, for each step of the burst
    home: int | None  # the rank that holds all of it and decodes it alone; None: all ranks do
    sampling_rank: int
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all ranks do next: a step over prefill chunks and decode rows, or a burst of decode.

    Where there are chunks every row has one step. Rows may have fewer steps than others.
    """

    number: int
    cache_ops: tuple[CacheOp, ...]  # executed first, in their order
    ended: tuple[int, ...]  # sequences that run no more: the sampler forgets them
    chunks: tuple[PrefillChunk, ...]
    rows: tuple[DecodeRow, ...]
    algorithm: Algorithm  # of the sharded chunks
    stores: tuple[StoreBlocks, ...] = ()  # as the ranks hold them before the operations
    restores: tuple[RestoreOrder, ...] = ()  # begun behind the operations; chunks may wait for them

    @property
    def parts(self) -> "tuple[PrefillChunk | DecodeRow, ...]":
        """Chunks, then rows: the order of results."""
        return (*self.chunks, *self.rows)


@dataclass(frozen=True, kw_only=True)
class SequenceResult:
    """What one rank knows of a sequence after a plan."""

    token_ids: tuple[int, ...]  # sampled; () where this rank took no part, or nothing was sampled
    logprobs: TokenLogprobs | None = None  # of these, from the sampling rank
    prompt_logprobs: TokenLogprobs | None = None  # of the tokens that follow this rank's own
    # The first position whose restored row was damaged: what was computed with it is void.
    bad_from: int | None = None
    restore: RestoreTimes | None = None  # of this rank's part, with the chunk behind it


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One rank's account of a plan."""

    rank: int
    number: int
    sequences: tuple[SequenceResult, ...]  # in the plan's order
    wall_s: float
    parts_s: dict[str, float]
    # Of sequences whose rows come back, the share of layers that is there, 0 to 1.
    restoring: dict[int, float] = field(default_factory=dict)
    spans: StepSpans | None = None  # while a trace is recorded


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with what is asked of its answer.

    Exactly one of the prompt's forms is set; once it is read, a text may have its token ids too.
    """

    request_id: str
    text: str | None = None
    token_ids: TokenIds | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""  # prompts of one salt share their prefixes' KV, of two never
    priority: int = 0  # a lower one goes first
    deadline_s: float | None = None  # from its arrival; then it ends with what it has
    # The answer so far, made by an earlier call with the same seed: the answer goes on behind it,
    # and a stream has only what is new. With n = 1, and without prompt_logprobs.
    answer_ids: tuple[int, ...] = ()
    reports: bool = False  # a stream has a `PromptReport` and a `StepReport` too


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the prefill of a request has come."""

    request_id: str
    total_tokens: int
    done_tokens: int  # reused ones among them; never fewer than told before
    cached_tokens: int  # reused, as far as is known
    elapsed_s: float  # since it began
    tokens_per_s: float  # computed
    left_s: float | None  # until the first token, by prices; None: not begun


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
    finish_reason: FinishReason
    stop_reason: int | str | None = None  # the stop token or text; None for EOS and "length"
    # Of each of token_ids, where asked for; of a continued answer, of those that are new.
    logprobs: tuple[Logprobs, ...] | None = None
    cumulative_logprob: float | None = None  # of the same


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Times of one request, in seconds from its arrival at the coordinator."""

    queue_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What a request's prompt came to."""

    token_ids: TokenIds
    logprobs: tuple[Logprobs | None, ...] | None  # as `RequestOutput.prompt_logprobs`


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """How a complete request came about."""

    steps: tuple[StepRecord, ...]
    restored: Restored | None


@dataclass(frozen=True, kw_only=True)
class RequestDelta:
    """What is new of one answer of a streamed request."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # set in an answer's last delta
    stop_reason: int | str | None = None
    logprobs: tuple[Logprobs, ...] | None = None  # of each of token_ids, where asked for
    prompt_tokens: int = 0  # of the request
    num_cached_tokens: int = 0  # of the prompt of this answer, found on the ranks or restored
    metrics: RequestMetrics | None = None  # set in the request's last delta
    prompt: PromptReport | None = (
        None  # in the first delta of answer 0, where reports are asked for
    )
    report: StepReport | None = None  # in the request's last delta, where they are


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request's answers, and how they came about."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int  # of the prompt, found on the ranks or restored
    metrics: RequestMetrics
    steps: tuple[StepRecord, ...]
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None  # None for the first token
    restored: Restored | None = None  # of all answers; None: nothing

    def explain(self) -> str:
        """Return what was chosen and measured, step by step."""
        head = (
            f"{self.request_id}: {len(self.prompt_token_ids)} prompt tokens"
            f" ({self.num_cached_tokens} cached), first token after {self.metrics.ttft_s:.3f} s"
        )
        restored = [] if self.restored is None else [self.restored.line()]
        return "\n".join([head, *restored, *(record.line() for record in self.steps)])
