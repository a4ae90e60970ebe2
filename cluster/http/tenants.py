"""Who asks: an API key is a tenant, and its prefixes are shared with no other."""

import hashlib
import hmac
from collections.abc import Sequence

from cluster.http.errors import ApiError


class Tenants:
    """The keys of one server; only their digests are kept."""

    def __init__(self, api_keys: Sequence[str]) -> None:
        """Take the keys; none means that everybody may ask."""
        self._digests = [_digest(key.encode()) for key in api_keys]

    @property
    def need_key(self) -> bool:
        """Whether a request must bring a key."""
        return bool(self._digests)

    def salt(self, authorization: bytes | None) -> str:
        """Return the cache salt of whoever sends this header; "" where no key is needed.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if not self.need_key:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = b""
        given = _digest(key.strip())
        # Every key is compared, each in constant time: the time tells nothing of them.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise ApiError(
                401,
                "this server needs an API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return "key-" + hashlib.sha256(b"ringspan cache salt" + given).hexdigest()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
