"""API keys: who may call, and which tenant a caller is, over HTTP and gRPC alike."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from configs import ConfigError
from models.errors import RingspanError

KEY_VARIABLE = "RINGSPAN_API_KEY"
NO_TENANT = ""  # where no keys are asked for


class Unauthenticated(RingspanError):
    """The server wants an API key, and this is none of its keys."""


class ApiKeys:
    """The keys of one server; a key is a tenant, whose KV and requests no other one sees."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Without keys everybody may call."""
        self._tenants = [(_digest(key.encode()), _tenant(key)) for key in keys]

    @property
    def are_needed(self) -> bool:
        """Whether a call must bring a key."""
        return bool(self._tenants)

    def tenant(self, authorization: str | bytes | None) -> str:
        """Return the tenant of a call whose header ``authorization`` is ``Bearer KEY``.

        All keys are compared, each in constant time: how long it takes tells nothing.

        Raises:
            Unauthenticated: Keys are asked for, and this is none.
        """
        if not self.are_needed:
            return NO_TENANT
        header = authorization.encode() if isinstance(authorization, str) else authorization or b""
        kind, _, key = header.partition(b" ")
        given = _digest(key.strip())
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if kind.lower() != b"bearer" or not found:
            raise Unauthenticated("this server needs an API key: send Authorization: Bearer KEY")
        return found[0]


def read_api_keys(given: Sequence[str], file: str | Path | None) -> tuple[str, ...]:
    """Return all keys of a server: given ones, those of a file's lines, and the environment's.

    Raises:
        ConfigError: The file cannot be read or has no key, or a key cannot be sent in a header.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="ascii").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read the API keys in {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"the API keys in {file} must be of ASCII characters") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"{file} has no API key: write one on each line")
        keys += found
    # Taken out: the ranks' processes inherit the environment.
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ.pop(KEY_VARIABLE))
    for key in keys:
        if not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError(
                "an API key must be of printable ASCII characters, without spaces at its ends"
            )
    return tuple(dict.fromkeys(keys))


def cache_salt(tenant: str, asked: str | None) -> str:
    """Return the salt of a prefix; a key's holder reaches no other key's, whatever it sends."""
    return "/".join(filter(None, (tenant, asked)))


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _tenant(key: str) -> str:
    """Name a tenant so that its name, in a log or a store, is not its key."""
    return hmac.new(key.encode(), b"ringspan tenant", hashlib.sha256).hexdigest()[:32]
