"""What config.json says is read with its types; what could be served wrongly is refused."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig, read_model_config
from models.errors import CheckpointError
from models.rope import RopeConfig
from tests.checkpoints import edit_json, write_llama_checkpoint

MINIMAL: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def read(directory: Path, **changes: object) -> ModelConfig:
    """Read a minimal config.json with these keys changed, as from a transformers 4 checkpoint."""
    path = directory / "config.json"
    path.write_text(json.dumps(MINIMAL))
    edit_json(path, **changes)
    return read_model_config(directory)


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    directory = write_llama_checkpoint(
        tmp_path,
        dtype=torch.bfloat16,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    assert read_model_config(directory) == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=500,
        max_position_embeddings=8192,
        position_limit=None,
        position_offset=0,
        norm="rms",
        norm_eps=1e-6,
        qk_norm=False,
        activation="silu",
        gated_mlp=True,
        parallel_residual=False,
        rope=RopeConfig(theta=500000.0),
        rotary_dim=32,
        tie_word_embeddings=True,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=False,
        dtype=torch.bfloat16,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_keys_that_old_checkpoints_lack_have_the_defaults_of_llama(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=None)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope, config.dtype) == (RopeConfig(theta=10000.0), torch.float32)
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_config_travels_to_another_process(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_goes_by_both_names(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, **{key: "float16"}).dtype is torch.float16


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 500000, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000}},
    ],
    ids=["transformers 4", "before 4.43", "transformers 5"],
)
def test_every_spelling_of_rope_reads_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    assert read(tmp_path, **changes).rope == RopeConfig(
        rope_type="llama3",
        theta=5e5,
        **LLAMA3,  # type: ignore[arg-type]
    )


def test_yarn_factor_defaults_to_the_growth_of_the_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    within = read(tmp_path, rope_scaling=scaling).rope
    assert within is not None
    assert within.factor == 4.0
    beside = read(
        tmp_path, rope_scaling={"type": "yarn"}, original_max_position_embeddings=1024
    ).rope
    assert beside is not None
    assert (beside.original_max_position_embeddings, beside.factor) == (1024, 8.0)


def test_generation_config_names_the_tokens_first(tmp_path: Path) -> None:
    """Instruct checkpoints end a turn with tokens that only generation_config.json lists."""
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = read(tmp_path, bos_token_id=1, eos_token_id=2)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (7, 8))
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config.json must hold a JSON object"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "architecture Bloom.*supported: LlamaForCausalLM",
        ),
        ({"architectures": ...}, "architectures = None, supported: LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\), supp"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu', supported: silu, relu, gelu"),
        ({"num_key_value_heads": 3}, "_heads = 4 and num_key_value_heads = 3, supported: a number"),
        ({"num_attention_heads": 6}, "hidden_size = 64, .* = 6 and no head_dim, supported:"),
        ({"head_dim": 15}, "head_dim = 15, supported: an even number"),
        ({"hidden_size": ...}, "lacks hidden_size, which"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps, which"),
        ({"vocab_size": "500"}, "vocab_size = '500', supported: a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True, supported: a whole number"),
        ({"attention_bias": 1}, "attention_bias = 1, supported: true or false"),
        ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn', supported: float32, float16, bf"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>', supported: a token id or a list"),
        ({"rope_theta": float("inf")}, "rope_theta = inf, supported: a finite number above 0"),
        ({"rope_theta": 10**400}, "rope_theta = 10+, supported: a finite number above 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic', supported: default, lin"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope', supported: default"),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope', supported: default"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor, which"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4}}, "high above low"),
        ({"rope_scaling": {"type": "yarn"}, "rope_theta": 1}, "rope_theta = 1, supported: another"),
        ({"rope_parameters": {"full_attention": {}}}, "supported: one object of plain values"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, supported: 1.0"),
    ],
)
def test_what_could_be_served_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"No checkpoint at .*: expected a directory"):
            read_model_config(directory)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", b"[" * 100_000])
def test_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config.json is not JSON: "):
        read_model_config(tmp_path)


def test_pretraining_tp_is_ignored(tmp_path: Path) -> None:
    """It says how the model was trained; the function computed is the same up to rounding."""
    assert read(tmp_path, pretraining_tp=2) == read(tmp_path)
