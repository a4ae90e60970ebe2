"""Sampling through Ray: stop texts, log-probabilities, several answers, on the command line too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import LLM, SamplingError, SamplingParams
from cluster.__main__ import main
from models.needle_text import make_demo, question
from tests.oracle import oracle_logits

DEMO = make_demo(512, seed=1)
KEY, ANSWER = DEMO.questions[0]
PROMPT = DEMO.prompt_text + question(KEY)
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def llm(shared_ray: None, needle: Path) -> Iterator[LLM]:
    with LLM(needle, context_parallel_size=2) as llm:
        yield llm


def test_stop_text_ends_the_answer_within_a_burst(llm: LLM) -> None:
    """The tokens end with the one that completes it; what the burst had beyond is dropped."""
    stop, text = ANSWER[3:6], ANSWER[:3]
    for include, expected in ((False, text), (True, text + stop)):
        params = SamplingParams(stop=[stop, "@"], include_stop_str_in_output=include, **GREEDY)
        answer = llm.generate(PROMPT, params)[0].outputs[0]
        assert answer.text == expected
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert bytes(answer.token_ids).decode() == text + stop

    last = ord(ANSWER[3])
    answer = llm.generate(PROMPT, SamplingParams(stop_token_ids=[last], **GREEDY))[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text, "stop", last)
    answer = llm.generate(PROMPT, SamplingParams(**GREEDY))[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (ANSWER, "stop", None)


def test_bad_words_are_not_written(llm: LLM) -> None:
    """The right answer's own characters, from the second on."""
    params = SamplingParams(bad_words=[ANSWER[2:4]], **GREEDY)

    answer = llm.generate(PROMPT, params)[0].outputs[0]

    assert answer.text.startswith(ANSWER[:3])
    assert ANSWER[2:4] not in answer.text


def test_logprobs_of_prompt_and_answer(llm: LLM, needle: Path) -> None:
    """As transformers has them, with the tokens' texts."""
    params = SamplingParams(logprobs=2, prompt_logprobs=1, **GREEDY)

    output = llm.generate(PROMPT, params)[0]

    answer, prompt = output.outputs[0], output.prompt_logprobs
    ids = [*output.prompt_token_ids, *answer.token_ids]
    wanted = oracle_logits(needle, ids[:-1], len(ids) - 1).double().log_softmax(-1).numpy()
    assert answer.logprobs is not None
    assert prompt is not None
    assert prompt[0] is None
    assert len(prompt) == len(output.prompt_token_ids)
    places = [place for place in (*prompt[1:], *answer.logprobs) if place is not None]
    got = [place[token].logprob for place, token in zip(places, ids[1:], strict=True)]
    np.testing.assert_allclose(got, wanted[range(len(got)), ids[1:]], rtol=1e-5, atol=1e-4)
    assert all(place[token].rank >= 1 for place, token in zip(places, ids[1:], strict=True))
    for place, token in zip(answer.logprobs, answer.token_ids, strict=True):
        assert place[token].rank == 1
        assert len(place) == 2
    assert (
        "".join(
            str(place[token].decoded_token)
            for place, token in zip(answer.logprobs[:-1], answer.token_ids, strict=False)
        )
        == ANSWER
    )
    assert answer.cumulative_logprob == pytest.approx(sum(got[-len(answer.token_ids) :]))


def test_several_answers_of_one_prompt(llm: LLM) -> None:
    """Answer i is the same whatever their number, and what ran before."""
    settings: dict[str, Any] = {
        "max_tokens": 10,
        "temperature": 3.0,
        "seed": 11,
        "ignore_eos": True,
    }
    three, two = (
        llm.generate("any text", SamplingParams(n=n, prompt_logprobs=0, **settings))[0]
        for n in (3, 2)
    )

    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in three.outputs}) == 3
    assert two.outputs == three.outputs[:2]
    assert two.prompt_logprobs == three.prompt_logprobs
    assert [step.phase for step in three.steps][:2] == ["prefill", "mixed"]
    assert sum(step.prefill_tokens for step in three.steps) == len(three.prompt_token_ids) + 2
    alone = llm.generate("any text", SamplingParams(**settings))[0]
    assert alone.outputs[0].token_ids == three.outputs[0].token_ids


def test_wrong_parameters_are_refused_and_the_next_is_served(llm: LLM) -> None:
    """What only the model's vocabulary tells comes back through Ray as itself."""
    with pytest.raises(SamplingError, match=r"stop_token_ids must hold ids .* got 99999$"):
        llm.generate("hi", SamplingParams(stop_token_ids=[99999]))
    with pytest.raises(SamplingError, match="logprobs must be at most 20 here, got 21"):
        llm.generate("hi", SamplingParams(logprobs=21))
    assert llm.generate("hi", SamplingParams(max_tokens=1, ignore_eos=True))[0].outputs


@pytest.mark.usefixtures("shared_ray")
def test_command_line_prints_strict_json(needle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number can be read by any parser, all answers are there."""
    flags = (
        "--json --n 2 --temperature 1.5 --seed 3 --max-tokens 5 --logprobs 300 --prompt-logprobs 1"
        " --top-p 0.9 --top-k 50 --min-p 0.01 --presence-penalty 0.5 --frequency-penalty -0.5"
        " --repetition-penalty 1.1 --min-tokens 5 --logit-bias 97=1.5 --bad-words zz --stop yy"
        " --stop-token-ids 98 max_logprobs=-1"
    )

    assert main(["generate", str(needle), "--prompt", "one", *flags.split()]) == 0

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    (line,) = capsys.readouterr().out.splitlines()
    output = json.loads(line, parse_constant=refuse)
    assert len(output["outputs"]) == 2
    assert all(len(answer["logprobs"]) == 5 for answer in output["outputs"])
    assert output["prompt_logprobs"][0] is None
