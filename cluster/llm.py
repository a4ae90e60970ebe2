"""`LLM`: a model on a ring of ranks, as a Python object."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import ray

from actors.errors import ClusterError, UnknownRequest
from actors.messages import Progress, Request, RequestDelta, RequestOutput
from actors.trace import Trace
from cluster.backend import ClusterBackend
from cluster.launch import RunningCluster, read_config
from cluster.progress import PrefillBar
from cluster.prompt import Prompt, make_request
from configs import Config
from models.sampling import SamplingParams

POLL_S = 0.2  # how often a progress bar moves


class LLM:
    """Answers prompts from a checkpoint whose context is sharded over ranks.

    Use it as a context manager, or call `close`. It works from a plain script
    without a ``__main__`` guard, and any number of times in one process.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config_file: Path | None = None,
        overrides: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Bring the cluster up; returns when the model is loaded on every rank.

        Args:
            model: Directory of a Hugging Face checkpoint.
            config_file: YAML with keys of `configs.Config`.
            overrides: ``key=value`` strings, for nested keys too: ``ring.piece_bytes=1048576``.
            **options: Keys of `configs.Config`: ``context_parallel_size=2``.

        Raises:
            ConfigError: A key or a value that does not exist.
            CheckpointError: The checkpoint cannot be served.
            ClusterError: Ray cannot be reached, or the ranks cannot be placed.
        """
        self.config: Config = read_config(model, config_file, overrides, options)
        self._numbers = itertools.count()
        self._cluster = RunningCluster(self.config)
        self.info = self._cluster.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts together; the answers come in the prompts' order.

        Args:
            prompts: A text, ``{"prompt_token_ids": [...]}``, ``{"prompt": text}``,
                ``{"messages": [...]}``, or a list of these. A mapping may also have a
                ``cache_salt`` (the name of a tenant: KV of a prefix is shared among
                prompts of one tenant only), a ``priority`` (lower ones go first, 0), a
                ``deadline_s`` (from now; then the answer ends with what it has) and a
                ``request_id`` (for `cancel` and `progress`).
            sampling_params: What is asked of the answers; the defaults are vLLM's.
            use_tqdm: Show a bar with rate and time left while a prompt is prefilled.

        Raises:
            PromptError: A prompt is empty, too long or cannot be read.
            SamplingError: A sampling parameter is not for this model.
            QueueFull: Too many requests wait.
            ClusterError: A rank was lost or a step failed.
        """
        single = isinstance(prompts, str | Mapping)
        listed = cast(Sequence[Prompt], [prompts] if single else prompts)
        requests = [self._request(each, sampling_params or SamplingParams()) for each in listed]
        references = [self._cluster.submit("generate", request) for request in requests]
        if use_tqdm:
            self._show_progress(references)
        try:
            outputs: list[RequestOutput] = self._cluster.results(references)
        except BaseException:
            # Nobody will see the others' answers. An id that the caller gave may be that of
            # another request: the very reason why this one was refused.
            given = {each.get("request_id") for each in listed if isinstance(each, Mapping)}
            self._cancel_all([each for each in requests if each.request_id not in given])
            raise
        return outputs

    async def agenerate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer one prompt without blocking the event loop; raises as `generate`."""
        request = self._request(prompt, sampling_params or SamplingParams())
        reference = self._cluster.submit("generate", request)
        try:
            output: RequestOutput = await self._cluster.result_async(reference)
        except asyncio.CancelledError:
            with contextlib.suppress(ClusterError):
                self._cluster.submit("cancel", request.request_id)
            raise
        return output

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestDelta]:
        """Answer one prompt piece by piece, as its tokens come; raises as `generate`.

        Tokens of a burst of decode steps come together. Whoever stops to iterate
        cancels the request.
        """
        request = self._request(prompt, sampling_params or SamplingParams())
        references = self._cluster.submit("stream", request)
        ended = False
        try:
            for reference in references:
                yield self._cluster.result(reference)
            ended = True
        finally:
            if not ended:
                with contextlib.suppress(ClusterError):
                    self.cancel(request.request_id)

    async def astream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestDelta]:
        """Answer one prompt piece by piece without blocking the event loop; see `stream`."""
        request = self._request(prompt, sampling_params or SamplingParams())
        backend = ClusterBackend(self._cluster)
        try:
            async for delta in backend.stream(request):
                yield delta
        finally:
            await backend.close()

    def cancel(self, request_id: str) -> None:
        """End a request within the step that it is in; its call returns what it has.

        Raises:
            UnknownRequest: It has ended, or never was.
        """
        self._cluster.ask("cancel", request_id, timeout_s=30.0)

    def _cancel_all(self, requests: Sequence[Request]) -> None:
        """Cancel those of some requests that have not ended, as long as anybody listens."""
        with contextlib.suppress(ClusterError):
            for request in requests:
                with contextlib.suppress(UnknownRequest):
                    self.cancel(request.request_id)

    def progress(self, request_id: str | None = None) -> list[Progress]:
        """Return how far the prefill of a request has come, or of all that have no token yet.

        Raises:
            UnknownRequest: The request has ended, or never was.
        """
        told: list[Progress] = self._cluster.ask("progress", request_id, timeout_s=30.0)
        return told

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, put into the checkpoint's own chat template."""
        return self.generate({"messages": messages}, sampling_params, use_tqdm=use_tqdm)

    def status(self) -> dict[str, Any]:
        """Return what the cluster is and does."""
        status: dict[str, Any] = self._cluster.ask("status", timeout_s=30.0)
        return status

    def reset_prefix_cache(self) -> None:
        """Give up the KV of all answers that are complete: later prompts are computed anew."""
        self._cluster.ask("reset_prefix_cache", timeout_s=30.0)

    def kv_stats(self) -> dict[str, Any]:
        """Return counters and sizes of each host's KV store, by tier; None where one is lost.

        Raises:
            ClusterError: There is no KV store.
        """
        stats: dict[str, Any] = self._cluster.ask("ask_stores", "stats")
        return stats

    def kv_verify(self) -> dict[str, Any]:
        """Verify all that the KV stores hold, drop what is bad, and return the counts of each host.

        Raises:
            ClusterError: There is no KV store.
        """
        counts: dict[str, Any] = self._cluster.ask("ask_stores", "verify")
        return counts

    def kv_clear(self, cache_salt: str | None = None) -> dict[str, Any]:
        """Remove what the KV stores hold, on disk too, of one tenant or (None) of all.

        Returns how many pieces each host has removed from each tier. Prompts without a
        ``cache_salt`` are the tenant ``""``. What the device holds stays: see
        `reset_prefix_cache`.

        Raises:
            ClusterError: There is no KV store.
        """
        counts: dict[str, Any] = self._cluster.ask("ask_stores", "clear", cache_salt)
        return counts

    def start_trace(self) -> None:
        """Record what every rank does when, in the steps from now on.

        Raises:
            TraceError: A trace is being recorded already.
        """
        self._cluster.ask("start_trace")

    def stop_trace(self) -> Trace:
        """Record no more; return what was recorded: `Trace.write` it, or read `Trace.summary`.

        A lost rank ends the recording, but loses nothing of what was recorded before.

        Raises:
            TraceError: No trace is being recorded.
        """
        trace: Trace = self._cluster.ask("stop_trace")
        return trace

    def close(self) -> None:
        """End all processes of this cluster. Twice is no error."""
        self._cluster.close()

    def _request(self, prompt: Any, params: SamplingParams) -> Request:
        return make_request(f"request-{next(self._numbers)}", prompt, params)

    def _show_progress(self, references: list[Any]) -> None:
        """Show how prefills go on until all answers are there."""
        with PrefillBar() as bar:
            while len(ray.wait(references, num_returns=len(references), timeout=POLL_S)[1]):
                bar.show(self.progress())

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
