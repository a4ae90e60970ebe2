"""What an HTTP server may be told: `configs.ServerConfig`, with the names and keys it comes to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs import Config, ServerConfig

MiB = 2**20
# A token id is up to 8 characters of JSON, a token of text seldom more: see body_limit_bytes.
BODY_BYTES_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Settings(ServerConfig):
    """One server."""

    names: tuple[str, ...]  # of the model; the first is told in answers
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: everybody may ask

    @classmethod
    def of(cls, config: Config, api_keys: Sequence[str]) -> "Settings":
        """Return the server that a configuration asks for."""
        names = config.server.served_model_name or [Path(config.model).expanduser().resolve().name]
        return cls(**vars(config.server), names=tuple(names), api_keys=tuple(api_keys))

    def body_limit_bytes(self, max_model_len: int) -> int:
        """Return the largest body that is read."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return 4 * MiB + BODY_BYTES_PER_TOKEN * max_model_len
