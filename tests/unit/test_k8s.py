"""The manifests of k8s/, checked without Kubernetes: see `k8s.validate`."""

import argparse
import copy
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import generate
from cluster.serve import app
from configs import Config
from k8s.cluster_rules import application_config, group_list, quantity
from k8s.crd_schema import CustomKinds
from k8s.operator_rules import cluster_spec, serve_config
from k8s.validate import ManifestError, errors, main, overlays, read, render, renderer
from tests.checkpoints import write_llama_checkpoint

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FILES = sorted(
    path
    for path in K8S.rglob("*.yaml")
    if path.parent.name != "crds" and not path.name.endswith(("kustomization.yaml", "patch.yaml"))
)
KUSTOMIZATIONS = sorted(K8S.rglob("kustomization.yaml"))
# What the RayJob's command line relies on.
BATCH_FLAGS = ("--prompt-file", "--output", "--max-tokens", "-cp", "--device")
Objects = list[dict[str, Any]]


def _flags() -> set[str]:
    parser = argparse.ArgumentParser()
    generate.add_command(parser.add_subparsers())
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return set(commands.choices["generate"]._option_string_actions)


@pytest.fixture(scope="module")
def kinds() -> CustomKinds:
    return CustomKinds()


@pytest.fixture(scope="module")
def served() -> Objects:
    """What base/serve has, in files of their own."""
    return [document for path in sorted((K8S / "base/serve").iterdir()) for document in _read(path)]


def _read(path: Path) -> Objects:
    return [] if path.name == "kustomization.yaml" else read(path.read_text())


def _named(objects: Objects, kind: str) -> dict[str, Any]:
    [found] = [document for document in objects if document["kind"] == kind]
    return found


@pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")
@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
def test_overlays_are_valid_as_they_are_applied(overlay: Path, kinds: CustomKinds) -> None:
    assert list(errors(read(render(overlay)), kinds)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_files_are_valid_by_themselves(path: Path, kinds: CustomKinds) -> None:
    """Also where nothing renders kustomizations; what needs other objects is looked at above."""
    objects = read(path.read_text())
    assert objects
    found = [e for document in objects for e in errors([document], kinds)]
    assert [e for e in found if "no Service leads to" not in e] == []


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.name))
def test_kustomizations_name_what_exists(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    named = [*content.get("resources", []), *content.get("components", [])]
    named += [patch["path"] for patch in content.get("patches", []) if "path" in patch]
    for name in named:
        target = path.parent / name
        assert (target / "kustomization.yaml" if target.is_dir() else target).is_file(), name


def test_versions_are_those_of_the_tests() -> None:
    """Another Ray in the image than in rayVersion, and nothing starts."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    versions = {
        cluster_spec(document)["rayVersion"]
        for path in FILES
        for document in _read(path)
        if document["apiVersion"].startswith("ray.io/")
    }
    [in_image] = re.findall(r"^ARG RAY_VERSION=(\S+)$", (K8S / "Dockerfile").read_text(), re.M)
    assert versions == {pins["ray"]} == {in_image}


def test_image_has_every_package_and_no_checkpoint() -> None:
    """`.dockerignore` lets in what it names, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.partition(".")[0] for name in included} - {"k8s"}
    for name in [*packages, "LICENSE", "README.md", "pyproject.toml", "constraints.txt"]:
        assert f"!{name}" in lines
    dockerfile = (K8S / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)$", dockerfile, re.M)[-1] == "1000"


def test_ports_are_the_servers_own(served: Objects) -> None:
    """Ray Serve's port and ours, as `ringspan serve` has them on any machine."""
    ports = {p["name"]: p["port"] for p in _named(served, "Service")["spec"]["ports"]}
    server = Config().server
    assert ports == {"http": server.port, "grpc": server.grpc_port}
    config = serve_config(_named(served, "RayService"))
    assert config["http_options"]["port"] == server.port


def test_serve_application_builds_on_a_small_checkpoint(served: Objects, tmp_path: Path) -> None:
    """All of the RayService's arguments but the checkpoint and the device, as Ray Serve builds."""
    [application] = serve_config(_named(served, "RayService"))["applications"]
    model = write_llama_checkpoint(tmp_path / "llama")
    arguments = {**application["args"], "model": str(model), "device": "cpu"}
    config = application_config(application)

    deployment: Any = app(arguments)._bound_deployment

    assert deployment.ray_actor_options["resources"] == {"ringspan_front": 1}
    options = deployment._deployment_config
    assert options.max_ongoing_requests > config.server.max_requests
    assert options.graceful_shutdown_timeout_s > config.server.grace_s


def test_batch_job_reads_and_writes_what_is_mounted() -> None:
    """Its driver runs on the head, which is where --prompt-file and --output must be."""
    [job] = _read(K8S / "base/batch/rayjob.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert set(BATCH_FLAGS) <= _flags() & {*words}
    head = group_list(job)[0]
    for flag in ("--prompt-file", "--output"):
        path = words[words.index(flag) + 1]
        assert path.endswith(".jsonl")
        assert head.has_path(path)


def test_documentation_names_every_secret_and_claim() -> None:
    """Whoever applies an overlay makes them first."""
    text = (ROOT / "docs/kubernetes.md").read_text()
    content = "".join(
        path.read_text() for path in K8S.rglob("*.yaml") if path.parent.name != "crds"
    )
    named = set(re.findall(r"(?:secretName|claimName): ([\w-]+)", content))
    named |= set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", content))
    assert {"ringspan-api-keys", "ringspan-model", "ringspan-batch"} <= named
    for name in named:
        assert f"`{name}`" in text, f"docs/kubernetes.md does not tell of {name}"


def test_manifests_in_the_documentation_are_valid(kinds: CustomKinds) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        assert list(errors(read(block), kinds)) == []


def _set(path: str, value: object) -> Callable[[Objects], None]:
    """Return a change of the RayService; a number in the path is a list's index."""

    def change(objects: Objects) -> None:
        node: Any = _named(objects, "RayService")["spec"]["rayClusterConfig"]
        words = [word.replace("~", "/") for word in path.split("/")]
        *parts, last = [int(word) if word.isdigit() else word for word in words]
        for part in parts:
            node = node[part]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


def _serve(old: str, new: str) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        spec = _named(objects, "RayService")["spec"]
        assert old in spec["serveConfigV2"]
        spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)

    return change


