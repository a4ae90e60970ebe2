"""``ringspan doctor``: run all checks, say what is wrong and what to do about it."""

import argparse
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.arguments import add_cluster_flags, cluster_options
from cluster.doctor import checkpoint, devices, links, machine, ray_cluster, software
from cluster.doctor.finding import Finding, MiB, ok, problem, warning
from cluster.doctor.probes import ProbeFailed, probe

IMPORT_S = 120.0  # for torch, on a busy machine
RAY_S = 240.0  # with an actor and measurements on every host
CHECK_S = 300.0  # for any one check
HTTP_PORT, GRPC_PORT = 8000, 50051
RAY_BYTES = 256 * MiB  # `cluster.launch.OBJECT_STORE_BYTES`, of a Ray of our own

Check = Callable[[], "Finding | Iterable[Finding]"]


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = commands.add_parser(
        "doctor", help="what is wrong with this machine, installation or checkpoint"
    )
    what = "a checkpoint to be looked at too"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=what)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is found; return 1 where there is a problem, else 0."""
    # MODEL may be left out, so the first key=value may stand in its place.
    if options.model is not None and "=" in options.model and not Path(options.model).exists():
        options.overrides = [options.model, *options.overrides]
        options.model = None
    found = []
    for finding in Doctor(options).findings():
        found.append(finding)
        if not options.json:
            print(finding.text(), flush=True)
    problems = sum(finding.state == "problem" for finding in found)
    warnings = sum(finding.state == "warning" for finding in found)
    if options.json:
        told = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"findings": told, "problems": problems, "warnings": warnings}))
    else:
        print(f"{problems} problems, {warnings} warnings")
    return 1 if problems else 0


class Doctor:
    """All checks of one configuration; what needs torch or Ray is asked of other processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take what the command line says."""
        self._options = options
        self._model: Path | None = None
        if options.model is not None:
            self._model = Path(options.model).expanduser().resolve()

    def findings(self) -> Iterator[Finding]:
        """Yield what each check finds, as it is found."""
        for name, check in self.checks():
            yield from bounded(name, check)

    def checks(self) -> Iterator[tuple[str, Check]]:
        """Yield the checks, what others build on first."""
        yield "python", software.check_python
        yield "packages", software.check_packages
        yield "own packages", software.check_shadows
        yield "configuration", self._check_config
        yield "torch", self._check_torch
        yield "shared memory", self._check_shared_memory
        yield "limits", lambda: machine.check_limits(self._store_bytes if self._gpus else 0)
        yield "ports", self._check_ports
        yield "files", self._check_files
        is_joined = bool(self._address)
        yield "network", lambda: machine.check_interfaces(os.environ, is_joined=is_joined)
        if self._torch_version is not None:
            yield "ring", lambda: links.check_ring(len(self._gpus))
        yield "ray", self._check_ray
        if self._model is not None:
            yield "model", self._check_model

    @functools.cached_property
    def _config(self) -> Any:
        """The configuration, None where it cannot be read: then defaults are looked at."""
        with_config = self._load()
        return with_config if not isinstance(with_config, Finding) else None

    def _load(self) -> Any:
        try:
            from configs import Config, ConfigError, load
        except ImportError as error:
            return problem("configuration", f"it cannot be read: {error}", "see the packages above")
        given = cluster_options(self._options)
        file, overrides = given.pop("config_file"), given.pop("overrides")
        try:
            config: Config = load(file, given, overrides)
        except ConfigError as error:
            return problem("configuration", str(error), "see configs/schema.py for all keys")
        return config

    def _key(self, path: str, default: Any) -> Any:
        """Return a key's value, or a default where there is no such key or no configuration."""
        value = self._config
        for name in path.split("."):
            value = getattr(value, name, None)
        return default if value is None else value

    def _check_config(self) -> Finding:
        found = self._load()
        return found if isinstance(found, Finding) else ok("configuration", "all keys are known")

    @functools.cached_property
    def _torch(self) -> dict[str, Any]:
        return probe("torch", limit_s=IMPORT_S)

    @property
    def _gpus(self) -> list[dict[str, Any]]:
        try:
            return list(self._torch["devices"])
        except ProbeFailed:
            return []

    def _check_torch(self) -> list[Finding]:
        try:
            facts = self._torch
        except ProbeFailed as error:
            return [problem("torch", f"it cannot be imported: {error}", devices.INSTALL)]
        has_driver = devices.DRIVER.exists()
        device = self._key("device", "auto")
        return devices.judge_torch(facts, has_driver=has_driver, device=device)

    @property
    def _store_bytes(self) -> int:
        """As `actors.kv.stores.store_bytes`, which needs Ray, says."""
        asked = self._key("kv_store.host_memory_bytes", None)
        if asked is not None:
            return int(asked)
        if not self._gpus and self._key("kv_store.disk_directory", None) is None:
            return 0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4

    def _check_shared_memory(self) -> Finding:
        ray_bytes = 0 if self._address else RAY_BYTES
        return machine.check_shared_memory(self._store_bytes, ray_bytes)

    def _check_ports(self) -> Iterator[Finding]:
        host = self._key("server.host", "127.0.0.1")
        for key, default in (("port", HTTP_PORT), ("grpc_port", GRPC_PORT)):
            port = self._key(f"server.{key}", default)
            if port:
                yield machine.check_port(host, port, f"--{key.replace('_', '-')}")

    def _check_files(self) -> Iterator[Finding]:
        cache = os.environ.get("XDG_CACHE_HOME")
        own = (Path(cache) if cache else Path.home() / ".cache") / "ringspan"
        secret = self._key("kv_store.secret_file", None)
        yield machine.check_secret(Path(secret or own / "kv-secret").expanduser(), is_needed=False)
        for key in ("server.api_key_file", "server.ssl_keyfile", "kv_store.ssl_keyfile"):
            path = self._key(key, None)
            if path is not None:
                yield machine.check_secret(Path(path).expanduser(), is_needed=True, what=key)
        profiles = Path(self._key("profile.directory", None) or own).expanduser()
        yield machine.check_profiles(profiles, self._torch_version)
        disk = self._key("kv_store.disk_directory", None)
        if disk is not None:
            yield from machine.check_disk(Path(disk), self._key("kv_store.disk_bytes", 0))

    @property
    def _torch_version(self) -> str | None:
        try:
            return str(self._torch["version"])
        except ProbeFailed:
            return None

    @property
    def _address(self) -> str:
        """The Ray cluster to be joined, "" for one of our own."""
        address = str(self._key("ray.address", None) or os.environ.get("RAY_ADDRESS") or "")
        return "" if address == "local" else address

    @property
    def _num_ranks(self) -> int:
        return int(self._key("context_parallel_size", 1))

    def _check_ray(self) -> list[Finding]:
        address = self._address
        try:
            facts = probe("ray", address, str(self._num_ranks), limit_s=RAY_S)
        except ProbeFailed as error:
            what = f"the Ray cluster at {address} cannot be used" if address else "no Ray starts"
            advice = "is it running, do RAY_AUTH_MODE and the token agree, and its ports reachable?"
            if not address:
                advice = "see the packages above, and the logs in /tmp/ray (or RAY_TMPDIR)"
            return [problem("ray", f"{what}: {error}", advice)]
        device = self._key("device", "auto")
        return ray_cluster.judge_ray(facts, device=device, environment=os.environ)

    def _check_model(self) -> list[Finding]:
        words = [str(self._model), self._key("dtype", "auto"), self._key("kv_cache_dtype", "auto")]
        try:
            longest = str(self._key("max_model_len", 0))
            facts = probe("checkpoint", *words, longest, limit_s=IMPORT_S)
        except ProbeFailed as error:
            return [problem("model", f"it cannot be looked at: {error}", "see what is wrong above")]
        found = checkpoint.judge_checkpoint(facts)
        if "config" in facts["errors"]:
            return found
        memory = checkpoint.judge_memory(
            facts,
            self._gpus,
            num_ranks=self._num_ranks,
            device=self._key("device", "auto"),
            gpu_memory_utilization=self._key("gpu_memory_utilization", 0.9),
            is_local=not self._address,
        )
        return [*found, memory]


def bounded(name: str, check: Check, limit_s: float = CHECK_S) -> list[Finding]:
    """Return what a check finds; one that fails or hangs is a finding too."""
    found: list[Finding] = []
    failed: list[BaseException] = []

    def look() -> None:
        try:
            told = check()
            found.extend([told] if isinstance(told, Finding) else told)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        sentence = f"this check has not ended after {limit_s:g} s"
        return [*found, problem(name, sentence, "is a disk or a network file system stuck?")]
    for error in failed:
        sentence = f"this check failed with {type(error).__name__}: {error}"
        found.append(warning(name, sentence, "please report it"))
    return found
