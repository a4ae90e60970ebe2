"""What a user touches: the `LLM` handle and its parameters, results and errors."""

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
from actors.messages import (
    CompletionOutput,
    Logprob,
    Progress,
    RequestDelta,
    RequestOutput,
    Restored,
    StepRecord,
)
from actors.trace import Trace
from cluster.llm import LLM
from configs import ConfigError
from models.errors import CheckpointError, PromptError, RingspanError, SamplingError
from models.sampling import SamplingParams

__all__ = [
    "LLM",
    "CheckpointError",
    "ClusterError",
    "CompletionOutput",
    "ConfigError",
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
    "StepFailed",
    "StepRecord",
    "StoreNotFound",
    "Trace",
    "TraceError",
    "UnknownRequest",
]
