"""What model a checkpoint is, by its content: KV of one model must never serve another.

The fingerprint covers what changes keys and values: the configuration, the weights, the
tokenizer, and our own maths. Never a name or a path: a moved checkpoint keeps its KV.

Weights are the operator's own, so their files are digested by xxh3-128: several times faster
than a cryptographic hash, and nobody else chooses what is in them. A large checkpoint takes
a while all the same, so digests are kept in a file and found again as long as the system
says that a file is the same.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

import xxhash

from models.errors import CheckpointError
from models.json_fields import read_json
from models.weights import weight_files
from models.whole_file import write_whole

# Of our maths: raised when the same tokens and weights come to other keys and values than before.
KV_SEMANTICS = 1
SLICE_BYTES = 8 * 2**20
CACHE_FILE = "checkpoint-digests.json"
MAX_CACHED_DIGESTS = 10_000
# A file written so shortly before may be written again without its time of change moving on.
SETTLED_NS = 2 * 10**9
_CACHE_FORMAT = 1
# What of config.json says who wrote the checkpoint, and where it lay.
_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def model_fingerprint(directory: Path, cache_directory: Path | None) -> bytes:
    """Return 32 bytes that differ where checkpoints do.

    Digests of files are kept in ``cache_directory``; with None, or where nothing can be
    kept, all are computed.

    Raises:
        CheckpointError: The configuration or a file of the weights is missing or unreadable.
    """
    cache = _DigestCache(cache_directory)
    tokenizer = [directory / name for name in _TOKENIZER_FILES]
    manifest = {
        "kv_semantics": KV_SEMANTICS,
        "config": _without_names(read_json(directory / "config.json")),
        "tokenizer": {path.name: cache.digest(path) for path in tokenizer if path.is_file()},
        # In order of names: which file a tensor lies in may depend on it.
        "weights": [cache.digest(path) for path in weight_files(directory)],
    }
    cache.save()
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).digest()


def file_digest(path: Path) -> str:
    """Return xxh3-128 of a file's content; other threads run while it is read and hashed."""
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(SLICE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


class _DigestCache:
    """Digests of files by what the system says of them; damage counts as nothing kept."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / CACHE_FILE
        self._digests = self._load()
        self._found: dict[str, str] = {}  # now, which is not in the file yet

    def digest(self, path: Path) -> str:
        """Return a file's digest, from the cache if it is the file that was digested before."""
        try:
            identity = _identity(path)
            known = self._digests.get(identity)
            if known is None:
                known = file_digest(path)
                settled = time.time_ns() - path.stat().st_mtime_ns > SETTLED_NS
                if settled and _identity(path) == identity:
                    self._digests[identity] = self._found[identity] = known
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}") from error
        return known

    def save(self) -> None:
        """Write what was found, whole; where nothing can be written, the next start digests."""
        if self._path is None or not self._found:
            return
        kept = self._load() | self._found  # another process may have written meanwhile
        newest = dict(list(kept.items())[-MAX_CACHED_DIGESTS:])
        content = json.dumps({"format": _CACHE_FORMAT, "digests": newest}, indent=1)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, content)

    def _load(self) -> dict[str, str]:
        try:
            content = {} if self._path is None else json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):  # no file, no text, no JSON
            return {}
        if not isinstance(content, dict) or content.get("format") != _CACHE_FORMAT:
            return {}
        digests = content.get("digests")
        if not isinstance(digests, dict):
            return {}
        return {key: value for key, value in digests.items() if _is_digest(value)}


def _identity(path: Path) -> str:
    """Return what tells a file from others and from what it was before, but for its name."""
    stat = path.stat()
    # The time of change too: copying tools set the time of modification back.
    fields = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
    return "-".join(map(str, fields))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")


def _without_names(value: object) -> object:
    """Return parsed JSON without the keys that are about names and paths, at any depth."""
    if isinstance(value, dict):
        return {key: _without_names(each) for key, each in value.items() if key not in _NAMES}
    if isinstance(value, list):
        return [_without_names(each) for each in value]
    return value
