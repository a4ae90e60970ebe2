"""Text to token ids and back, as the checkpoint's own tokenizer does it.

transformers is imported inside the functions: it takes seconds, and a process
that only computes never needs it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.chat_template import ChatTemplate
from models.errors import CheckpointError, PromptError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class Tokenizer:
    """The tokenizer of one checkpoint; code that comes with a checkpoint is never run."""

    def __init__(self, backend: Any) -> None:
        """Take a tokenizer of transformers; see `load`."""
        self._backend = backend
        self._template: ChatTemplate | None = None
        if backend.chat_template:
            self._template = ChatTemplate(backend.get_chat_template(), backend.special_tokens_map)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer | None":
        """Read the tokenizer, or return None: a model without one takes and gives token ids."""
        if not any((directory / name).is_file() for name in _FILES):
            return None
        from transformers import AutoTokenizer

        try:
            # False, not None: with None transformers asks on the terminal whether to run code.
            backend = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CheckpointError(
                f"Cannot read the tokenizer in {directory}: {_sentence(error)}"
            ) from error
        return cls(backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` takes conversations."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return token ids, with the special tokens that the checkpoint adds (often a BOS)."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return token ids of a conversation, up to where the assistant's answer begins.

        Each message has a `role` and a `content`, both text. The template writes special tokens
        itself. It runs in a process of its own: the first call takes a second.

        Raises:
            PromptError: The checkpoint has no chat template, or it does not take these messages.
        """
        _check_messages(messages)
        if self._template is None:
            raise PromptError(
                "This checkpoint has no chat template: send a completion with a plain prompt"
            )
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return self._encode(text, add_special_tokens=add_special_tokens)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token as the vocabulary spells it."""
        return [str(each) for each in self._backend.convert_ids_to_tokens(list(ids))]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, with no spaces taken out.

        Bytes that are no whole character yet become U+FFFD.
        """
        text = self._backend.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # it would alter code and break streaming
        )
        return str(text)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise PromptError(
                f"The prompt is not valid Unicode at character {error.start}: {error.reason}"
            ) from error
        encoding = self._backend(
            text,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,  # about prompts longer than the tokenizer thinks the model takes
        )
        return list(encoding["input_ids"])


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("A chat needs a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"Message {index} must be an object with role and content, found {_json(message)}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(
                    f"Message {index} must have a {key} that is text, found"
                    f" {_json(message.get(key))}"
                )


def _json(value: object) -> str:
    """Show a value as the client wrote it, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


def _sentence(error: Exception) -> str:
    """Return the first line of what a library said; the others are its advice to programmers."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
