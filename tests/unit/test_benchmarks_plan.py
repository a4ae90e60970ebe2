"""The arithmetic of shapes is that of the models, and the plan needs nothing to be printed."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.llama import model_config
from benchmarks.plan import DEVICE_BYTES, SECTIONS, describe
from benchmarks.shapes import LLAMA_3_8B, NEEDLE, TOY, Shape, attention_flops
from benchmarks.sizes import FULL, K, M
from models.needle import NEEDLE_CONFIG
from models.weights import weights_bytes
from tests.unit.test_imports_without_ray import ROOT, run_without

KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}


@pytest.mark.parametrize("shape", [LLAMA_3_8B, NEEDLE, TOY], ids=["llama", "needle", "toy"])
def test_bytes_of_the_weights_are_the_models(shape: Shape) -> None:
    """The decode roofline stands on them; norms are the only difference."""
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert shape.weights_bytes(2) + 2 * norms == weights_bytes(model_config(shape), torch.bfloat16)


def test_llama_shape_is_the_published_one() -> None:
    """8.03 billion parameters, 128 KiB of keys and values a token in bfloat16."""
    assert LLAMA_3_8B.weights_bytes(1) == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA_3_8B.kv_bytes(1, 2) == 128 * K


def test_needle_shape_is_the_checkpoints() -> None:
    assert {key: NEEDLE_CONFIG[name] for key, name in KEYS.items()} == dataclasses.asdict(NEEDLE)


def test_a_causal_mask_leaves_half_of_the_work() -> None:
    """Rates with and without a mask are compared with one matrix product rate."""
    full = attention_flops(1000, 4, 64, causal=False)
    assert full == 2 * 2 * 1000 * 1000 * 64 * 4
    assert attention_flops(1000, 4, 64, causal=True) == full / 2


def test_full_run_fits_one_h200() -> None:
    """Weights, pages and activations of the largest piece, with room to be wrong."""
    pieces = [piece for section in SECTIONS.values() for piece in section.plan(FULL)]
    assert 0 < max(piece.memory_bytes for piece in pieces) < 0.7 * DEVICE_BYTES
    assert {needle.num_tokens for needle in FULL.needles} == {128 * K, 512 * K, M}


def test_no_piece_is_planned_longer_than_its_section_may_take() -> None:
    for section in SECTIONS.values():
        assert 2 * sum(piece.seconds for piece in section.plan(FULL)) < section.timeout_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it runs")
def test_without_cuda_it_says_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0

    printed = capsys.readouterr().out
    assert "sees no CUDA device: this is what would be done" in printed
    assert describe(FULL, list(SECTIONS)) in printed
    assert "128K tokens, random weights in bfloat16: about 93 s, 42.4 GB" in printed


def test_plan_is_of_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios need the rates of the same run, so these come along."""
    assert gpu.main(["--plan", "--only", "decode", "prefill", "--skip", "prefill"]) == 0

    printed = capsys.readouterr().out
    sections = [line.partition(":")[0] for line in printed.splitlines() if ": " in line[:12]]
    assert sections == ["--plan", "rates", "decode"]


def test_python_without_torch_gets_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make gpu` on a fresh clone says what it would do, whatever python3 has."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.main(["--quick"]) == 0
    assert "has no torch: this is what would be done" in capsys.readouterr().out


def test_make_gpu_needs_no_environment_of_its_own() -> None:
    """It takes the python that it is given, and installs nothing."""
    run_without(("torch", "numpy"), ("benchmarks.gpu",))
    make = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", "OPTIONS=--plan"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert make.returncode == 0
    assert "this is what would be done" in make.stdout
