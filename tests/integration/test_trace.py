"""A trace of real ranks over Ray: every row is there, and it says what the steps' records say."""

import json
from pathlib import Path

import pytest

from cluster import LLM, SamplingParams, TraceError
from cluster.__main__ import main
from tests.unit.test_actors_timeline import assert_valid_trace

ROWS = ("steps", "compute", "send", "receive")
LAYERS = 2  # of the llama fixture


@pytest.mark.usefixtures("shared_ray")
def test_trace_command_writes_a_timeline(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, a prefill and a decode burst: rows, layers, bytes, and a summary in numbers."""
    output = tmp_path / "trace.json"
    prompt = ["--prompt-token-ids", ",".join(map(str, range(1, 41))), "--max-tokens", "5"]

    command = ["trace", str(llama), *prompt, "-cp", "2", "--ignore-eos", "--json"]
    command.append("ring.algorithm=pass_kv")
    assert main([*command, "--output", str(output)]) == 0

    summary = json.loads(capsys.readouterr().out)
    rows = assert_valid_trace(json.loads(output.read_text()))
    assert [span["name"] for span in rows["coordinator steps"]] == [
        "step 0 prefill",
        "step 1 decode",
    ]
    for rank in range(2):
        (host,) = {row.split("(")[1].split(")")[0] for row in rows if row.startswith("rank")}
        compute, receive = (rows[f"rank {rank} ({host}) {row}"] for row in ("compute", "receive"))
        assert {span["name"] for span in compute} >= {"gemm", "attention", "exchange", "wait"}
        layers = {s["args"]["layer"] for s in compute if s["name"] == "attention"}
        assert layers == set(range(LAYERS))
        # The ring in all layers but the last, which gathers queries and partials, as decode does
        # partials in each layer and then tokens.
        kinds = [span["name"] for span in receive]
        assert kinds.count("exchange") == LAYERS - 1
        assert kinds.count("all_gather") == 2 + 4 * (LAYERS + 1)
        of_rank = summary["total"]["ranks"][rank]
        assert sum(span["args"]["bytes"] for span in receive) == of_rank["received_bytes"]
        compute_us = sum(span["dur"] for span in compute)
        assert compute_us == pytest.approx(1e6 * sum(of_rank["parts_s"].values()), rel=1e-3)
        assert 0.0 <= sum(of_rank["waited_for_s"]) <= of_rank["waited_s"]
    assert [len(step["layer_skew_s"]) for step in summary["steps"]] == [LAYERS, LAYERS]
    assert summary["is_cut"] is False


@pytest.mark.usefixtures("shared_ray")
def test_trace_is_started_and_stopped_in_python(llama: Path) -> None:
    """Only what lies between is recorded, and the answer is the same."""
    prompt, params = {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=2, temperature=0.0)
    overrides = ["ring.algorithm=pass_kv"]
    with LLM(llama, context_parallel_size=2, overrides=overrides) as llm:
        with pytest.raises(TraceError, match="no trace is being recorded: call start_trace first"):
            llm.stop_trace()
        before = llm.generate(prompt, params)[0]
        llm.start_trace()
        with pytest.raises(TraceError, match="recorded already: call stop_trace first"):
            llm.start_trace()
        traced = llm.generate(prompt, params)[0]
        trace = llm.stop_trace()
        llm.generate(prompt, params)
        llm.start_trace()
        again = llm.stop_trace()

    assert traced.outputs == before.outputs
    assert [step.record for step in trace.steps] == list(traced.steps)
    assert "late: rank" in trace.summary().text()
    assert again.steps == ()
