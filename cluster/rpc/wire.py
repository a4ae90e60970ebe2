"""Between the messages of ``ringspan.v1`` and our own."""

import dataclasses
from typing import Any, get_args

from actors.messages import FinishReason, Progress, RequestDelta, RequestMetrics
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.reports import read_place, write_place
from models.errors import SamplingError
from models.sampling import SamplingParams

_LISTS = ("stop", "stop_token_ids", "bad_words", "logit_bias")
_FINISH: dict[FinishReason, pb.FinishReason] = {
    reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.upper()}")
    for reason in get_args(FinishReason)
}
_REASONS: dict[int, FinishReason] = {int(value): reason for reason, value in _FINISH.items()}


def write_params(params: SamplingParams) -> pb.SamplingParams:
    """Return the message that says the same.

    Raises:
        SamplingError: A number does not fit 64 bits, or a text cannot be sent.
    """
    message = pb.SamplingParams()
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        try:
            if field.name == "logit_bias":
                message.logit_bias.update(value)
            elif field.name in _LISTS:
                getattr(message, field.name).extend(value)
            elif value is not None:
                setattr(message, field.name, value)
        except ValueError as error:  # out of range; a UnicodeEncodeError is one too
            raise SamplingError(f"{field.name} cannot be sent: {error}") from None
    return message


def read_params(message: pb.SamplingParams) -> SamplingParams:
    """Return what a message says; what is not set has its default.

    Raises:
        SamplingError: A value is outside its range.
    """
    given: dict[str, Any] = {}
    for field in dataclasses.fields(SamplingParams):
        value = getattr(message, field.name)
        if field.name == "logit_bias":
            given[field.name] = dict(value)
        elif field.name in _LISTS:
            given[field.name] = list(value)
        elif message.HasField(field.name):
            given[field.name] = value
    return SamplingParams(**given)


def write_delta(delta: RequestDelta) -> pb.Delta:
    """Return the message of a delta; which request it is of, the stream says."""
    message = pb.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[write_place(place) for place in delta.logprobs or ()],
        prompt_tokens=delta.prompt_tokens,
        cached_tokens=delta.num_cached_tokens,
    )
    if delta.metrics is not None:
        message.metrics.CopyFrom(pb.Metrics(**vars(delta.metrics)))
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH[delta.finish_reason]
    if isinstance(delta.stop_reason, int):
        message.stop_token_id = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_text = delta.stop_reason
    return message


def read_delta(message: pb.Delta, request_id: str, *, with_logprobs: bool) -> RequestDelta:
    """Return the delta that a message is; its log-probabilities where they were asked for."""
    metrics = message.metrics
    logprobs = tuple(read_place(place) for place in message.logprobs) if with_logprobs else None
    stopped_by = message.WhichOneof("stop_reason")
    return RequestDelta(
        request_id=request_id,
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_REASONS.get(int(message.finish_reason)),
        stop_reason=None if stopped_by is None else getattr(message, stopped_by),
        logprobs=logprobs,
        prompt_tokens=message.prompt_tokens,
        num_cached_tokens=message.cached_tokens,
        metrics=(
            RequestMetrics(queue_s=metrics.queue_s, ttft_s=metrics.ttft_s, total_s=metrics.total_s)
            if message.HasField("metrics")
            else None
        ),
    )


def write_progress(progress: Progress, request_id: str) -> pb.RequestProgress:
    """Return the message of a request's progress, under the id that its caller gave it."""
    values = dataclasses.asdict(progress) | {"request_id": request_id}
    return pb.RequestProgress(**values)


def read_progress(message: pb.RequestProgress) -> Progress:
    """Return the progress that a message tells."""
    return Progress(
        request_id=message.request_id,
        total_tokens=message.total_tokens,
        done_tokens=message.done_tokens,
        elapsed_s=message.elapsed_s,
        tokens_per_s=message.tokens_per_s,
        cached_tokens=message.cached_tokens,
        left_s=message.left_s if message.HasField("left_s") else None,
    )
