"""Which gRPC status an error of ours is, and which error of ours a status.

The class travels in the trailing metadata, so that a client raises what `LLM` raises.
Nothing else of an error does: a status has one sentence for people, never a traceback.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from actors.errors import ClusterError, QueueFull, RankLost, StepFailed, UnknownRequest
from cluster.api_keys import Unauthenticated
from models.errors import PromptError, RingspanError, SamplingError

LOG = logging.getLogger(__name__)
ERROR_KEY = "ringspan-error"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRPC's own name for when another try may succeed
RETRY_MS = 1000
# A status is a header, and headers have a size limit: an echoed value must not exceed it.
SENTENCE_CHARACTERS = 500


class LimitExceeded(PromptError):
    """A request is larger than this server takes."""


class ServerUnavailable(ClusterError):
    """No server answers, or it is about to stop; another try may succeed."""


# The first class that an error is an instance of decides. Its code, and whether a retry may help.
_CODES: tuple[tuple[type[RingspanError], grpc.StatusCode, bool], ...] = (
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, False),
    (LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, False),
    (PromptError, grpc.StatusCode.INVALID_ARGUMENT, False),
    (SamplingError, grpc.StatusCode.INVALID_ARGUMENT, False),
    (QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED, True),
    (UnknownRequest, grpc.StatusCode.NOT_FOUND, False),
    (ServerUnavailable, grpc.StatusCode.UNAVAILABLE, True),
    (RankLost, grpc.StatusCode.UNAVAILABLE, False),
    (StepFailed, grpc.StatusCode.UNAVAILABLE, False),
    (ClusterError, grpc.StatusCode.UNAVAILABLE, False),
)
_CLASSES = {kind.__name__: kind for kind, _, _ in _CODES}
# What a connection that breaks may look like; a server's own word has `ERROR_KEY` beside it.
_BROKEN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,  # a reset of the HTTP/2 stream
}
_WITHOUT_WORD: dict[grpc.StatusCode, type[RingspanError]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,  # gRPC's own limit of a message
    grpc.StatusCode.INVALID_ARGUMENT: PromptError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.NOT_FOUND: UnknownRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: ServerUnavailable,
    grpc.StatusCode.UNIMPLEMENTED: ServerUnavailable,
} | dict.fromkeys(_BROKEN, ServerUnavailable)


@dataclass(frozen=True)
class Status:
    """What a call ends with that has no result."""

    code: grpc.StatusCode
    sentence: str
    metadata: tuple[tuple[str, str], ...]


class CallError(Protocol):
    """What `grpc` and `grpc.aio` raise alike."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def status_of(error: Exception) -> Status:
    """Return the status that tells a client of an error; what is not for it goes to the log."""
    if not isinstance(error, RingspanError):
        LOG.error("a call failed", exc_info=error)
        error = ClusterError("the server failed: its log says why")
    elif type(error) is ClusterError:
        LOG.error("a call failed: %s", error)
        error = ClusterError("the cluster failed: the server's log says why")
    kind, code, may_retry = next(
        (entry for entry in _CODES if isinstance(error, entry[0])),
        (ClusterError, grpc.StatusCode.UNAVAILABLE, False),
    )
    pushback = ((PUSHBACK_KEY, str(RETRY_MS)),) if may_retry else ()
    sentence = str(error)
    if len(sentence) > SENTENCE_CHARACTERS:
        sentence = sentence[: SENTENCE_CHARACTERS - 4] + " ..."
    return Status(code, sentence, ((ERROR_KEY, kind.__name__), *pushback))


def error_of(error: CallError, target: str) -> RingspanError:
    """Return the error that a status tells of."""
    told = _metadata(error).get(ERROR_KEY)
    sentence = error.details() or error.code().name
    if told in _CLASSES:
        return _CLASSES[told](sentence)
    kind = _WITHOUT_WORD.get(error.code(), ClusterError)
    if kind is ServerUnavailable:
        sentence = f"the server at {target} does not answer: {sentence}"
    return kind(sentence)


def is_broken(error: CallError) -> bool:
    """Whether another try may take up what this call left: its connection or server went away."""
    told = _metadata(error).get(ERROR_KEY)
    if told is not None:
        return told == ServerUnavailable.__name__
    return error.code() in _BROKEN


def retry_s(error: CallError) -> float | None:
    """Return after how many seconds the server wants another try; None: it does not say."""
    told = _metadata(error).get(PUSHBACK_KEY, "")
    return int(told) / 1000 if told.isdecimal() and len(told) < 7 else None


def _metadata(error: CallError) -> dict[str, str]:
    pairs: Sequence[tuple[str, Any]] = list(error.trailing_metadata() or ())
    return {key: value for key, value in pairs if isinstance(value, str)}
