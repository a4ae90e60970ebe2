"""Errors of a running cluster; see `models.errors` for the whole tree.

ClusterError
+-- PlacementError   the ranks asked for cannot be placed on this Ray cluster
+-- RayUnreachable   there is no Ray cluster at the address given
+-- RankLost         a rank died or stopped answering
+-- StepFailed       a step failed on a rank that is still alive
+-- QueueFull        more requests wait than may
+-- UnknownRequest   no request of this id waits or runs
+-- TraceError       a trace that cannot be started, stopped or written
+-- StoreNotFound    there is no KV store at the place given
"""

from models.errors import RingspanError


class ClusterError(RingspanError):
    """Something of the running cluster failed."""


class PlacementError(ClusterError):
    """The ranks asked for cannot be placed."""


class RayUnreachable(ClusterError):
    """There is no Ray cluster at the address given."""


class RankLost(ClusterError):
    """A rank died or stopped answering; its share of every context is gone."""


class StepFailed(ClusterError):
    """A step failed on a rank that is still alive."""


class QueueFull(ClusterError):
    """More requests wait than may; try again later."""


class UnknownRequest(ClusterError):
    """No request of this id waits or runs."""


class TraceError(ClusterError):
    """A trace cannot be started, stopped or written."""


class StoreNotFound(ClusterError):
    """There is no KV store, or none on disk, at the place given."""
