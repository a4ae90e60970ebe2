"""Configuration is checked where it is read; each mistake is one sentence that names its key."""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.arguments import CLUSTER_FLAGS
from configs import Config, ConfigError, load


def keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key with its dots."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def refusal(**sources: Any) -> str:
    """Return the sentence with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def test_no_source_gives_the_defaults() -> None:
    """The schema is the one place of defaults."""
    assert load() == Config()


def test_later_sources_win(file: Path) -> None:
    """The file, then values of flags and arguments, then key=value; the rest are defaults."""
    file.write_text(
        "context_parallel_size: 2\npage_tokens: 512\nmax_model_len: 1000\nring:\n  timeout_s: 5\n"
    )

    config = load(
        file,
        {"context_parallel_size": 3, "page_tokens": 768, "ring": {"piece_bytes": 7}},
        ["context_parallel_size=4", "ring.heartbeat_s=0.5"],
    )

    assert config == dataclasses.replace(
        Config(),
        context_parallel_size=4,
        page_tokens=768,
        max_model_len=1000,
        ring=dataclasses.replace(Config().ring, timeout_s=5.0, piece_bytes=7, heartbeat_s=0.5),
    )


def test_last_of_several_overrides_wins() -> None:
    """As on any command line: one may be added to a script's own."""
    assert load(overrides=["page_tokens=512", "page_tokens=768"]).page_tokens == 768


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_empty_file_changes_nothing(file: Path, text: str) -> None:
    """All lines of an example file may be commented out."""
    file.write_text(text)

    assert load(file) == Config()


def test_optional_key_may_be_set_back() -> None:
    """`null` on the command line undoes a file's choice."""
    config = load(None, {"max_model_len": 1000}, ["max_model_len=null"])

    assert config.max_model_len is None


def test_value_may_hold_an_equals_sign() -> None:
    """Only the first one parts key and value."""
    assert load(overrides=["model=/models/a=b"]).model == "/models/a=b"


def test_config_is_frozen_and_crosses_processes() -> None:
    """Ranks get a copy of it, and nobody changes theirs."""
    config = load(overrides=["ring.timeout_s=5"])

    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_tokens = 512  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("contxt_parallel_size", "context_parallel_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("ring.peice_bytes", "ring.piece_bytes"),
        ("rnig.piece_bytes", "ring.piece_bytes"),
        ("scheduler.decode_burst_step", "scheduler.decode_burst_steps"),
    ],
)
def test_unknown_key_gets_a_suggestion(key: str, close: str) -> None:
    """A typo that is passed over runs for hours with the default."""
    assert refusal(overrides=[f"{key}=3"]).endswith(f"; did you mean {close}?")


def test_unknown_key_like_no_other_lists_them_all() -> None:
    """So that nobody has to look for the schema."""
    message = refusal(overrides=["zzz=1"])

    assert message == f"unknown key 'zzz'; known keys: {', '.join(keys(Config()))}"


@pytest.mark.parametrize("text", ["zzz: 1\n", "ring:\n  zzz: 1\n", "1: 2\n", "hello\n"])
def test_unknown_key_in_a_file_is_refused(file: Path, text: str) -> None:
    """Files are checked as strictly as flags."""
    file.write_text(text)

    assert refusal(file=file).startswith("unknown key ")


