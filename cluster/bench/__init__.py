"""``ringspan bench``: measurements on this machine's CPU, all contestants in one call.

All run interleaved, several times; what is compared are the medians of ratios
of runs that followed each other.
"""

from cluster.bench.command import add_command

__all__ = ["add_command"]
