"""The same servers under Ray Serve, for RayService and ``serve run cluster.serve:app``.

One replica starts the cluster of actors, and has both servers: Ray Serve's proxies bring it what
comes over HTTP, and gRPC is served on a port of its own beside it.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from actors.errors import ClusterError
from cluster.api_keys import read_api_keys
from cluster.backend import ClusterBackend
from cluster.http.app import build_app
from cluster.http.settings import Settings
from cluster.launch import RunningCluster, read_config
from cluster.metered import MeteredBackend
from cluster.serving import TOLD_S, drain, rpc_server
from cluster.tls import ServerTls
from configs import Config, ConfigError

STOP_S = 30.0  # for ranks and stores to end, behind the requests
HEALTH_S = 10.0  # how often Ray Serve asks the replica whether it lives
# Ray Serve queues what is over its own limit without a word; ours refuses with 429 before that.
SERVE_ROOM = 100


def application(arguments: Mapping[str, Any]) -> Application:
    """Return the application that serves one model.

    ``arguments`` are keys of `configs.Config`, nested as in YAML or with dots, ``config`` (a YAML
    file of such keys, on the replica's machine) and ``ray_actor_options`` of the replica (as
    Ray Serve has them; it computes nothing, so the default claims no CPU).

    Raises:
        ConfigError: A key or a value that does not exist, or no model.
    """
    given = dict(arguments)
    actor_options = given.pop("ray_actor_options", {"num_cpus": 0})
    if not given.get("model"):
        raise ConfigError("cluster.serve:app needs the argument model: a checkpoint's directory")
    model, file = given.pop("model"), given.pop("config", None)
    overrides = [f"{key}={value}" for key, value in given.items() if "." in key]
    values = {key: value for key, value in given.items() if "." not in key}
    config = read_config(model, file, overrides, values)
    # Here and not in the replica: what makes no sense is refused where the application is built.
    server = config.server

    def build() -> FastAPI:
        return _start(config)

    deployment = serve.deployment(
        name="ringspan",
        num_replicas=1,
        max_ongoing_requests=server.max_requests + SERVE_ROOM,
        graceful_shutdown_timeout_s=server.grace_s + TOLD_S + STOP_S,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=3 * HEALTH_S,
        ray_actor_options=actor_options,
    )
    return deployment(serve.ingress(build)(_Replica)).bind()


class _Replica:
    """What Ray Serve asks beside requests; the app is made by `_start`, in this process."""

    app: FastAPI  # of Ray Serve's wrapper

    async def check_health(self) -> None:
        """Have Ray Serve replace this replica, and with it the cluster, where a rank is lost."""
        failure = (await self.app.state.backend.status()).get("failure")
        if failure is not None:
            raise ClusterError(f"the cluster has failed: {failure}")


def _start(config: Config) -> FastAPI:
    """Bring the cluster up, and return the app; its lifespan has the rest, and ends it all."""
    settings = Settings.of(config, read_api_keys([], config.server.api_key_file))
    tls = ServerTls.of(config.server)
    cluster = RunningCluster(config)
    backend = MeteredBackend(ClusterBackend(cluster), settings.names[0])
    app = build_app(backend, settings)
    app.state.backend = backend

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        rpc = rpc_server(settings, backend, tls)
        await rpc.start()
        try:
            yield
        finally:
            await drain(app.state.gate, rpc, settings.grace_s)
            app.state.gate.close()
            await app.state.gate.drain(TOLD_S)
            await backend.close()
            cluster.close()

    app.router.lifespan_context = lifespan
    return app
