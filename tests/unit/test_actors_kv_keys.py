"""One tenant's KV cannot be had by another, nor another model's, whatever the prompt."""

import hashlib
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.kv.keys import (
    LOSSLESS,
    SECRET_BYTES,
    BlockChain,
    SecretError,
    default_secret_path,
    exactness_class,
    load_secret,
    tenant_secret,
    tenant_tag,
)

SECRET = bytes(range(32))
FINGERPRINT = b"f" * 32
BLOCK = 4


def chain(
    tenant: str = "",
    fingerprint: bytes = FINGERPRINT,
    exactness: str = LOSSLESS,
    block_tokens: int = BLOCK,
) -> BlockChain:
    return BlockChain(tenant_secret(SECRET, tenant), fingerprint, exactness, block_tokens)


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.asarray(values, dtype=np.int32)


def written_out(tenant: bytes, token_ids: list[int]) -> list[bytes]:
    """Return keys as the documentation says, one block after another."""
    keys: list[bytes] = []
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        parent = keys[-1] if keys else b""
        message = b"".join(
            struct.pack("<Q", len(part)) + part for part in (FINGERPRINT, b"lossless", parent)
        ) + struct.pack(f"<{BLOCK}q", *token_ids[start : start + BLOCK])
        keys.append(hashlib.blake2b(message, key=tenant, digest_size=32).digest())
    return keys


token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(token_lists)
def test_keys_are_those_of_the_definition(values: list[int]) -> None:
    """A rank of another release, or on another kind of machine, must come to the same keys."""
    assert chain().keys(ids(*values)) == written_out(tenant_secret(SECRET, ""), values)


def test_golden_values() -> None:
    """Blocks on disk are found again only as long as these stay."""
    assert tenant_tag(SECRET, "a").hex() == "b6d544becc990ff03a9945b9f7ccc850"
    assert tenant_secret(SECRET, "a").hex() == (
        "b20156c7b3d7468d99b7880ac7d099054677c322d9c0eed01699fc98abd1f935"
    )
    assert [key.hex() for key in chain("a").keys(ids(*range(8)))] == [
        "737f20f6b32830bbd43ea38226e5088083eb0734681a0c89c1f2e74172b80370",
        "76a3a10e35c8d97cd17bda37b7654dbc3a2e368b1969a1c96ef3cd4c674faf8d",
    ]


@given(token_lists, st.data())
def test_known_keys_are_gone_on_with(values: list[int], data: st.DataObject) -> None:
    """However the tokens came, chunk by chunk or at once."""
    whole = chain().keys(ids(*values))
    known = data.draw(st.integers(0, len(whole)))

    assert chain().keys(ids(*values), whole[:known]) == whole


