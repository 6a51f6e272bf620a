"""How long a request may take to arrive: clients that are slow on purpose would hold connections for ever."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

HEADER_SECONDS = 15.0
"""From a connection, or the first byte of a further request, to the end of its headers."""
BODY_SECONDS = 30.0
"""How long a body may take, and for each `BYTES_A_SECOND` of it a second more."""
BYTES_A_SECOND = 4_000
"""A tenth of what a bad telephone line gives; 50 MB may take three and a half hours."""


class TimedProtocol(H11Protocol):
    """HTTP whose request line and headers must come in time; uvicorn itself only limits idle connections.

    Source: CWE-400; the attack is known as Slowloris.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; those of a further request on the same connection have their own time."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # A cycle is a request with all of its headers, and is over when it is answered.
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._end)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Deadlines:
    """Answers a request with status 408 when its body does not come in time; pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with a `receive` that ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, send)
        await self._app(scope, body.receive, body.send)


class _Body:
    """The body of one request, as it comes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._began_at = time.monotonic()
        self._bytes = 0
        self._is_whole = False
        self._is_refused = False

    async def receive(self) -> Message:
        """The next piece; the end of the connection when it does not come in time."""
        if self._is_whole:
            return await self._receive()
        ends_at = self._began_at + BODY_SECONDS + self._bytes / BYTES_A_SECOND
        try:
            message = await asyncio.wait_for(self._receive(), ends_at - time.monotonic())
        except asyncio.TimeoutError:
            return await self._refuse()
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Answer, unless that was done."""
        if not self._is_refused:
            await self._send(message)

    async def _refuse(self) -> Message:
        logger.warning("A request to %s is too slow: %d bytes came.", self._scope["path"], self._bytes)
        self._is_whole = self._is_refused = True
        headers: dict[str, Any] = {"Connection": "close"}
        refusal = JSONResponse({"detail": "The request came too slowly."}, 408, headers)
        await refusal(self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}
