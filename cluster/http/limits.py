"""The front door of the API: who may come in, how much they may bring, and how many at once.

All of it is asked before a body is read, and again while it comes in.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_keys import ApiKeys
from cluster.http.errors import REQUEST_ID, ApiError, as_api_error

# What tells no prompt and no answer: probes and dashboards have no key.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/openapi.json"})
CANCEL_PATHS = "/v1/cancel/"  # holds nothing, and must work where all places are taken
REQUEST_ID_HEADER = b"x-request-id"
MOST_ID_BYTES = 128


def _is_request_id(value: bytes) -> bool:
    return 0 < len(value) <= MOST_ID_BYTES and all(0x21 <= byte <= 0x7E for byte in value)


class Gate:
    """Counts prompts under way; lets nobody in where they are too many or the server ends."""

    def __init__(self, max_requests: int, retry_after_s: int) -> None:
        """Open."""
        self.retry_after_s = retry_after_s
        self.is_draining = False
        self._max_requests = max_requests
        self._count = 0
        self._listeners: set[Callable[[ApiError], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, requests: int = 1) -> Iterator[None]:
        """Let some prompts in, until the context ends.

        Raises:
            ApiError: 503 while the server ends, 429 where too many are under way.
        """
        if self.is_draining:
            raise self._ending()
        if self._count + requests > self._max_requests:
            raise ApiError(
                429,
                f"{self._count} prompts are under way of at most {self._max_requests}: try again"
                " later",
                code="too_many_requests",
                retry_after_s=self.retry_after_s,
            )
        self._count += requests
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= requests
            if not self._count:
                self._idle.set()

    @contextlib.contextmanager
    def listen(self, tell: Callable[[ApiError], None]) -> Iterator[None]:
        """Call ``tell`` where the server ends before the context does."""
        self._listeners.add(tell)
        try:
            yield
        finally:
            self._listeners.discard(tell)

    async def drain(self, grace_s: float) -> bool:
        """Let nobody in, and wait for those inside; return whether they have all ended."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        return self._idle.is_set()

    def close(self) -> None:
        """Tell all who are still inside that they will get no more."""
        for tell in list(self._listeners):
            tell(self._ending())

    def _ending(self) -> ApiError:
        return ApiError(
            503,
            "the server is shutting down: try again later",
            code="shutting_down",
            retry_after_s=self.retry_after_s,
        )


class FrontDoor:
    """ASGI middleware around the whole app; the tenant's salt is left in ``request.state``.

    Every answer has the X-Request-Id that its request had, or one of ours.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        gate: Gate,
        keys: ApiKeys,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        """Wrap an app."""
        self._app = app
        self._gate = gate
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; whatever goes wrong inside is told as 503."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID_HEADER)
        is_right = given is not None and _is_request_id(given)
        request_id = given if given is not None and is_right else secrets.token_hex(8).encode()
        REQUEST_ID.set(request_id.decode("ascii"))

        async def note(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                told = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id)]
                message = {**message, "headers": told}
            await send(message)

        try:
            if given is not None and not is_right:
                raise ApiError(
                    400,
                    f"X-Request-Id must be 1 to {MOST_ID_BYTES} printable ASCII characters without"
                    " spaces",
                    code="invalid_header",
                )
            await self._pass(scope, headers, receive, note)
        except Exception as error:  # a client never sees a stack
            told = as_api_error(error, self._gate.retry_after_s)
            if not begun:
                await told.response()(scope, receive, note)

    async def _pass(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        with contextlib.ExitStack() as stack:
            if scope["path"] not in OPEN_PATHS:
                salt = self._keys.tenant(headers.get(b"authorization"))
                scope.setdefault("state", {})["salt"] = salt
                if scope["method"] != "GET" and not scope["path"].startswith(CANCEL_PATHS):
                    stack.enter_context(self._gate.admit())
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or len(length) > 18:
                raise ApiError(400, "Content-Length must be a number", code="invalid_header")
            if int(length) > self._max_body_bytes:
                raise self._too_large()
            await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """Return ``receive`` with a body that ends with an error where it is too large or late."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._body_timeout_s
        read_bytes = 0
        complete = False

        async def read() -> Message:
            nonlocal read_bytes, complete
            if complete:
                return await receive()  # the news that the client has gone
            try:
                async with asyncio.timeout_at(end_s):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self._body_timeout_s:g} s",
                    code="body_timeout",
                ) from None
            read_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return read

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self._max_body_bytes} bytes, which is the most that is read",
            code="body_too_large",
        )