def test_unknown_key_among_values_is_refused() -> None:
    """`LLM(model, contextparallelsize=2)` must not run on one rank."""
    assert "did you mean context_parallel_size" in refusal(values={"contextparallelsize": 2})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("context_parallel_size=two", "context_parallel_size: Value 'two' of type 'str'"),
        ("context_parallel_size=2.5", "context_parallel_size: Value '2.5' of type 'float'"),
        ("context_parallel_size=true", "context_parallel_size: Value 'True' of type 'bool'"),
        ("context_parallel_size=", "context_parallel_size: Incompatible value 'None'"),
        ("ring.piece_bytes=64 MiB", "ring.piece_bytes: Value '64 MiB' of type 'str'"),
        ("ring.timeout_s=soon", "ring.timeout_s: Value 'soon' of type 'str'"),
        ("model.name=x", "unknown key 'model.name'; did you mean model?"),
        ("ring=3", "Merge error: int is not a subclass of RingConfig"),
        ("ring=null", "ring: field 'ring' is not Optional"),
    ],
)
def test_value_of_a_wrong_type_is_refused(override: str, message: str) -> None:
    """With its key, the value and its type."""
    assert refusal(overrides=[override]).startswith(message)


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("device=tpu", "['auto', 'cpu', 'cuda']"),
        ("dtype=fp16", "['auto', 'float32', 'bfloat16', 'float16']"),
        ("kv_cache_dtype=int4", "['auto', 'int8', 'fp8']"),
        ("kv_store.host_dtype=int2", "['auto', 'int8', 'int4', 'fp8']"),
        ("restore.method=fastest", "['auto', 'load', 'recompute']"),
        ("restore.objective=joint", "['pipelined', 'serial']"),
        ("restore.activations=some", "['auto', 'never', 'always', 'both']"),
        ("kv_store.remote_dtype=raw", "['auto', 'int8', 'int4', 'fp8']"),
        ("kv_store.disk_dtype=bfloat16", "['auto', 'int8', 'int4', 'fp8']"),
        (
            "ring.algorithm=pass_k",
            "['auto', 'pass_kv', 'pass_q', 'algorithm_1', 'algorithm_5', 'empirical']",
        ),
    ],
)
def test_value_that_is_no_choice_is_refused(override: str, choices: str) -> None:
    """With the choices there are."""
    key, value = override.split("=")

    message = refusal(overrides=[override])

    assert message == f"{key}: Invalid value '{value}', expected one of {choices}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "context_parallel_size=0",
            "context_parallel_size must be greater than 0 and finite, got 0",
        ),
        ("decode_block_tokens=0", "decode_block_tokens must be greater than 0 and finite, got 0"),
        ("max_model_len=1", "max_model_len must be >= 2, got 1"),
        ("gpu_memory_utilization=0", "gpu_memory_utilization must be in (0, 1], got 0.0"),
        ("gpu_memory_utilization=1.01", "gpu_memory_utilization must be in (0, 1], got 1.01"),
        ("gpu_memory_utilization=.nan", "gpu_memory_utilization must be in (0, 1], got nan"),
        (
            "kv_cache_memory_bytes=0",
            "kv_cache_memory_bytes must be greater than 0 and finite, got 0",
        ),
        ("page_tokens=0", "page_tokens must be a multiple of 256, got 0"),
        ("page_tokens=-256", "page_tokens must be a multiple of 256, got -256"),
        ("page_tokens=300", "page_tokens must be a multiple of 256, got 300"),
        ("max_logprobs=-2", "max_logprobs must be >= -1, got -2"),
        ("threads_per_rank=-1", "threads_per_rank must be >= 0, got -1"),
        (
            "restore.link_bytes_per_s=0",
            "restore.link_bytes_per_s must be greater than 0 and finite, got 0.0",
        ),
        ("kv_store.host_memory_bytes=-1", "kv_store.host_memory_bytes must be >= 0, got -1"),
        ("kv_store.block_tokens=0", "kv_store.block_tokens must be a multiple of 16, got 0"),
        ("kv_store.block_tokens=-16", "kv_store.block_tokens must be a multiple of 16, got -16"),
        ("kv_store.block_tokens=100", "kv_store.block_tokens must be a multiple of 16, got 100"),
        ("kv_store.tenant_share=0", "kv_store.tenant_share must be in (0, 1], got 0.0"),
        ("kv_store.tenant_share=1.5", "kv_store.tenant_share must be in (0, 1], got 1.5"),
        ("kv_store.tenant_share=.nan", "kv_store.tenant_share must be in (0, 1], got nan"),
        ("kv_store.lease_s=0", "kv_store.lease_s must be greater than 0 and finite, got 0.0"),
        ("kv_store.timeout_s=0", "kv_store.timeout_s must be greater than 0 and finite, got 0.0"),
        ("kv_store.disk_bytes=0", "kv_store.disk_bytes must be greater than 0 and finite, got 0"),
        ("kv_store.restore_min_tokens=-1", "kv_store.restore_min_tokens must be >= 0, got -1"),
        ("ring.piece_bytes=0", "ring.piece_bytes must be greater than 0 and finite, got 0"),
        ("ring.timeout_s=-1", "ring.timeout_s must be greater than 0 and finite, got -1.0"),
        ("ring.heartbeat_s=0", "ring.heartbeat_s must be greater than 0 and finite, got 0.0"),
        (
            "ring.heartbeat_timeout_s=0",
            "ring.heartbeat_timeout_s must be greater than 0 and finite, got 0.0",
        ),
        (
            "scheduler.decode_burst_steps=0",
            "scheduler.decode_burst_steps must be greater than 0 and finite, got 0",
        ),
        (
            "ray.placement_timeout_s=0",
            "ray.placement_timeout_s must be greater than 0 and finite, got 0.0",
        ),
        ("ray.nodes_timeout_s=-1", "ray.nodes_timeout_s must be >= 0 and finite, got -1.0"),
        ("ray.start_timeout_s=0", "ray.start_timeout_s must be greater than 0 and finite, got 0.0"),
    ],
)
def test_value_outside_its_range_is_refused(override: str, message: str) -> None:
    """Where it is read, and not by an actor on another machine."""
    assert refusal(overrides=[override]) == message


