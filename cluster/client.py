"""`Client`: the calls of `LLM`, over gRPC."""

import asyncio
import contextlib
import json
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, cast

import grpc

from actors.errors import ClusterError, UnknownRequest
from actors.messages import Progress, RequestDelta, RequestOutput
from cluster.progress import PrefillBar
from cluster.prompt import Prompt, make_request
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import error_of
from cluster.rpc.limits import client_options
from cluster.rpc.resume import ResumableRequest
from cluster.rpc.wire import read_progress
from cluster.tls import ClientTls
from models.errors import RingspanError
from models.sampling import SamplingParams

SERVICE = "/ringspan.v1.Inference/"
ANSWER_S = 30.0  # for all but answers
POLL_S = 0.2  # how often a progress bar moves
MAX_PARALLEL = 64  # prompts of one `generate` that are under way at a time


class Client:
    """Asks a Ringspan server as `LLM` asks its own cluster, and raises the same errors.

    A stream that breaks is taken up at the token where it broke, on the same address:
    neither the server nor the caller has to do anything for it. Use it as a context
    manager, or call `close`. It may be used by several threads and event loops at once.
    """

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """Take the ``host:port`` of a server, and ``tls`` where it has a certificate.

        The first call connects.

        Raises:
            ClusterError: The key cannot be sent, or a file of ``tls`` cannot be read.
        """
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ClusterError("an API key must be of printable ASCII characters")
        self._target = target
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._credentials = None if tls is None else tls.grpc_credentials()
        self._channel = self._connect(grpc)
        # An asynchronous channel belongs to the event loop in which it was made.
        self._async_channels: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._is_closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts together; the answers come in the prompts' order. See `LLM.generate`.

        An output has the client's own times, and no steps.

        Raises:
            RingspanError: As `LLM.generate`; `Unauthenticated` and `ServerUnavailable` besides.
        """
        single = isinstance(prompts, str | Mapping)
        listed = cast(Sequence[Prompt], [prompts] if single else prompts)
        asked = [self._request(prompt, sampling_params) for prompt in listed]
        stop = threading.Event()
        with ThreadPoolExecutor(min(MAX_PARALLEL, max(1, len(asked)))) as threads:
            futures = [threads.submit(self._complete, request, stop) for request in asked]
            try:
                if use_tqdm:
                    self._show_progress(futures)
                return [future.result() for future in _first_failed_first(futures)]
            except BaseException:
                stop.set()  # nobody will see the others' answers
                threads.shutdown(wait=False, cancel_futures=True)
                # An id that the caller gave may be that of another request.
                given = {each.get("request_id") for each in listed if isinstance(each, Mapping)}
                self._cancel_all([each for each in asked if each.request.request_id not in given])
                raise

    async def agenerate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer one prompt without blocking the event loop; raises as `generate`."""
        request = self._request(prompt, sampling_params)
        async for _ in self._astream(request):
            pass
        return request.output()

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestDelta]:
        """Answer one prompt piece by piece, as its tokens come; raises as `generate`.

        Whoever stops to iterate cancels the request.
        """
        return self._stream(self._request(prompt, sampling_params))

    def astream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestDelta]:
        """Answer one prompt piece by piece without blocking the event loop; see `stream`."""
        return self._astream(self._request(prompt, sampling_params))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, put into the checkpoint's own chat template."""
        return self.generate({"messages": messages}, sampling_params, use_tqdm=use_tqdm)

    def cancel(self, request_id: str) -> None:
        """End a request of this API key; its call returns what it has.

        Raises:
            UnknownRequest: It has ended, or never was.
        """
        self._ask("Cancel", pb.CancelRequest(request_id=request_id), pb.CancelResponse)

    def progress(self, request_id: str | None = None) -> list[Progress]:
        """Return how far the prefill of a request has come, or of all that have no token yet.

        Only requests of this API key are told.

        Raises:
            UnknownRequest: The request has ended, or never was.
        """
        asked = pb.ProgressRequest(request_id=request_id or "")
        return [
            read_progress(each)
            for each in self._ask("Progress", asked, pb.ProgressResponse).requests
        ]

    def status(self) -> dict[str, Any]:
        """Return what the cluster is and does."""
        told = self._ask("Status", pb.StatusRequest(), pb.StatusResponse)
        status: dict[str, Any] = json.loads(told.json)
        return status

    async def aclose(self) -> None:
        """End the connection of this event loop; its next asynchronous call makes a new one."""
        channel = self._async_channels.pop(asyncio.get_running_loop(), None)
        if channel is not None:
            await channel.close()

    def close(self) -> None:
        """End the connection, and the calls on it. Twice is no error."""
        self._is_closed = True
        self._channel.close()
        self._async_channels.clear()

    def _request(self, prompt: Any, params: SamplingParams | None) -> ResumableRequest:
        self._check_open()
        request_id = f"request-{secrets.token_hex(8)}"
        request = make_request(request_id, prompt, params or SamplingParams())
        return ResumableRequest(request, self._target)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClusterError("this Client is closed: make a new one")

    def _cancel_all(self, asked: Sequence[ResumableRequest]) -> None:
        """Cancel those of some requests that have not ended, as long as anybody listens."""
        with contextlib.suppress(RingspanError):
            for each in asked:
                with contextlib.suppress(UnknownRequest):
                    self.cancel(each.request.request_id)

    def _complete(self, request: ResumableRequest, stop: threading.Event) -> RequestOutput:
        with contextlib.closing(self._stream(request)) as deltas:
            for _ in deltas:
                if stop.is_set():
                    raise ClusterError("another prompt of the same call has failed")
        return request.output()

    def _stream(self, request: ResumableRequest) -> Generator[RequestDelta, None, None]:
        generate = self._channel.stream_stream(f"{SERVICE}Generate", *_coders(pb.GenerateResponse))
        while not request.is_complete:
            self._check_open()
            call = generate(iter(request.messages()), metadata=self._metadata)
            error = None
            try:
                for response in call:
                    delta = request.take(response)
                    if delta is not None:
                        yield delta
            except grpc.RpcError as broken:
                error = broken
            finally:
                call.cancel()  # no effect on a call that has ended
            if not request.is_complete:
                time.sleep(request.pause_s(error))

    async def _astream(self, request: ResumableRequest) -> AsyncIterator[RequestDelta]:
        generate = self._async_channel().stream_stream(
            f"{SERVICE}Generate", *_coders(pb.GenerateResponse)
        )
        while not request.is_complete:
            self._check_open()
            call = generate(request.messages(), metadata=self._metadata)
            error = None
            try:
                async for response in call:
                    delta = request.take(response)
                    if delta is not None:
                        yield delta
            except grpc.RpcError as broken:
                error = broken
            finally:
                call.cancel()
            if not request.is_complete:
                await asyncio.sleep(request.pause_s(error))

    def _async_channel(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._async_channels:
            self._async_channels[loop] = self._connect(grpc.aio)
        return self._async_channels[loop]

    def _connect(self, kind: Any) -> Any:
        """Return a channel of ``grpc`` or ``grpc.aio``."""
        if self._credentials is None:
            return kind.insecure_channel(self._target, client_options())
        return kind.secure_channel(self._target, self._credentials, client_options())

    def _ask(self, method: str, message: Any, kind: Any) -> Any:
        self._check_open()
        call = self._channel.unary_unary(f"{SERVICE}{method}", *_coders(kind))
        try:
            return call(message, timeout=ANSWER_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._target) from None

    def _show_progress(self, futures: "Sequence[Future[RequestOutput]]") -> None:
        """Show how prefills go on until all answers are there."""
        with PrefillBar() as bar:
            while wait(futures, timeout=POLL_S).not_done:
                with contextlib.suppress(RingspanError):  # whoever waits for the answers is told
                    bar.show(self.progress())

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _coders(response: Any) -> tuple[Any, Any]:
    return (lambda message: message.SerializeToString()), response.FromString


def _first_failed_first(
    futures: "Sequence[Future[RequestOutput]]",
) -> "Sequence[Future[RequestOutput]]":
    """Wait until all are done, or one has failed, which is raised here."""
    done, _ = wait(futures, return_when="FIRST_EXCEPTION")
    for future in futures:
        if future in done and future.exception() is not None:
            future.result()
    return futures
