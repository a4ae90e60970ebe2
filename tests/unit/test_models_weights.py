"""Every tensor of a checkpoint lands in its place, or the checkpoint is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import read_model_config
from models.errors import CheckpointError
from models.weights import DecoderWeights, load_weights, random_weights, weights_bytes
from tests.checkpoints import edit_json, write_llama_checkpoint

CPU = torch.device("cpu")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return load_weights(directory, read_model_config(directory), device=CPU, dtype=dtype)


def all_tensors(weights: DecoderWeights) -> list[torch.Tensor]:
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    top = [weights.embed_VE, weights.final_norm_E, weights.lm_head_VE]
    return [tensor for tensor in top + layers if tensor is not None]


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    path = directory / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_llama_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("max_shard_size", ["1GB", 50_000], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}, {"tie_word_embeddings": True}],
    ids=["plain", "biases", "tied"],
)
def test_weights_equal_those_that_transformers_reads(
    tmp_path: Path, overrides: dict[str, Any], max_shard_size: int | str
) -> None:
    from transformers import LlamaForCausalLM

    directory = write_llama_checkpoint(tmp_path, max_shard_size=max_shard_size, **overrides)
    assert (directory / "model.safetensors").exists() == (max_shard_size == "1GB")
    model = LlamaForCausalLM.from_pretrained(directory)
    weights = load(directory)

    assert torch.equal(weights.embed_VE, model.model.embed_tokens.weight)
    assert torch.equal(weights.final_norm_E, model.model.norm.weight)
    assert torch.equal(weights.lm_head_VE, model.lm_head.weight)
    for mine, theirs in zip(weights.layers, model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_proj, mlp.up_proj]
        assert torch.equal(mine.input_norm_E, theirs.input_layernorm.weight)
        assert torch.equal(mine.post_norm_E, theirs.post_attention_layernorm.weight)
        assert torch.equal(mine.qkv_PE, torch.cat([module.weight for module in qkv]))
        assert torch.equal(mine.gate_up_FE, torch.cat([module.weight for module in gate_up]))
        assert torch.equal(mine.out_EX, attention.o_proj.weight)
        assert torch.equal(mine.down_EF, mlp.down_proj.weight)
        biases = [mine.qkv_bias_P, mine.out_bias_E, mine.gate_up_bias_F, mine.down_bias_E]
        for bias, modules in zip(
            biases, [qkv, [attention.o_proj], gate_up, [mlp.down_proj]], strict=True
        ):
            if "mlp_bias" in overrides:
                assert bias is not None
                assert torch.equal(bias, torch.cat([module.bias for module in modules]))
            else:
                assert bias is None


def test_cast_is_that_of_torch(checkpoint: Path) -> None:
    exact, rounded = load(checkpoint), load(checkpoint, torch.bfloat16)
    for wide, narrow in zip(all_tensors(exact), all_tensors(rounded), strict=True):
        assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    directory = write_llama_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = load(directory)
    assert weights.lm_head_VE is weights.embed_VE


def test_tied_head_may_be_stored_too_or_instead(tmp_path: Path) -> None:
    directory = write_llama_checkpoint(tmp_path, tie_word_embeddings=True)
    embed = load(directory).embed_VE
    rewrite(directory, **{"lm_head.weight": embed.clone()})
    assert torch.equal(load(directory).embed_VE, embed)
    rewrite(directory, **{"model.embed_tokens.weight": None})
    assert torch.equal(load(directory).embed_VE, embed)
    rewrite(directory, **{"model.embed_tokens.weight": embed + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .* differs from the embedding"):
        load(directory)


def test_old_rotary_buffers_are_ignored(checkpoint: Path) -> None:
    rewrite(checkpoint, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUERY: None}, rf"model.safetensors lacks {QUERY}$"),
        ({f"model.layers.1.mlp.{n}_proj.weight": None for n in ("up", "gate", "down")}, "lacks .*"),
        ({QUERY: torch.ones(64, 32)}, rf"{QUERY} in .*model.safetensors has shape \[64, 32\], exp"),
        ({QUERY: torch.ones(64, 64, dtype=torch.int8)}, rf"{QUERY} in .* is stored as I8, suppor"),
        (
            {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
            "holds model.layers.0.self_attn.q_norm.weight, which config.json does not account for",
        ),
        (
            {f"extra.{i}": torch.ones(1) for i in range(5)},
            "holds extra.0, extra.1, extra.2 and 2 more, which",
        ),
    ],
    ids=["missing", "many missing", "shape", "dtype", "unused", "many unused"],
)
def test_other_tensors_than_the_config_says(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    """Leaving them out would serve another model."""
    directory = write_llama_checkpoint(tmp_path, attention_bias=True)
    edit_json(directory / "config.json", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.*bias, .* and 5 more, which"):
        load(directory)


def test_fewer_layers_than_the_config_says(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.* and 6 more$"):
        load(checkpoint)


def test_file_of_another_user(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not damaged: to download it again would not help."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors: this user may"):
        load(checkpoint)


@pytest.mark.parametrize("left_bytes", [0, 4, 100, 200_000])
def test_truncated_file(checkpoint: Path, left_bytes: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left_bytes])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or incomplete \("):
        load(checkpoint)


@pytest.mark.parametrize(
    "pickle_name", ["pytorch_model-00001-of-2.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickle_is_refused(checkpoint: Path, pickle_name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / pickle_name)
    with pytest.raises(CheckpointError, match=rf"as pickle \({pickle_name}\).*: convert it with"):
        load(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.rename(checkpoint / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetens"):
        load(checkpoint)
    (checkpoint / "consolidated.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*: expected a directory with"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({QUERY: "absent.safetensors"}, "index.json names absent.safetensors, which is not there"),
        ({QUERY: "../model.safetensors"}, r"names ../model.safetensors, which lies outside"),
        ({QUERY: "/model.safetensors"}, "names /model.safetensors, which lies outside"),
        ({}, "index.json lacks weight_map"),
        ([QUERY], "index.json lacks weight_map"),
        ({QUERY: "part.safetensors"}, "index.json lacks lm_head.weight, .* and 17 more$"),
    ],
)
def test_wrong_index(checkpoint: Path, weight_map: object, message: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({QUERY: tensors[QUERY]}, checkpoint / "part.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_shards_may_be_links(tmp_path: Path) -> None:
    """The download cache of the Hugging Face Hub is links into a blob store beside it."""
    directory = write_llama_checkpoint(tmp_path / "snapshot", max_shard_size=50_000)
    for path in directory.glob("*.safetensors"):
        path.symlink_to(path.rename(tmp_path / path.name))
    load(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_have_the_structure_and_size_of_loaded_ones(
    tmp_path: Path, tied: bool
) -> None:
    directory = write_llama_checkpoint(tmp_path, attention_bias=True, tie_word_embeddings=tied)
    config = read_model_config(directory)
    loaded = load(directory, torch.bfloat16)
    first, again, other = (
        random_weights(config, device=CPU, dtype=torch.bfloat16, seed=seed) for seed in (5, 5, 6)
    )

    shapes = [tensor.shape for tensor in all_tensors(loaded)]
    assert [tensor.shape for tensor in all_tensors(first)] == shapes
    assert (first.lm_head_VE is first.embed_VE) == tied
    assert torch.equal(first.embed_VE, again.embed_VE)
    assert not torch.equal(first.embed_VE, other.embed_VE)
    assert first.embed_VE.float().std().item() == pytest.approx(0.02, rel=0.05)
    held = {id(tensor): tensor.numel() * 2 for tensor in all_tensors(loaded)}
    assert weights_bytes(config, torch.bfloat16) == sum(held.values())