@pytest.mark.parametrize("dtype", ["kv_cache_dtype=int8", "kv_store.disk_dtype=int4"])
@pytest.mark.parametrize("activations", ["always", "both"])
def test_activations_are_not_stored_beside_quantised_kv(dtype: str, activations: str) -> None:
    """They would be exact KV under keys of KV that is not."""
    message = refusal(overrides=[dtype, f"restore.activations={activations}"])
    assert message.startswith(f"restore.activations={activations} stores nothing that is quantised")


def test_disk_without_a_store_is_refused() -> None:
    """Somebody who names a directory expects that something is kept there."""
    overrides = ["kv_store.host_memory_bytes=0", "kv_store.disk_directory=/var/kv"]

    assert refusal(overrides=overrides).startswith(
        "kv_store.disk_directory needs kv_store.host_memory_bytes, got 0"
    )


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("key", [key for key in keys(Config()) if key.endswith("_s")])
def test_times_are_finite(key: str, value: str) -> None:
    """Every wait is bounded, and nan compares with nothing: as a bound it is none."""
    assert refusal(overrides=[f"{key}={value}"]).startswith(key)


@pytest.mark.parametrize("size", [0, 2, -1])
def test_tensor_parallelism_is_refused(size: int) -> None:
    """Scripts for other servers pass -tp; going on with 1 in silence would mislead."""
    assert refusal(values={"tensor_parallel_size": size}) == (
        f"tensor_parallel_size must be 1, got {size}: tensor parallelism is not supported yet, use"
        " context_parallel_size"
    )


@pytest.mark.parametrize("text", ["a: [", "model: x\nmodel: y\n", "\x00", "a: b: c\n"])
def test_file_that_is_no_yaml_is_refused(file: Path, text: str) -> None:
    """With its name; a key given twice is a mistake too."""
    file.write_text(text)

    assert refusal(file=file).startswith(f"{file} is not YAML: ")


@pytest.mark.parametrize("text", ["- a\n- b\n", "[]\n", "5\n"])
def test_file_without_keys_is_refused(file: Path, text: str) -> None:
    """A list, or a bare number."""
    file.write_text(text)

    assert refusal(file=file).startswith(f"{file} must hold `key: value` lines")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """With its name and the system's reason; a directory too."""
    absent = tmp_path / "absent.yaml"

    assert refusal(file=absent) == f"cannot read {absent}: No such file or directory"
    assert refusal(file=tmp_path) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("override", ["device", "", "ring.piece_bytes:5"])
def test_override_without_equals_sign_is_refused(override: str) -> None:
    """A stray word on the command line is no key."""
    assert refusal(overrides=[override]) == f"expected key=value, got {override!r}"


@pytest.mark.parametrize("override", ["model=[a", "model={a", "=5"])
def test_override_that_cannot_be_read_is_refused(override: str) -> None:
    """Its value is YAML, and a key is needed: no library's own error may come through."""
    refusal(overrides=[override])


def test_value_of_a_foreign_type_is_refused() -> None:
    """`LLM(model, device=torch.device("cpu"))` gets the key's name, as for any wrong type."""
    assert "device" in refusal(values={"device": object()})


def test_every_flag_is_a_key() -> None:
    """Flags become keys by their name alone; one that is no key would be refused in use."""
    known = set(keys(Config()))

    for names in CLUSTER_FLAGS:
        assert names[-1].removeprefix("--").replace("-", "_") in known
