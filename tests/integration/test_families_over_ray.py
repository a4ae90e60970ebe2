"""Every family through Ray: what holds over threads holds over processes."""

from pathlib import Path

import numpy as np
import pytest

from cluster import LLM, SamplingParams
from tests.checkpoints import TINY, write_checkpoint
from tests.oracle import assert_greedy

EVERY_DAY = ("gpt2",)  # threads run all of them every day
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in EVERY_DAY else pytest.mark.campaign)
        for family in TINY
        if family != "llama"
    ],
)
def test_greedy_tokens_equal_transformers(tmp_path: Path, family: str) -> None:
    """Two ranks, an odd prompt, 64 tokens. Llama is in test_llm.py."""
    checkpoint = write_checkpoint(tmp_path, family)
    prompt = np.random.default_rng(0).integers(0, 500, 331).tolist()

    overrides = ["ring.algorithm=pass_q"]
    with LLM(checkpoint, context_parallel_size=2, overrides=overrides) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, GREEDY)[0]

    assert len(output.outputs[0].token_ids) == 64
    assert_greedy(checkpoint, prompt, output.outputs[0].token_ids)
