"""The tokenizer is the checkpoint's own; what it cannot take is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import CheckpointError, PromptError
from models.tokenizer import Tokenizer
from tests.checkpoints import edit_json

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools here.') }}"
    "{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(directory: Path, chat_template: str | None = TEMPLATE) -> Path:
    """Write a tokenizer whose tokens are bytes, and which begins each text with <s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=8
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def load(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_checkpoint_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "hello", " two  spaces , kept .", "größe 北京 🙂\n"])
def test_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 0
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text


def test_longer_than_the_declared_maximum_is_no_warning(
    tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    """How long a prompt may be is the model's affair, and prompts here are long."""
    assert len(tokenizer.encode("a" * 100)) == 101
    assert capfd.readouterr().err == ""


def test_part_of_a_character_decodes_to_the_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("ö")[:2]) == "\N{REPLACEMENT CHARACTER}"


def test_chat_goes_through_the_template_and_gets_no_second_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>user: hi\nassistant:"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], 'Message 0 must be an object with role and content, found "hi"'),
        ([{"content": "hi"}], "Message 0 must have a role that is text, found null"),
        ([{"role": "user", "content": [1]}], r"must have a content that is text, found \[1\]"),
        ([{"role": "tool", "content": "x"}], "does not take these messages: No tools here."),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode at character 9: surrogates"),
    ],
)
def test_malformed_messages(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        tokenizer.encode_chat(messages)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode at character 1"):
        tokenizer.encode("a\ud800")


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no chat template: send a completion"):
        load(write_tokenizer(tmp_path, None)).encode_chat([{"role": "user", "content": "hi"}])


def test_template_of_a_checkpoint_reaches_nothing(tmp_path: Path) -> None:
    """It came with the weights, from wherever these did."""
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(PromptError, match="does not take these messages: access to attribute"):
        load(write_tokenizer(tmp_path, attack)).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("text", ["{", json.dumps({"version": "1.0"})])
def test_damaged_tokenizer(tmp_path: Path, text: str) -> None:
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"Cannot read the tokenizer in .*: .") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """Nor is anyone asked on the terminal whether to run it."""
    directory = write_tokenizer(tmp_path)
    edit_json(
        directory / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
    )
    (directory / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError, match="Cannot read the tokenizer"):
        Tokenizer.load(directory)
