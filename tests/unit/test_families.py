"""Every family answers as transformers does on the same weights; what is near but other is refused.

What families share is tested on Llama alone: `test_ring_exactness`, `test_models_config` and
`test_models_weights`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import check_max_model_len, read_model_config
from models.errors import CheckpointError
from models.families import FAMILIES
from models.sampling import SamplingParams
from models.weights import DecoderWeights, load_weights, random_weights, weights_bytes
from tests.checkpoints import as_transformers_4_wrote_it, edit_json, write_checkpoint
from tests.oracle import assert_greedy, oracle_logits
from tests.thread_cluster import ThreadCluster

CAMPAIGN = pytest.mark.campaign
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
# Each family, and each of its forms that another fact decides about: (family, config fields).
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "opt": ("opt", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}),
    "neox": ("gpt_neox", {}),
    "neox-serial": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5, "rope_theta": 2e4},
        },
    ),
    "opt-untied": ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
}
RANKS = [1, pytest.param(2, marks=CAMPAIGN), 3, pytest.param(4, marks=CAMPAIGN)]
LENGTHS = (1, 7, 130, 1001)


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, fields = FORMS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp(request.param), family, **fields)


@pytest.fixture(scope="module", params=RANKS)
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ThreadCluster]:
    with ThreadCluster(checkpoint, request.param) as cluster:
        yield cluster


def random_ids(length: int) -> list[int]:
    rng = torch.Generator().manual_seed(length)
    return torch.randint(0, 500, (length,), generator=rng).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_answer_equals_transformers(cluster: ThreadCluster, checkpoint: Path, length: int) -> None:
    """The distribution after every token of the prompt, then 64 greedy tokens."""
    prompt = random_ids(length)

    ours = cluster.logits(prompt).log_softmax(-1)
    answer = cluster.generate(
        prompt, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    )

    theirs = oracle_logits(checkpoint, prompt, length).log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)
    assert len(answer) == 64
    assert_greedy(checkpoint, prompt, answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_16_bit_logits_are_no_further_from_float32_than_transformers(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Norms, activations and RoPE round to 16 bit as often as in transformers, or less."""
    checkpoint = write_checkpoint(tmp_path, family, dtype=dtype)
    ids = random_ids(600)
    exact = oracle_logits(checkpoint, ids, len(ids))
    theirs = oracle_logits(checkpoint, ids, len(ids), dtype).float()

    with ThreadCluster(checkpoint, 3) as cluster:
        ours = cluster.logits(ids)

    assert (ours - exact).square().mean() <= 1.05 * (theirs - exact).square().mean()


@pytest.mark.parametrize("form", FORMS)
def test_config_of_transformers_4_reads_the_same(tmp_path: Path, form: str) -> None:
    family, fields = FORMS[form]
    write_checkpoint(tmp_path, family, **fields)
    config = read_model_config(tmp_path)

    as_transformers_4_wrote_it(tmp_path)

    values = json.loads((tmp_path / "config.json").read_text())
    assert not values.keys() & {"rope_parameters", "dtype", "layer_types"}
    assert read_model_config(tmp_path) == config


WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        ("llama", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 8192}, 8192),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", WINDOW | {"max_window_layers": 2, "layer_types": ...}, None),
        (
            "qwen3",
            WINDOW | {"sliding_window": 9000, "max_window_layers": 1, "layer_types": ...},
            9000,
        ),
        ("qwen3", WINDOW | {"max_window_layers": 0}, None),
        ("opt", {"max_position_embeddings": 100}, 100),
        ("gpt2", {"n_positions": 100}, 100),
        ("gpt_neox", {}, None),
    ],
)
def test_positions_end_where_answers_would_be_wrong(
    tmp_path: Path, family: str, changes: dict[str, Any], limit: int | None
) -> None:
    """At a table's end, or where a window begins to count, which is as in transformers.

    Llama ignores a window, Qwen has a flag and a first layer.
    """
    write_checkpoint(tmp_path, family)
    edit_json(tmp_path / "config.json", **changes)
    config = read_model_config(tmp_path)
    assert config.position_limit == limit
    check_max_model_len(config, None)
    check_max_model_len(config, limit)
    if limit is None:
        check_max_model_len(config, 10**6)
    else:
        with pytest.raises(
            CheckpointError, match=rf"max_model_len is {limit + 1}, but .* at {limit}: "
        ):
            check_max_model_len(config, limit + 1)


