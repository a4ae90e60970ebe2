"""A tokenizer for tests, as `models.tokenizer.Tokenizer` asks transformers for it."""

from typing import Any, ClassVar


class LetterBackend:
    """Of transformers' interface what `Tokenizer` uses; a letter's token is its code point."""

    chat_template = "{{ messages | map(attribute='content') | join('>') }}"
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text if letter != " "]}

    def get_chat_template(self) -> str:
        return self.chat_template

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))
