"""Who may read a block: keys of blocks, which only the same tenant, model and tokens come to.

A block's key is a keyed hash of all that its KV depends on: the tenant's secret, the model's
fingerprint, the exactness class, the block before it and its own token ids. Who does not
have the secret cannot name a block, nor find out by trying which prompts others sent.

The cluster's secret outlives the cluster: without it whatever lies on disk is dead.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actors.errors import ClusterError
from actors.kv.pieces import KEY_BYTES

SECRET_BYTES = 32
TAG_BYTES = 16
LOSSLESS = "lossless"
_FILE = "kv-secret"


class SecretError(ClusterError):
    """The cluster's secret cannot be read, or is none."""


def default_secret_path() -> Path:
    """Return where the secret lies unless the configuration says otherwise."""
    # Here, for it imports torch, and a store's process starts without.
    from actors.profile_file import default_directory

    return default_directory() / _FILE


def load_secret(path: Path) -> bytes:
    """Return the cluster's secret, 32 bytes, made at the first start and kept in a file.

    Raises:
        SecretError: The file is damaged, others can read it, or it cannot be read or made.
    """
    try:
        if not path.exists():
            _create(path)
        return _read(path)
    except OSError as error:
        raise SecretError(
            f"cannot read or make the KV secret {path} ({error.strerror}): set"
            " kv_store.secret_file to a file that this user can write"
        ) from None


def _create(path: Path) -> None:
    """Write a new secret, whole or not at all; one that somebody made meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike a rename it never replaces another's secret
        except FileExistsError:
            return
    finally:
        draft.unlink()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        secret = file.read(SECRET_BYTES + 1)
    if mode & 0o077:
        raise SecretError(
            f"the KV secret {path} has mode {mode:04o}, by which others can reach it: expected"
            " 0600, run chmod 600 on it, or remove it if somebody may have read it"
        )
    if len(secret) != SECRET_BYTES or len(set(secret)) == 1:
        raise SecretError(
            f"the KV secret {path} is damaged: expected {SECRET_BYTES} random bytes, found"
            f" {'more' if len(secret) > SECRET_BYTES else len(secret)}; restore it, or remove"
            " it, and what is stored under it is lost"
        )
    return secret


def tenant_secret(secret: bytes, salt: str) -> bytes:
    """Return the secret, 32 bytes, under which one tenant's blocks are stored."""
    return _derive(secret, salt, b"ringspan tenant", SECRET_BYTES)


def tenant_tag(secret: bytes, salt: str) -> bytes:
    """Return 16 bytes that tell tenants apart, by which stores count; no key follows from them."""
    return _derive(secret, salt, b"ringspan tag", TAG_BYTES)


def exactness_class(
    *, device: str = "auto", host: str = "auto", remote: str = "auto", disk: str = "auto"
) -> str:
    """Return the class of KV that has passed through tiers of these dtypes.

    KV that is computed on lossy KV is not the exact KV, so the class is part of every key.
    ``auto`` is a tier's dtype that loses nothing beyond what the device lost.
    """
    tiers = {"device": device, "host": host, "remote": remote, "disk": disk}
    # A tier that is told to do what the device did anyway loses nothing more.
    losses = {tier: dtype if dtype != "auto" else device for tier, dtype in tiers.items()}
    if set(losses.values()) == {"auto"}:
        return LOSSLESS
    return ",".join(f"{tier}={dtype}" for tier, dtype in losses.items() if dtype != "auto")


class BlockChain:
    """Keys of the blocks of one tenant's prompts for one model."""

    def __init__(
        self, tenant_secret: bytes, fingerprint: bytes, exactness: str, block_tokens: int
    ) -> None:
        """Take what all blocks have in common, and how many tokens a block has."""
        self._block_tokens = block_tokens
        self._root = hashlib.blake2b(key=tenant_secret, digest_size=KEY_BYTES)
        for part in (fingerprint, exactness.encode()):
            self._root.update(len(part).to_bytes(8, "little") + part)

    def keys(self, token_ids: npt.NDArray[np.int32], after: Sequence[bytes] = ()) -> list[bytes]:
        """Return the keys of all full blocks of a prompt ``[T]``.

        ``after`` are the keys of its first blocks, where known: these are not hashed again.
        """
        keys = list(after[: len(token_ids) // self._block_tokens])
        done = len(keys) * self._block_tokens
        end = len(token_ids) // self._block_tokens * self._block_tokens
        ids = memoryview(token_ids[done:end].astype("<i8").tobytes())
        block_bytes = 8 * self._block_tokens
        parent = keys[-1] if keys else b""
        for start in range(0, len(ids), block_bytes):
            hasher = self._root.copy()
            hasher.update(len(parent).to_bytes(8, "little") + parent)
            hasher.update(ids[start : start + block_bytes])
            parent = hasher.digest()
            keys.append(parent)
        return keys


class TenantKeys:
    """Keys of all tenants' blocks, for one model."""

    def __init__(
        self, secret: bytes, fingerprint: bytes, exactness: str, block_tokens: int
    ) -> None:
        """Take the cluster's secret, and what all blocks have in common."""
        self.block_tokens = block_tokens
        self._secret = secret
        self._of_all = fingerprint, exactness, block_tokens

    def keys(
        self, salt: str, token_ids: npt.NDArray[np.int32], known: Sequence[bytes]
    ) -> list[bytes]:
        """Return the keys of a tenant's prompt; see `BlockChain.keys`."""
        chain = BlockChain(tenant_secret(self._secret, salt), *self._of_all)
        return chain.keys(token_ids, known)

    def tenant(self, salt: str) -> bytes:
        """Return a tenant's tag."""
        return tenant_tag(self._secret, salt)


def _derive(secret: bytes, salt: str, purpose: bytes, size: int) -> bytes:
    # Python's text may hold halves of surrogate pairs, which JSON can spell.
    data = salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, key=secret, digest_size=size, person=purpose).digest()
