"""Errors that name an input, what was expected and what to do.

RingspanError
+-- CheckpointError     the checkpoint cannot be read, or is of a kind that is not supported
+-- PromptError         a prompt that this model cannot take
+-- SamplingError       a sampling parameter outside its range
(+-- ClusterError ...   see actors/errors.py)

Each takes one message string: a class with keyword-only arguments does not
survive the way through Ray.
"""


class RingspanError(Exception):
    """Base of every error a user may meet; its message is one sentence for them."""


class CheckpointError(RingspanError):
    """The checkpoint is missing, damaged, or of a kind that is not supported."""


class PromptError(RingspanError):
    """The prompt is empty, too long, or not of a kind that can be read."""


class SamplingError(RingspanError, ValueError):
    """A sampling parameter lies outside its range."""
