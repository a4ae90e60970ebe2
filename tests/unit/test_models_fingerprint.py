"""KV of one model must never serve another, and a moved checkpoint keeps its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from models import fingerprint
from models.errors import CheckpointError
from models.fingerprint import CACHE_FILE, SLICE_BYTES, file_digest, model_fingerprint
from tests.checkpoints import edit_json

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_theta": 1e4, "_name_or_path": "x/y"}
LONG_AGO_S = 1_700_000_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards that nobody has touched for long."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    shards = ["model-1.safetensors", "model-2.safetensors"]
    for number, name in enumerate(shards):
        (directory / name).write_bytes(bytes([number]) * 1000)
    index = {"weight_map": {f"tensor-{name}": name for name in shards}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    settle(directory)
    return directory


def settle(directory: Path) -> None:
    for path in directory.iterdir():
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))


def flip_a_weight(directory: Path) -> None:
    path = directory / "model-2.safetensors"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def swap_shards(directory: Path) -> None:
    first, second = directory / "model-1.safetensors", directory / "model-2.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, from here on."""
    names: list[str] = []

    def counting(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(fingerprint, "file_digest", counting)
    return names


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: edit_json(directory / "config.json", rope_theta=5e5),
        lambda directory: edit_json(directory / "config.json", rope_scaling={"factor": 2.0}),
        lambda directory: (directory / "tokenizer.json").write_text("[]"),
        lambda directory: (directory / "merges.txt").write_text(""),
        flip_a_weight,
        swap_shards,
    ],
)
def test_another_model_has_another_fingerprint(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """With the cache of the first one at hand, and the files' times set back."""
    before = model_fingerprint(checkpoint, tmp_path)

    change(checkpoint)
    settle(checkpoint)

    assert model_fingerprint(checkpoint, tmp_path) != before
    assert model_fingerprint(checkpoint, tmp_path) == model_fingerprint(checkpoint, None)


def test_other_maths_have_another_fingerprint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV on disk outlives a release that computes it otherwise."""
    before = model_fingerprint(checkpoint, None)
    monkeypatch.setattr(fingerprint, "KV_SEMANTICS", fingerprint.KV_SEMANTICS + 1)

    assert model_fingerprint(checkpoint, None) != before


def test_names_and_places_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that is moved, renamed or copied keeps its KV."""
    before = model_fingerprint(checkpoint, None)
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, copy)
    edit_json(copy / "config.json", _name_or_path=str(copy), transformers_version="9.9")
    (copy / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((copy / "config.json").read_text()).items())), indent=2)
    )
    (copy / "README.md").write_text("another name")

    assert len(before) == 32
    assert model_fingerprint(copy, None) == before


def test_a_second_start_reads_no_weights(
    checkpoint: Path, tmp_path: Path, digested: list[str]
) -> None:
    """A hundred gigabytes take a minute to digest; only what changed is read again."""
    first = model_fingerprint(checkpoint, tmp_path / "cache")
    assert sorted(digested) == ["model-1.safetensors", "model-2.safetensors", "tokenizer.json"]

    digested.clear()
    assert model_fingerprint(checkpoint, tmp_path / "cache") == first
    assert digested == []

    flip_a_weight(checkpoint)
    model_fingerprint(checkpoint, tmp_path / "cache")
    assert digested == ["model-2.safetensors"]


def test_a_file_just_written_is_not_kept(
    checkpoint: Path, tmp_path: Path, digested: list[str]
) -> None:
    """It may be written again within the same tick of the file system's clock."""
    (checkpoint / "tokenizer.json").write_text("{ }")
    model_fingerprint(checkpoint, tmp_path)
    digested.clear()

    model_fingerprint(checkpoint, tmp_path)

    assert digested == ["tokenizer.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[1]", b'{"format": 1}', b'{"format": 1, "digests": 3}', b"[" * 100_000],
)
def test_a_damaged_cache_is_as_none(checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    """It is written anew."""
    (tmp_path / CACHE_FILE).write_bytes(content)

    assert model_fingerprint(checkpoint, tmp_path) == model_fingerprint(checkpoint, None)
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())["digests"]) == 3


def test_damaged_digests_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """A digest cut short must not become part of a fingerprint."""
    expected = model_fingerprint(checkpoint, tmp_path)
    content = json.loads((tmp_path / CACHE_FILE).read_text())
    content["digests"] = {key: value[:-1] for key, value in content["digests"].items()}
    (tmp_path / CACHE_FILE).write_text(json.dumps(content))

    assert model_fingerprint(checkpoint, tmp_path) == expected


def test_a_cache_that_cannot_be_written_is_no_error(checkpoint: Path, tmp_path: Path) -> None:
    """A file lies where the directory should be."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")

    assert model_fingerprint(checkpoint, blocked) == model_fingerprint(checkpoint, None)


def test_a_missing_shard_is_refused(checkpoint: Path) -> None:
    """A fingerprint of half a model would be one of another."""
    (checkpoint / "model-2.safetensors").unlink()

    with pytest.raises(CheckpointError, match="which is not there"):
        model_fingerprint(checkpoint, None)


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES, SLICE_BYTES + 1])
def test_digest_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    """Slices leave nothing out at their edges."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))

    assert file_digest(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())
