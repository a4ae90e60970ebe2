"""API keys: who may call, and which tenant a caller is."""

import hashlib
import hmac
from collections.abc import Sequence

from cluster.rpc.errors import Unauthenticated

NO_TENANT = ""  # where no keys are asked for


class ApiKeys:
    """The keys of one server; a key is a tenant, whose KV and requests no other one sees."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Without keys everybody may call."""
        self._tenants = [(_digest(key.encode()), _tenant(key)) for key in keys]

    def tenant(self, authorization: str | None) -> str:
        """Return the tenant of a call whose header ``authorization`` is ``Bearer KEY``.

        All keys are compared, each in constant time: how long it takes tells nothing.

        Raises:
            Unauthenticated: Keys are asked for, and this is none.
        """
        if not self._tenants:
            return NO_TENANT
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip().encode())
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if kind.lower() != "bearer" or not found:
            raise Unauthenticated("this server wants an API key: authorization: Bearer KEY")
        return found[0]


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _tenant(key: str) -> str:
    """Name a tenant so that its name, in a log or a store, is not its key."""
    return hmac.new(key.encode(), b"ringspan tenant", hashlib.sha256).hexdigest()[:32]
