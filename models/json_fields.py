"""JSON files of a checkpoint, read with their types; what does not fit is one sentence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from models.errors import CheckpointError


def read_json(path: Path) -> dict[str, object]:
    """Read a file that must hold one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


class JsonFields:
    """The keys of one JSON object; null counts as missing, as it does for transformers."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path = path
        self.values = {key: value for key, value in values.items() if value is not None}

    def refuse(self, found: str, supported: str) -> NoReturn:
        """Raise the one sentence about what this file says and what could be served."""
        raise CheckpointError(f"{self.path} has {found}, supported: {supported}")

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"{key} = {value!r}", "a whole number of at least 1")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e308:
            self.refuse(f"{key} = {value!r}", "a finite number above 0")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if key in self.values else None

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{key} = {value!r}", "true or false")
        return value

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks {key}, which this kind of model needs")
        return value
