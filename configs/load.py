"""From files and overrides to a checked `Config`."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

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
    layers.append(OmegaConf.create(dict(values or {})))
    layers.append(_dotlist(overrides))
    merged = OmegaConf.structured(Config)
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        return cast(Config, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error.full_key or str(error.key), merged)) from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}" if error.full_key else reason) from None
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _read(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except Exception as error:  # yaml's own tree of errors
        raise ConfigError(f"{file} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} must hold `key: value` lines, not a list")
    return loaded


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"expected key=value, got {override!r}")
    return OmegaConf.from_dotlist(list(overrides))


def _unknown_key(key: str, schema: Any) -> str:
    known = list(_keys(OmegaConf.to_container(schema)))
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _keys(tree: Any, prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name
