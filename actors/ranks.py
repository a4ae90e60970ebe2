"""All ranks as the coordinator sees them: one call goes to all, and a lost rank ends it.

A step is collective: if one rank fails, the others are out of step, and the
ring cannot be used again. So the first failure is kept and every later call
raises it.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.errors import ClusterError, RankLost, StepFailed
from actors.placement import Place
from configs import RingConfig
from models.errors import RingspanError

# Heartbeats and progress are answered on threads of their own while a step computes.
CONTROL = "control"
DIAGNOSIS_S = 5.0  # to find which rank it was that died


class RankFailed(Exception):
    """A rank's call raised; why is not known yet."""

    def __init__(self, rank: int, cause: BaseException) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank = rank
        self.cause = cause


class Ranks:
    """Handles of the worker actors, in order of rank. Lives in the coordinator's event loop."""

    def __init__(self, workers: Sequence[Any], places: Sequence[Place], config: RingConfig) -> None:
        """Take handles; call `watch` once the ranks answer."""
        self._workers = list(workers)
        self._places = list(places)
        self._config = config
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None
        self._seen_s = [time.monotonic()] * len(self._workers)  # each rank's last sign of life

    @property
    def failure(self) -> ClusterError | None:
        """What ended this ring, or None."""
        if not self._failure.done():
            return None
        error = self._failure.exception()
        assert isinstance(error, ClusterError)
        return error

    async def call(
        self, method: str, *args: Any, timeout_s: float | None, **kwargs: Any
    ) -> list[Any]:
        """Call a method on every rank; return the results in order of rank.

        Raises:
            RankLost: A rank died, or was silent for too long.
            StepFailed: A rank raised what is none of our own errors, or the time is over.
            RingspanError: One of our own errors that a rank raised.
        """
        if self.failure is not None:
            raise self.failure
        calls = asyncio.gather(
            *(
                self._outcome(rank, getattr(worker, method).remote(*args, **kwargs))
                for rank, worker in enumerate(self._workers)
            )
        )
        ends: set[asyncio.Future[Any]] = {calls, self._failure}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        try:
            if self.failure is not None:
                raise self.failure
            if not calls.done():
                raise StepFailed(f"{method} did not end on all ranks within {timeout_s:g} s")
            return list(calls.result())
        except RankFailed as failed:
            self._fail(await self._diagnose(method, failed))
            raise self._failure.exception() from None  # type: ignore[misc]
        except ClusterError as error:
            self._fail(error)
            raise
        finally:
            calls.cancel()

    async def ask(self, rank: int, method: str) -> Any:
        """Call a method of one rank on its control threads, beside the step that it computes."""
        worker = self._workers[rank]
        ref = getattr(worker, method).options(concurrency_group=CONTROL).remote()
        return await self._outcome(rank, ref)

    def heartbeat_ages_s(self) -> list[float]:
        """Return how long ago each rank gave a sign of life."""
        now_s = time.monotonic()
        return [now_s - seen_s for seen_s in self._seen_s]

    def watch(self) -> None:
        """Start to ask every rank for a heartbeat."""
        self._watcher = asyncio.create_task(self._watch())

    def kill(self) -> None:
        """End the ranks' processes."""
        if self._watcher is not None:
            self._watcher.cancel()
        for worker in self._workers:
            ray.kill(worker)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            lost = await self._first_lost(self._config.heartbeat_timeout_s)
            if lost is not None:
                self._fail(lost)
                return

    async def _first_lost(self, timeout_s: float) -> RankLost | None:
        pings = [self._ping(rank, timeout_s) for rank in range(len(self._workers))]
        return next((lost for lost in await asyncio.gather(*pings) if lost is not None), None)

    async def _ping(self, rank: int, timeout_s: float) -> RankLost | None:
        try:
            await asyncio.wait_for(self.ask(rank, "ping"), timeout_s)
        except RankLost as lost:
            return lost
        except TimeoutError:
            return self._lost(rank, f"gave no sign of life for {timeout_s:g} s")
        self._seen_s[rank] = time.monotonic()
        return None

    async def _outcome(self, rank: int, ref: Awaitable[Any]) -> Any:
        try:
            return await ref
        except RayActorError:
            raise self._lost(rank, "died") from None
        except RayTaskError as error:
            if isinstance(error.cause, RingspanError):
                raise error.cause from None
            raise RankFailed(rank, error.cause) from None

    async def _diagnose(self, method: str, failed: RankFailed) -> ClusterError:
        """A peer's death shows as a broken connection on the others first: name the dead one."""
        for _ in range(3):
            lost = await self._first_lost(DIAGNOSIS_S)
            if lost is not None:
                return lost
            await asyncio.sleep(0.5)
        reason = str(failed.cause).strip().splitlines()[:1] or [type(failed.cause).__name__]
        return StepFailed(f"{method} failed on rank {failed.rank}: {reason[0]}")

    def _lost(self, rank: int, how: str) -> RankLost:
        return RankLost(
            f"rank {rank} on host {self._places[rank].host} {how}; the contexts it held are gone:"
            " start the cluster again"
        )

    def _fail(self, error: ClusterError) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # mark it as seen
            self.kill()
