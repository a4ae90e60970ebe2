"""Keys and values made again of saved layer inputs are those that the forward pass made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.timing import PartTimer
from models.config import read_model_config
from models.decoder import Decoder
from models.weights import load_weights
from tests.checkpoints import TINY, write_checkpoint

CPU = torch.device("cpu")
# Families, and what of them changes the way from inputs to keys and values.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in TINY} | {
    "llama-mha": ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
}


def make_decoder(directory: Path, form: str, dtype: torch.dtype = torch.float32) -> Decoder:
    family, fields = FORMS[form]
    write_checkpoint(directory, family, dtype=dtype, **fields)
    config = read_model_config(directory)
    return Decoder(config, load_weights(directory, config, device=CPU, dtype=dtype))


class Recorder:
    """Attention that mixes nothing, and keeps the keys and values of every layer."""

    def __init__(self) -> None:
        self.kv: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        self.kv[layer] = kv_TJD.clone()
        return q_THD.float()

    def on_inputs(self, layer: int, normed_TE: Tensor) -> None:
        self.inputs[layer] = normed_TE.clone()


def record(decoder: Decoder, positions_T: Tensor, keep_rows: list[int] | None = None) -> Recorder:
    recorder = Recorder()
    ids_T = torch.randint(0, 500, positions_T.shape, generator=torch.Generator().manual_seed(0))
    decoder.forward(
        ids_T,
        positions_T,
        recorder,
        PartTimer(CPU),
        keep_rows=keep_rows,
        on_inputs=recorder.on_inputs,
    )
    return recorder


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("form", FORMS)
def test_projected_inputs_are_what_forward_stored(
    tmp_path: Path, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Biases, norms of keys and RoPE at absolute positions, for rows in any selection."""
    decoder = make_decoder(tmp_path, form, dtype)
    positions_T = torch.cat([torch.arange(7, 60), torch.arange(1000, 1030)])
    recorded = record(decoder, positions_T)
    rows = torch.tensor([0, 1, 50, 52, 53, 82])

    assert recorded.inputs.keys() == set(range(decoder.config.num_layers))
    for layer, inputs_TE in recorded.inputs.items():
        assert inputs_TE.dtype is dtype
        kv_RJD = decoder.project_inputs(
            layer, inputs_TE[rows], decoder.rotations(positions_T[rows])
        )
        assert kv_RJD.is_contiguous()
        torch.testing.assert_close(kv_RJD, recorded.kv[layer][rows], rtol=tolerance, atol=tolerance)


def test_inputs_of_the_last_layer_are_all_rows(tmp_path: Path) -> None:
    """Its queries are those of kept rows alone, but every row's keys and values are stored."""
    decoder = make_decoder(tmp_path, "opt")
    positions_T = torch.arange(20)

    recorded = record(decoder, positions_T, keep_rows=[19])

    last = decoder.config.num_layers - 1
    kv_TJD = decoder.project_inputs(last, recorded.inputs[last], None)
    torch.testing.assert_close(kv_TJD, recorded.kv[last], rtol=1e-5, atol=1e-5)


def test_learned_positions_turn_nothing(tmp_path: Path) -> None:
    """They are part of the inputs already."""
    assert make_decoder(tmp_path, "gpt2").rotations(torch.arange(3)) is None