@given(st.lists(st.integers(0, 1000), min_size=BLOCK, max_size=40), st.data())
def test_any_other_token_gives_other_keys_from_there_on(
    values: list[int], data: st.DataObject
) -> None:
    """Blocks before it are shared, and no later one is."""
    changed = data.draw(st.integers(0, len(values) // BLOCK * BLOCK - 1))
    others = [*values]
    others[changed] += 1

    before, after = chain().keys(ids(*values)), chain().keys(ids(*others))

    assert before[: changed // BLOCK] == after[: changed // BLOCK]
    assert not set(before[changed // BLOCK :]) & set(after)


@pytest.mark.parametrize(
    "other",
    [
        chain(tenant="other"),
        chain(fingerprint=b"g" * 32),
        chain(fingerprint=FINGERPRINT + b"\0"),
        chain(exactness="device=int8"),
        # The same bytes, parted elsewhere.
        chain(fingerprint=FINGERPRINT + b"l", exactness=LOSSLESS[1:]),
        chain(block_tokens=2 * BLOCK),
        BlockChain(tenant_secret(bytes(32), ""), FINGERPRINT, LOSSLESS, BLOCK),
    ],
)
def test_another_tenant_model_or_class_has_other_keys(other: BlockChain) -> None:
    """Of the same tokens, in every block."""
    tokens = ids(*range(16))

    assert not set(chain().keys(tokens)) & set(other.keys(tokens))


def test_the_same_block_elsewhere_has_another_key() -> None:
    """Its KV depends on all tokens before it."""
    keys = chain().keys(ids(*[7, 8, 9, 10] * 3))

    assert len(set(keys)) == 3


@given(st.text(), st.text())
def test_tenants_are_told_apart(one: str, other: str) -> None:
    """And a tag, which stores see, is no part of a secret."""
    assert (tenant_secret(SECRET, one) == tenant_secret(SECRET, other)) == (one == other)
    assert (tenant_tag(SECRET, one) == tenant_tag(SECRET, other)) == (one == other)
    assert not tenant_secret(SECRET, one).startswith(tenant_tag(SECRET, one))


def test_salt_may_be_any_text() -> None:
    """JSON can spell half a surrogate pair."""
    assert tenant_tag(SECRET, "\ud800") != tenant_tag(SECRET, "\ud801")


def test_a_million_tokens_take_less_than_a_second() -> None:
    """It stands before every answer's first token."""
    tokens = np.arange(2**20, dtype=np.int32)
    start_s = time.perf_counter()

    keys = chain(block_tokens=256).keys(tokens)

    assert time.perf_counter() - start_s < 1.0
    assert len(set(keys)) == 4096


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ({}, "lossless"),
        ({"host": "int8"}, "host=int8"),
        ({"disk": "int4", "host": "fp8"}, "host=fp8,disk=int4"),
        ({"device": "int8"}, "device=int8,host=int8,remote=int8,disk=int8"),
        ({"device": "int8", "host": "int8"}, "device=int8,host=int8,remote=int8,disk=int8"),
        ({"device": "fp8", "disk": "int4"}, "device=fp8,host=fp8,remote=fp8,disk=int4"),
    ],
)
def test_class_names_what_is_lossy(tiers: dict[str, str], expected: str) -> None:
    """Settings that lose the same are the same class."""
    assert exactness_class(**tiers) == expected


def test_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    """After a restart of everything what lies on disk is still the tenant's."""
    path = tmp_path / "new" / "secret"

    secret = load_secret(path)

    assert len(secret) == SECRET_BYTES
    assert load_secret(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_secret(tmp_path / "other") != secret
    assert list(path.parent.iterdir()) == [path]


def test_starts_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    """None replaces another's: what was stored under that one would be lost."""
    path = tmp_path / "secret"
    with ThreadPoolExecutor(16) as threads:
        found = set(threads.map(lambda _: load_secret(path), range(64)))

    assert len(found) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_secret_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    """Who has it can name every tenant's blocks."""
    path = tmp_path / "secret"
    load_secret(path)
    path.chmod(mode)

    with pytest.raises(SecretError, match=f"{path} has mode {mode:04o}.*expected 0600"):
        load_secret(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(32),
        b"longer than 32 bytes, which is not right",
        b"a byte less than 32, also wrong",
    ],
)
def test_damaged_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    """A new one in its place would part everybody from what they stored, in silence."""
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(SecretError, match=f"{path} is damaged: expected 32 random bytes"):
        load_secret(path)


def test_secret_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """It names the key that says where it lies."""
    (tmp_path / "file").write_text("")

    with pytest.raises(SecretError, match=r"cannot read or make .*set kv_store\.secret_file"):
        load_secret(tmp_path / "file" / "secret")
    with pytest.raises(SecretError, match="Is a directory"):
        load_secret(tmp_path)


def test_default_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert default_secret_path() == tmp_path / "ringspan" / "kv-secret"


def test_keys_need_no_torch() -> None:
    """A store's process starts in a fraction of a second."""
    code = "import actors.kv.keys, sys; assert 'torch' not in sys.modules"

    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60
    )
