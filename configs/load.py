"""From files and overrides to a checked `Config`."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from configs.schema import Config


class ConfigError(ValueError):
    """A key that does not exist, or a value that its key does not take."""


def load(
    file: Path | None = None,
    values: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the schema's defaults, changed by a YAML file, by values, by `key=value`, in order.

    Raises:
        ConfigError: One sentence on the first thing that is wrong.
    """
    layers = [] if file is None else [_read(file)]
    layers += [_tree(dict(values or {})), _dotlist(overrides)]
    schema = OmegaConf.structured(Config)
    known = list(_keys(OmegaConf.to_container(schema)))
    try:
        for layer in layers:
            _refuse_unknown(_keys(OmegaConf.to_container(layer)), known)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema, *layers)))
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}" if error.full_key else reason) from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except OSError as error:
        if error.strerror is None:  # of OmegaConf: the file holds a bare number
            raise ConfigError(f"{file} must hold `key: value` lines") from None
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {_one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} must hold `key: value` lines, not a list")
    return loaded


def _tree(values: dict[str, Any]) -> DictConfig:
    try:
        return OmegaConf.create(values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise ConfigError(f"expected key=value, got {override!r}")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {' '.join(overrides)!r}: {_one_line(error)}") from None


def _refuse_unknown(keys: Iterable[str], known: Sequence[str]) -> None:
    for key in keys:
        # A whole section is refused by its type.
        if key in known or any(other.startswith(f"{key}.") for other in known):
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        raise ConfigError(f"unknown key {key!r}; {hint}")


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
