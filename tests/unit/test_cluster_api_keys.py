"""API keys: where they come from, and which tenant each is."""

import os
from pathlib import Path

import pytest

from cluster.api_keys import ApiKeys, Unauthenticated, cache_salt, read_api_keys
from configs import ConfigError


def test_key_leaves_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ranks' processes inherit it, and have no use for the key."""
    monkeypatch.setenv("RINGSPAN_API_KEY", "secret")
    file = tmp_path / "keys"
    file.write_text("one\n\n two \none\n")

    assert read_api_keys(["given"], file) == ("given", "one", "two", "secret")
    assert "RINGSPAN_API_KEY" not in os.environ
    assert read_api_keys([], None) == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no API key: write one on each line"),
        (b"  \n", "has no API key"),
        ("schlüssel".encode(), "must be of ASCII characters"),
        (b"a\x07b", "printable ASCII"),
        (None, "cannot read the API keys in .*: no such file"),
    ],
)
def test_files_without_keys_are_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    """An empty Secret must not open the server to everybody."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?i){told}"):
        read_api_keys([], file)


def test_keys_given_must_fit_a_header() -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        read_api_keys([""], None)


def test_a_key_is_the_same_tenant_at_both_doors() -> None:
    """HTTP has headers as bytes, gRPC as text."""
    keys = ApiKeys(["one", "two"])

    assert keys.tenant("Bearer one") == keys.tenant(b"bearer one") != keys.tenant(b"Bearer two")
    assert "one" not in keys.tenant(b"Bearer one")
    for header in (None, b"one", b"Basic one", b"Bearer three", "Bearer schlüssel"):
        with pytest.raises(Unauthenticated, match="send Authorization: Bearer KEY"):
            keys.tenant(header)
    assert ApiKeys().tenant(None) == ""


def test_salts_of_two_tenants_never_meet() -> None:
    assert cache_salt("tenant", None) == "tenant"
    assert cache_salt("", "mine") == "mine"
    assert cache_salt("tenant", "mine") != cache_salt("other", "mine")