SLIDING = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window = 4096, which .* = 8192 outgrows, s"),
        ("mistral", {"sliding_window": ...}, "sliding_window = 4096, which .* = 8192 outgrows, s"),
        ("mistral", {"layer_types": SLIDING}, "layer_types = .*sliding.*, supported: 'full_atten"),
        ("qwen2", WINDOW | {"layer_types": SLIDING}, "layer_types = .*sliding.*, supported: 'full"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = .*, supported: 'full_atten"),
        (
            "qwen3",
            WINDOW | {"max_window_layers": 1, "layer_types": ...},
            "sliding_window = 4096, which .* outgrows, supported: attention to all tokens",
        ),
        ("qwen3", {"head_dim": 25}, "head_dim = 25, supported: an even number"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic', supp"),
        ("mistral", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope', supp"),
        ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, r"_config \(gptq\), supp"),
        ("mistral", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu', supported: silu, "),
        ("opt", {"do_layer_norm_before": False}, r"= False, supported: True \(norms before attent"),
        ("opt", {"_remove_final_layer_norm": True}, r"= True, supported: False \(a norm after the"),
        ("opt", {"layer_norm_elementwise_affine": False}, r"= False, supported: True \(norms with"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim = 32, a projection .* = 64, sup"),
        ("opt", {"num_attention_heads": 5}, "hidden_size = 64, num_attention_heads = 5 and no he"),
        ("opt", {"activation_function": "tanh"}, "activation_function = 'tanh', supported: silu"),
        (
            "gpt2",
            {"scale_attn_weights": False},
            r"= False, supported: True \(scores divided by the",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            r"= True, supported: False \(the same ",
        ),
        ("gpt2", {"add_cross_attention": True}, r"= True, supported: False \(a decoder alone"),
        ("gpt2", {"n_head": 5}, "n_embd = 64, n_head = 5 and no head_dim, supported:"),
        ("gpt2", {"n_layer": ...}, "lacks n_layer, which this kind of model needs"),
        (
            "gpt_neox",
            {"rope_parameters": None, "rotary_pct": 0.2},
            "head_dim = 16 of which RoPE turns 3, supported: an even number",
        ),
        (
            "gpt_neox",
            {"rope_parameters": None, "rotary_pct": 1.5},
            "head_dim = 16 of which RoPE turns 24, supported: an even number",
        ),
        (
            "mistral",
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            r"MixtralForCausalLM, a mixture of experts \(num_local_experts = 8\), supported: dense",
        ),
        (
            "qwen3",
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128},
            r"Qwen3MoeForCausalLM, a mixture of experts \(num_experts = 128\), supported: dense",
        ),
    ],
)
def test_what_is_near_a_family_but_other_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, family)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def rename(directory: Path, old: str, new: str, **extra: torch.Tensor) -> None:
    """Rewrite model.safetensors with another prefix of its tensors, and further tensors."""
    path = directory / "model.safetensors"
    tensors = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors | extra, path)


@pytest.mark.parametrize(
    ("family", "old", "new", "harmless"),
    [
        ("opt", "model.decoder.", "decoder.", ["decoder.version"]),
        ("gpt2", "transformer.", "", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("gpt_neox", "embed_out.", "lm_head.", ["gpt_neox.layers.0.attention.bias"]),
        ("gpt_neox", "", "", ["gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
    ],
)
def test_names_of_other_checkpoints_of_a_family(
    tmp_path: Path, family: str, old: str, new: str, harmless: list[str]
) -> None:
    """The Hub has files that transformers renames while it reads, and buffers that it drops."""
    write_checkpoint(tmp_path, family)
    before = load(tmp_path)

    rename(tmp_path, old, new, **{name: torch.ones(3) for name in harmless})

    after = load(tmp_path)
    assert torch.equal(before.layers[1].qkv_PE, after.layers[1].qkv_PE)
    assert torch.equal(before.lm_head_VE, after.lm_head_VE)
    rename(tmp_path, "", "", **{f"{new}extra.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=f"holds {new}extra.weight, which config.json does"):
        load(tmp_path)


def load(directory: Path) -> DecoderWeights:
    config = read_model_config(directory)
    return load_weights(directory, config, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_random_weights_have_the_structure_of_loaded_ones(tmp_path: Path, form: str) -> None:
    family, fields = FORMS[form]
    config = read_model_config(write_checkpoint(tmp_path, family, **fields))
    loaded = load(tmp_path)
    random = random_weights(config, device=torch.device("cpu"), dtype=torch.float32, seed=0)

    for mine, theirs in zip((random, *random.layers), (loaded, *loaded.layers), strict=True):
        shapes = [
            [
                value.shape if isinstance(value, torch.Tensor) else None
                for value in vars(part).values()
            ]
            for part in (mine, theirs)
        ]
        assert shapes[0] == shapes[1]
    parameters = sum(
        tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()
    )
    assert weights_bytes(config, torch.bfloat16) == 2 * parameters


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_that_config_json_leaves_out_are_as_in_transformers(architecture: str) -> None:
    """Defaults are facts too: OPT is tied where nothing says so, and Mistral has a window."""
    import transformers

    model_type = getattr(transformers, architecture).config_class.model_type
    config = transformers.AutoConfig.for_model(model_type, use_sliding_window=True)
    rope = getattr(config, "rope_parameters", {})
    theirs = vars(config) | {"rotary_pct": rope.get("partial_rotary_factor")}
    family = FAMILIES[architecture]
    ours = {**family.defaults} | {key: supported for key, (supported, _) in family.fixed.items()}

    assert {key: theirs[key] for key in ours} == ours
    assert config.tie_word_embeddings == ours.get("tie_word_embeddings", False)
    flags = {fact for fact in vars(family).values() if isinstance(fact, str)}
    for key in flags & {"attention_bias", "mlp_bias", "enable_bias", "use_parallel_residual"}:
        assert theirs[key] == ours.get(key, False)
