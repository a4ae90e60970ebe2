"""Bring a cluster up on Ray and take it down again."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, TaskCancelledError

from actors.cluster_info import ClusterInfo
from actors.errors import ClusterError, RayUnreachable
from actors.remote import create_coordinator
from configs import Config, load
from models.config import check_max_model_len, read_model_config
from models.errors import RingspanError

MiB = 2**20
PROBE_S = 5.0  # for a Ray head to accept a connection
STOP_S = 20.0  # for the coordinator to flush its KV stores and to end its ranks
# Ray carries plans and tokens only; its default would take 30 % of the memory.
OBJECT_STORE_BYTES = 256 * MiB


class RunningCluster:
    """A Ray connection and one coordinator with its ranks, until `close`."""

    def __init__(self, config: Config) -> None:
        """Connect to Ray (or start one) and bring the cluster up.

        Raises:
            RayUnreachable: No Ray cluster answers at the address given.
            RingspanError: What `actors.coordinator.Coordinator.start` raises.
        """
        self._owns_ray = connect_ray(config.ray.address)
        self._coordinator: Any = None
        try:
            self._coordinator = create_coordinator(config)
            waits = config.ray
            limit_s = waits.nodes_timeout_s + waits.placement_timeout_s + waits.start_timeout_s
            self.info: ClusterInfo = self.ask("start", timeout_s=limit_s)
        except BaseException:
            self.close()
            raise

    def submit(self, method: str, *args: Any) -> Any:
        """Start a call of the coordinator and return Ray's reference to its result."""
        if self._coordinator is None:
            raise ClusterError("this LLM is closed: make a new one")
        return getattr(self._coordinator, method).remote(*args)

    def result(self, reference: Any, timeout_s: float | None = None) -> Any:
        """Wait for a result; errors of ours arrive as themselves, without Ray's traceback.

        Raises:
            RingspanError: What the call raised.
            ClusterError: The coordinator died, or did not answer within ``timeout_s``.
        """
        with _own_errors():
            try:
                return ray.get(reference, timeout=timeout_s)
            except GetTimeoutError:
                raise ClusterError(
                    f"the coordinator gave no answer within {timeout_s:g} s"
                ) from None

    def results(self, references: Sequence[Any]) -> list[Any]:
        """Wait for several results, in their order, or for the first error; see `result`."""
        results: dict[Any, Any] = {}
        left = list(references)
        while left:
            done, left = ray.wait(left)
            results |= {reference: self.result(reference) for reference in done}
        return [results[reference] for reference in references]

    async def result_async(self, reference: Any) -> Any:
        """Wait for a result without blocking the event loop; see `result`."""
        with _own_errors():
            return await reference

    def ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the coordinator and wait for its result; see `result`."""
        return self.result(self.submit(method, *args), timeout_s)

    def close(self) -> None:
        """End the ranks, the coordinator, and Ray where it is our own. Twice is no error."""
        if self._coordinator is not None:
            coordinator, self._coordinator = self._coordinator, None
            # Where it is dead or hangs, its process ends now, and its ranks go with it.
            with contextlib.suppress(RayActorError, GetTimeoutError):
                ray.get(coordinator.stop.remote(), timeout=STOP_S)
            ray.kill(coordinator)
        if self._owns_ray:
            self._owns_ray = False
            disconnect_ray()

    def __enter__(self) -> "RunningCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Let errors of ours through as themselves, and name what else can go wrong in a call."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RingspanError):
            raise error.cause from None
        raise ClusterError(
            f"the coordinator failed with {type(error.cause).__name__}: {error.cause}"
        ) from error
    except RayActorError:
        raise ClusterError("the coordinator died: start the cluster again") from None
    except TaskCancelledError:
        raise ClusterError("the call was cancelled, with the task that made it") from None


def read_config(
    model: str | Path,
    config_file: Path | None,
    overrides: Sequence[str],
    options: Mapping[str, Any],
) -> Config:
    """Return a cluster's configuration, with its checkpoint looked at before any process starts.

    Raises:
        ConfigError: A key or a value that does not exist.
        CheckpointError: The checkpoint cannot be served.
    """
    values = {"model": str(Path(model).expanduser().resolve()), **options}
    config: Config = load(config_file, values, overrides)
    # Where the checkpoint lies on the cluster's machines only, the ranks say what is wrong.
    joins = config.ray.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()
    if Path(config.model).exists() or not joins:
        check_max_model_len(read_model_config(Path(config.model)), config.max_model_len)
    return config


def connect_ray(address: str | None) -> bool:
    """Connect this process to Ray; return whether the connection is ours to shut down."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "namespace": "ringspan",
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address in (None, "", "local"):
        _guard_local_ray()
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        with _own_sigterm():
            ray.init("local", **options)
        return True
    _probe(address)
    try:
        with _own_sigterm():
            ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RayUnreachable(
            f"cannot join the Ray cluster at {address}: {reason} (is it running, and does"
            " RAY_AUTH_MODE agree with it?)"
        ) from None
    return True


def disconnect_ray() -> None:
    """End the connection that `connect_ray` made, and the Ray that it started."""
    ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's way to end on SIGTERM: `ray.init` puts its own in its place."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous)


def _guard_local_ray() -> None:
    """Let nobody but this process and its children talk to the Ray started here.

    `ray.init` turns token mode on for a local cluster and, without a token, writes
    one into the home directory, where it changes every later `ray start`.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _probe(address: str) -> None:
    """Fail within seconds where nothing listens; Ray itself would retry for a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return  # "auto", or a scheme that Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise RayUnreachable(
            f"no Ray cluster at {address} ({error.strerror or error}): start one with `ray start"
            " --head`, or leave the address out to use a local one"
        ) from None