def _of(kind: str, key: str, value: object) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        _named(objects, kind)["spec"][key] = value

    return change


GPU_POD = "workerGroupSpecs/1/template/spec"
GPU_CONTAINER = f"{GPU_POD}/containers/0"
BROKEN = {
    "a typo": (_set(f"{GPU_POD}/hostnetwork", True), "'hostnetwork' was unexpected"),
    "a wrong type": (_set("workerGroupSpecs/1/replicas", "2"), "is not of type 'integer'"),
    "no token": (_set("authOptions", None), "whoever reaches Ray's ports"),
    "an old Ray": (_set("rayVersion", "2.50.0"), "needs a rayVersion of 2.52"),
    "no volume": (_set(f"{GPU_POD}/volumes/0/name", "other"), "there is no such volume"),
    "too many replicas": (_set("workerGroupSpecs/1/replicas", 3), "replicas 3 is not within"),
    "resources twice": (
        _set("workerGroupSpecs/0/rayStartParams/num-cpus", "2"),
        "both in `resources` and in rayStartParams",
    ),
    "small shm": (
        _set(f"{GPU_POD}/volumes/1/emptyDir/sizeLimit", "200Gi"),
        "/dev/shm has 200 GiB, but kv_store.host_memory_bytes and object-store-memory are 257 GiB",
    ),
    "small pod": (
        _set(f"{GPU_CONTAINER}/resources/limits/memory", "280Gi"),
        "limits.memory is 280Gi, but shared memory and 8 ranks need 290 GiB",
    ),
    "Burstable": (_set(f"{GPU_CONTAINER}/resources/requests/cpu", "1"), "must be the same"),
    "fewer GPUs": (
        _set(f"{GPU_CONTAINER}/resources/limits/nvidia.com~gpu", "4"),
        "context_parallel_size is 16, but the groups have 8 GPUs",
    ),
    "root": (_set(f"{GPU_POD}/securityContext/runAsNonRoot", False), "runAsNonRoot is not true"),
    "privileges": (
        _set(f"{GPU_CONTAINER}/securityContext/allowPrivilegeEscalation", True),
        "allowPrivilegeEscalation is not false",
    ),
    "a token": (_set(f"{GPU_POD}/automountServiceAccountToken", True), "Kubernetes API"),
    "no front": (_set("workerGroupSpecs/0/resources", {"CPU": "2"}), "no group has the resources"),
    "another port": (_serve("grpc_port: 50051", "grpc_port: 50052"), "server.grpc_port is 50052"),
    "loopback": (
        _serve("    host: 0.0.0.0\n", "    host: 127.0.0.1\n"),
        "server.host is 127.0.0.1",
    ),
    "an unknown key": (_serve("device: cuda", "devise: cuda"), "did you mean device?"),
    "no arena": (_serve("host_memory_bytes: 274877906944", "{}"), "host_memory_bytes is not set"),
    "no keys": (_serve("api_key_file: /etc/ringspan/keys/api-keys", ""), "api_key_file is not set"),
    "keys elsewhere": (_serve("/etc/ringspan/keys", "/keys"), "group front mounts nothing"),
    "model elsewhere": (_serve("/models/model", "/data/model"), "group head mounts nothing"),
    "no builder": (_serve("cluster.serve:app", "cluster.serve:ap"), "names nothing to build from"),
    "no application": (_serve("import_path", "import_from"), "serveConfigV2"),
    "a Service of others": (
        _of("Service", "selector", {"app": "other"}),
        "Service ringspan selects",
    ),
    "a Service's typo": (_of("Service", "port", 8000), "Service ringspan: "),
    "a small budget": (
        _of("PodDisruptionBudget", "minAvailable", 1),
        "minAvailable is 1, and the ring needs all 4 pods",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, served: Objects, kinds: CustomKinds) -> None:
    change, told = BROKEN[name]
    objects = copy.deepcopy(served)
    change(objects)
    assert any(told in error for error in errors(objects, kinds)), list(errors(objects, kinds))


def test_keys_that_are_there_twice_are_refused() -> None:
    """The API server's strict decoding refuses them, and plain YAML takes the last."""
    with pytest.raises(ManifestError, match="key 'name' is there twice"):
        read("apiVersion: v1\nkind: Pod\nmetadata: {name: a, name: b}\n")


def test_quantities_are_read_as_kubernetes_has_them() -> None:
    assert [quantity(t) for t in ("512Gi", "1G", "1.5Ki", 7)] == [512 * 2**30, 10**9, 1536, 7]


def test_command_tells_files_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: ray.io/v1\nkind: RayCluster\nmetadata: {name: a}\nspec: {}\n")
    assert main([str(K8S / "base/common/networkpolicy.yaml"), str(wrong)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("networkpolicy.yaml: 3 objects, 0 errors")
    assert any("'headGroupSpec' is a required property" in line for line in told)
    assert main([str(tmp_path / "none.yaml")]) == 2
