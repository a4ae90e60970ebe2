"""The loop of ``ringspan chat``, before a client that answers at once."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from actors.messages import Progress, RequestDelta, RequestMetrics
from cluster.chat import Chat, converse
from models.errors import PromptError
from models.sampling import SamplingParams


class Echo:
    """Answers with the number of messages, or fails."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: Exception | None = None
        self.cancelled = 0

    def stream(
        self, prompt: Mapping[str, Any], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestDelta]:
        if self.error is not None:
            raise self.error
        self.asked.append(prompt["messages"])
        delta: dict[str, Any] = {
            "request_id": "a",
            "index": 0,
            "token_ids": (1,),
            "prompt_tokens": 9,
        }
        try:
            yield RequestDelta(text="answer ", num_cached_tokens=4, **delta)
            metrics = RequestMetrics(queue_s=0.0, ttft_s=0.5, total_s=1.5)
            text = str(len(prompt["messages"]))
            yield RequestDelta(text=text, num_cached_tokens=4, metrics=metrics, **delta)
        except GeneratorExit:
            self.cancelled += 1
            raise

    def progress(self, request_id: str | None = None) -> list[Progress]:
        return []


def talk(client: Echo, *lines: str, interactive: bool = True, **settings: Any) -> Chat:
    chat = Chat(client, SamplingParams(), interactive=interactive, **settings)
    converse(chat, iter(lines))
    return chat


def test_a_conversation_grows(capsys: pytest.CaptureFixture[str]) -> None:
    client = Echo()
    chat = talk(client, "one", "two", "/stats", "/exit", "never", system="S", document="D")
    assert [message["role"] for message in client.asked[-1]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert client.asked[0][1]["content"] == "D\n\none"
    assert client.asked[1][3]["content"] == "two"
    assert chat.messages[-1] == {"role": "assistant", "content": "answer 4"}
    told = capsys.readouterr().out
    assert told.startswith("answer 2\nanswer 4\n")
    assert "9 prompt tokens, 4 of them reused, 2 in the answer" in told
    assert "first token after 0.50 s, 1.0 tokens/s" in told


def test_regenerate_and_reset(capsys: pytest.CaptureFixture[str]) -> None:
    client = Echo()
    talk(client, "/retry", "one", "/regenerate", "/reset", "two", "/nothing")
    assert [len(messages) for messages in client.asked] == [1, 1, 1]
    assert client.asked[0] == client.asked[1]
    told = capsys.readouterr().err
    assert "there is no answer yet" in told
    assert "there is no /nothing" in told


def test_lines_of_a_pipe_are_messages(capsys: pytest.CaptureFixture[str]) -> None:
    client = Echo()
    talk(client, "/reset", "", "one", interactive=False)
    assert client.asked[0][0]["content"] == "/reset"
    assert capsys.readouterr().out == "answer 1\nanswer 3\n"


def test_errors_end_a_chat_that_has_not_begun(capsys: pytest.CaptureFixture[str]) -> None:
    client = Echo()
    chat = talk(client, "one")
    client.error = PromptError("too long")
    converse(chat, iter(["two"]))
    assert len(chat.messages) == 2  # as if it had not been said
    assert "too long" in capsys.readouterr().err
    with pytest.raises(PromptError):
        talk(client, "one")
    chat.interactive = False
    with pytest.raises(PromptError):
        converse(chat, iter(["two"]))


def test_ctrl_c_ends_the_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Echo()

    def interrupt(delta: RequestDelta) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cluster.chat._show", interrupt)
        chat = talk(client, "one")
        assert client.cancelled == 1
        with pytest.raises(KeyboardInterrupt):  # nobody sits there to say another
            talk(client, "one", interactive=False)
        assert client.cancelled == 2
    converse(chat, iter(["two"]))
    assert len(client.asked) == 3
