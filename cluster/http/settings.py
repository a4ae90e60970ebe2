"""What an HTTP server may be told: names, keys, and limits that hold before memory is taken."""

from dataclasses import dataclass, field

MiB = 2**20
# A token id is up to 8 characters of JSON, a token of text seldom more: see body_limit_bytes.
BODY_BYTES_PER_TOKEN = 16
# An async actor runs 1000 calls at once; cancel and status must find room among them.
MOST_REQUESTS = 900


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server."""

    names: tuple[str, ...]  # of the model; the first is told in answers
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: everybody may ask
    max_body_bytes: int | None = None  # None: room for a prompt of the model's length
    body_timeout_s: float = 60.0  # for a body to arrive
    send_timeout_s: float = 60.0  # for a client to take a piece of a stream
    max_requests: int = 512  # prompts under way, over all clients
    max_answers: int = 128  # prompts times n, of one HTTP request
    keep_alive_s: float = 5.0  # a stream is never silent for longer
    progress_s: float = 1.0  # how often a prefill's progress is told, where it is asked for
    first_wait_s: float = 1.0  # an error so soon is an HTTP status, a later one part of the stream
    retry_after_s: int = 5  # told with 429 and 503

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError("a server needs a model name of at least one character")
        if not all(self.api_keys):
            raise ValueError("an API key must have at least one character")
        if not 0 < self.max_requests <= MOST_REQUESTS:
            raise ValueError(f"max_requests must be 1 to {MOST_REQUESTS}, got {self.max_requests}")

    def body_limit_bytes(self, max_model_len: int) -> int:
        """Return the largest body that is read."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return 4 * MiB + BODY_BYTES_PER_TOKEN * max_model_len
