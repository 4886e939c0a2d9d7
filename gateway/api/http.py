"""The gateway's HTTP listener.

Started by ``server`` beside the gRPC server, on the same event loop. Must not know what the application does.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from farshore.errors import StartupError
from farshore.gateway.api.listening import listening_socket

HEAD_S = 30.0
"""For a connection to send the head of its next call."""

KEEP_ALIVE_S = 20
"""How long a connection may idle between two calls."""

BACKLOG = 512


class _Protocol(H11Protocol):
    """uvicorn's protocol, with a deadline for the head of each call: uvicorn has none."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.close)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the gateway has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpListener:
    """Serves from :meth:`start` until :meth:`stop`. ``address``: HOST:PORT."""

    def __init__(self, application: ASGIApp, *, listen: str, most_connections: int) -> None:
        """``listen``: HOST:PORT, port 0 for any free one. ``most_connections``: with idle ones; uvicorn
        answers calls on further ones with a bare 503. Raises PortInUse, or InvalidRequest, if it can't be
        listened on."""
        self._socket = listening_socket(listen, backlog=BACKLOG)
        self.address = f"{listen.rpartition(':')[0]}:{self._socket.getsockname()[1]}"
        options: dict[str, Any] = {
            "http": _Protocol,
            "ws": "none",
            "loop": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "limit_concurrency": most_connections,
        }
        self._server = _Server(uvicorn.Config(application, **options))
        self.serving: asyncio.Task[None] | None = None
        """Made by :meth:`start`. Ends before :meth:`stop` only if HTTP can't be served any more."""

    async def start(self) -> None:
        """Raises StartupError if HTTP can't be served."""
        self.serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="HTTP")
        while not self._server.started and not self.serving.done():
            await asyncio.sleep(0)
        if not self._server.started:
            self._socket.close()
            raise StartupError("HTTP can't be served") from self.serving.exception()

    async def stop(self, deadline_s: float) -> None:
        """Closes the listener, waits for open calls for ``deadline_s``, and cuts the rest."""
        if self.serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        closing = self.serving
        if closing.done():  # It failed, and so has left the connections open.
            closing = asyncio.create_task(self._server.shutdown([self._socket]))
        _, late = await asyncio.wait({closing}, timeout=deadline_s)
        if late:
            self._server.force_exit = True
            await asyncio.wait({closing}, timeout=deadline_s)
