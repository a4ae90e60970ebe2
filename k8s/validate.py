"""Check Kubernetes manifests without a cluster: ``python -m k8s.validate [PATH...]``.

A PATH is a directory with a kustomization.yaml, a YAML file, or - for standard input; without one,
every overlay of this repository. Ray's kinds are checked by KubeRay's definitions
(`k8s.crd_schema`) and the operator's commonest rules (`k8s.operator_rules`), all others by
``kubernetes-validate``, and the objects of one PATH together by what Ringspan needs
(`k8s.cluster_rules`).

Exit status: 0 all valid, 1 something is wrong, 2 there is nothing to check with.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from k8s.cluster_rules import cluster_errors
from k8s.crd_schema import CustomKinds, without_nulls
from k8s.operator_rules import operator_errors

HERE = Path(__file__).parent
KUBERNETES = "1.32"  # the oldest that is checked against
# Of other operators, whose definitions are not here.
UNCHECKED_GROUPS = frozenset({"monitoring.coreos.com"})
RENDER_S = 60.0


class ManifestError(Exception):
    """What should be checked cannot be read or rendered."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice in one mapping, as the API server does."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ManifestError(f"line {node.start_mark.line + 1}: key {key!r} is there twice")
    values = [loader.construct_object(value, deep=True) for _, value in node.value]
    return dict(zip(keys, values, strict=True))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def overlays() -> list[Path]:
    """Return what this repository offers to apply."""
    return sorted(path.parent for path in HERE.glob("overlays/*/kustomization.yaml"))


def renderer() -> list[str] | None:
    """Return the command that renders a kustomization; None: there is none on this machine."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


def render(directory: Path) -> str:
    """Return the manifests that a kustomization stands for.

    Raises:
        ManifestError: It is wrong, or neither kubectl nor kustomize is installed.
    """
    command = renderer()
    if command is None:
        raise ManifestError(f"{directory}: install kubectl or kustomize to render it")
    run = subprocess.run(
        [*command, str(directory)], capture_output=True, text=True, timeout=RENDER_S
    )
    if run.returncode != 0:
        raise ManifestError(f"{directory}: {' '.join(run.stderr.split())}")
    return run.stdout


def read(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML text.

    Raises:
        ManifestError: It is not YAML, a key is there twice, or a document is no object.
    """
    try:
        documents = [d for d in yaml.load_all(text, Loader=_StrictLoader) if d is not None]
    except yaml.YAMLError as error:
        raise ManifestError(f"not YAML: {' '.join(str(error).split())}") from None
    for document in documents:
        known = isinstance(document, dict) and {"apiVersion", "kind", "metadata"} <= {*document}
        if not known:
            raise ManifestError("a document without apiVersion, kind and metadata")
    return [without_nulls(document) for document in documents]


def errors(objects: Sequence[dict[str, Any]], kinds: CustomKinds) -> Iterator[str]:
    """Say what is wrong with objects that are applied together, a sentence each."""
    are_shaped = True
    for document in objects:
        where = f"{document['kind']} {document['metadata'].get('name', '?')}"
        group = document["apiVersion"].rpartition("/")[0]
        if group in UNCHECKED_GROUPS:
            continue
        found = list(kinds.errors(document) if kinds.has(group) else _core_errors(document))
        are_shaped = are_shaped and not found
        yield from (f"{where}: {error}" for error in found)
        if kinds.has(group) and not found:
            yield from (f"{where}: {error}" for error in operator_errors(document))
    # These rely on the shape that the schemas have just vouched for.
    if are_shaped:
        yield from cluster_errors(objects)


def _core_errors(document: dict[str, Any]) -> Iterator[str]:
    import kubernetes_validate  # of the extra `test`

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path)) or '(top)'}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"{document['apiVersion']} {document['kind']} is no kind of Kubernetes {KUBERNETES}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names, and print a line for each; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m k8s.validate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="*", metavar="PATH", help="(every overlay)")
    paths = parser.parse_args(arguments).paths or [str(path) for path in overlays()]
    kinds, are_valid = CustomKinds(), True
    for path in paths:
        try:
            objects = read(_text(path))
            found = list(errors(objects, kinds))
        except ManifestError as error:
            print(f"ringspan: {error}", file=sys.stderr)
            return 2
        are_valid = are_valid and not found
        print(f"{path}: {len(objects)} objects, {len(found)} errors")
        print("".join(f"    {error}\n" for error in found), end="")
    return 0 if are_valid else 1


def _text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    if Path(path).is_dir():
        return render(Path(path))
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
