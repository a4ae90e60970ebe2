"""All that `cluster` offers, imported when it is first asked for; see `cluster.__init__`."""

from actors.errors import (
    ClusterError,
    PlacementError,
    QueueFull,
    RankLost,
    RayUnreachable,
    StepFailed,
    StoreNotFound,
    TraceError,
    UnknownRequest,
)
from actors.messages import CompletionOutput, Logprob, Progress, RequestDelta, RequestOutput
from actors.records import Restored, StepRecord
from actors.trace import Trace
from cluster.api_keys import Unauthenticated
from cluster.client import Client
from cluster.llm import LLM
from cluster.rpc.errors import LimitExceeded, ServerUnavailable
from cluster.tls import ClientTls
from configs import ConfigError
from models.errors import CheckpointError, PromptError, RingspanError, SamplingError
from models.sampling import SamplingParams

__all__ = [
    "LLM",
    "CheckpointError",
    "Client",
    "ClientTls",
    "ClusterError",
    "CompletionOutput",
    "ConfigError",
    "LimitExceeded",
    "Logprob",
    "PlacementError",
    "Progress",
    "PromptError",
    "QueueFull",
    "RankLost",
    "RayUnreachable",
    "RequestDelta",
    "RequestOutput",
    "Restored",
    "RingspanError",
    "SamplingError",
    "SamplingParams",
    "ServerUnavailable",
    "StepFailed",
    "StepRecord",
    "StoreNotFound",
    "Trace",
    "TraceError",
    "Unauthenticated",
    "UnknownRequest",
]
