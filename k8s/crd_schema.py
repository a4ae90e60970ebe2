"""CRDs as closed JSON schemas, with which manifests are checked offline.

An unknown field is an error, as with ``kubectl apply --validate=strict``. The API server's rules in
CEL (x-kubernetes-validations) are not evaluated, and neither is what the operator checks in Go; the
commonest of the latter are in `k8s.operator_rules`.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

CRDS = Path(__file__).with_name("crds")
_RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
_LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_LONGEST_MESSAGE = 300
# A CRD leaves `metadata` open; the API server checks it as ObjectMeta.
_TEMPLATE_META: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 253, "pattern": _NAME},
        "generateName": {"type": "string"},
        "namespace": {"type": "string", "maxLength": 63, "pattern": _NAME},
        "labels": {
            "type": "object",
            "additionalProperties": {"type": "string", "maxLength": 63, "pattern": _LABEL_VALUE},
        },
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
    },
}
_OBJECT_META = _TEMPLATE_META | {
    "anyOf": [{"required": ["name"]}, {"required": ["generateName"]}],
}
_DROPPED = ("nullable", "default", "description")


@dataclass(frozen=True)
class _Version:
    validator: Any
    is_served: bool


class CustomKinds:
    """The custom resources whose definitions lie in a directory."""

    def __init__(self, directory: Path = CRDS) -> None:
        self._versions = _versions(directory)

    def has(self, group: str) -> bool:
        """Return whether this group is defined here, so that each of its kinds must be."""
        return any(group == known for known, _ in self._versions)

    def errors(self, document: dict[str, Any]) -> Iterator[str]:
        """Say, a sentence each, where an object is not as its definition has it."""
        group, _, version = document["apiVersion"].rpartition("/")
        versions = self._versions.get((group, document["kind"]), {})
        if version not in versions or not versions[version].is_served:
            served = [name for name, known in versions.items() if known.is_served]
            yield f"{document['apiVersion']} {document['kind']} is not served; served: {served}"
            return
        found = versions[version].validator.iter_errors(without_nulls(document))
        for error in sorted(found, key=lambda error: [str(part) for part in error.absolute_path]):
            yield f"{dotted(error.absolute_path)}: {_shortened(error.message)}"


@functools.cache
def _versions(directory: Path) -> dict[tuple[str, str], dict[str, _Version]]:
    found: dict[tuple[str, str], dict[str, _Version]] = {}
    for path in sorted(directory.glob("*.yaml")):
        spec = yaml.load(path.read_text(), Loader=_fast_loader())["spec"]
        found[spec["group"], spec["names"]["kind"]] = {
            version["name"]: _Version(
                _validator(version["schema"]["openAPIV3Schema"]), version["served"]
            )
            for version in spec["versions"]
        }
    return found


def without_nulls(value: Any) -> Any:
    """Return it as the API server sees it, which drops a null."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def dotted(parts: Any) -> str:
    """Return a path as one writes it: ``spec.containers[0].name``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or "(top)"


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]} ... {message[-half:]}"


def _fast_loader() -> Any:
    # In Python alone the three definitions take half a minute.
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _validator(schema: dict[str, Any]) -> Any:
    closed = _closed(schema, "")
    closed["properties"]["metadata"] = _OBJECT_META
    closed["required"] = sorted({*closed.get("required", []), "apiVersion", "kind", "metadata"})
    closed["additionalProperties"] = False
    kind = validators.extend(Draft202012Validator, {"x-list-map-keys": _list_map_keys})
    return kind(closed)


def _closed(schema: Any, where: str) -> Any:
    """Return a structural schema as a JSON schema that takes no unknown field."""
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            closed[key] = {name: _closed(part, f"{where}.{name}") for name, part in value.items()}
        elif key in ("items", "additionalProperties", "not"):
            closed[key] = _closed(value, f"{where}[]")
        elif key in ("anyOf", "allOf", "oneOf"):
            closed[key] = [_closed(part, where) for part in value]
        elif not key.startswith("x-kubernetes-") and key not in _DROPPED:
            closed[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        closed.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
        closed.pop("type", None)
    if "required" in schema:
        # Defaults are filled in before anything is checked: such a field is never missing.
        properties = schema.get("properties", {})
        names = schema["required"]
        closed["required"] = [n for n in names if "default" not in properties.get(n, {})]
    _close_object(schema, closed, where)
    _close_number_and_list(schema, closed)
    return closed


def _close_object(schema: dict[str, Any], closed: dict[str, Any], where: str) -> None:
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") != "object" or keeps or "additionalProperties" in schema:
        return
    if schema.get("properties"):
        closed["additionalProperties"] = False
    elif where.endswith(".metadata"):
        closed.clear()
        closed.update(copy.deepcopy(_TEMPLATE_META))


def _close_number_and_list(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    bounds = _RANGES.get(schema.get("format", ""))
    if schema.get("type") == "integer" and bounds:
        closed["minimum"] = max(bounds[0], schema.get("minimum", bounds[0]))
        closed["maximum"] = min(bounds[1], schema.get("maximum", bounds[1]))
        del closed["format"]
    if schema.get("x-kubernetes-list-type") == "set":
        closed["uniqueItems"] = True
    if schema.get("x-kubernetes-list-type") == "map":
        closed["x-list-map-keys"] = list(schema.get("x-kubernetes-list-map-keys", []))
    if schema.get("nullable") and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]


def _list_map_keys(_: Any, keys: list[str], items: Any, __: Any) -> Iterator[ValidationError]:
    """Refuse two items of one list that are told apart by ``keys`` and are alike in them."""
    if not isinstance(items, list):
        return
    seen: dict[tuple[str, ...], int] = {}
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            continue
        # A key left out takes its default; that of a port's protocol is the one that matters.
        name = tuple(str(item.get(key, "TCP" if key == "protocol" else None)) for key in keys)
        if name in seen:
            told = ", ".join(f"{key}={part}" for key, part in zip(keys, name, strict=True))
            yield ValidationError(f"items {seen[name]} and {index} have the same {told}")
        seen.setdefault(name, index)
