"""Runs a server until it is told to stop: opens the socket, starts the worker, and ends every stream properly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from fiddler.errors import ResourceError, quoted
from fiddler.serving.http.app import application
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.service import Service
from fiddler.telemetry.totals import Totals

__all__ = ["open_socket", "run"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fiddler.engine import Engine

_CONNECTIONS = 1024  # more get 503
_BACKLOG = 1024
_LAST = 2.0  # for connections to read their last events [s]


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one. Raises ResourceError where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter for what can be no name of a machine
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no name of a machine"
        raise ResourceError(f"--host {quoted(host)}: {reason}; give an address of this machine") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another --port or --host"
        ) from None
    return listener


def run(
    engine: Engine,
    options: ServerOptions,
    totals: Totals,
    listener: socket.socket,
    ready: Callable[[], None],
    report: Callable[[BaseException], None],
) -> int:
    """Serve on `listener` until SIGINT or SIGTERM, and return the signal's number.

    totals: the recorder that the engine was loaded with. ready: called when requests are answered. report: receives
    errors that are no request's, from any thread. Requests that are open then have `grace` seconds to end; each stream
    that has not ended gets an error as its last event.
    """
    config = uvicorn.Config(
        application(options),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL + 1,  # `report` has what there is to say
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(options.grace + _LAST)),
    )
    server = _Server(config, engine, options, totals, ready, report)
    asyncio.run(server.serve(sockets=[listener]))
    return server.signal


class _Server(uvicorn.Server):
    """A server that has its own idea of the end."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        options: ServerOptions,
        totals: Totals,
        ready: Callable[[], None],
        report: Callable[[BaseException], None],
    ) -> None:
        super().__init__(config)
        self.signal = 0
        self._engine, self._options, self._totals = engine, options, totals
        self._ready, self._report = ready, report
        self._service: Service | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the worker, then answer requests (uvicorn's hook)."""
        self._service = Service(self._engine, self._options, self._totals, self._report)
        application = self.config.app
        application.state.service = self._service  # type: ignore[union-attr]
        self._service.worker.start()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open requests end, then end them (uvicorn's hook)."""
        assert self._service is not None
        self._service.refuse()
        closing = asyncio.ensure_future(self._close(self._service))
        await super().shutdown(sockets)
        await closing

    async def _close(self, service: Service) -> None:
        end = asyncio.get_running_loop().time() + self._options.grace
        while service.busy and not self.force_exit and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        await service.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM, and do not raise them again at the end (uvicorn's hook)."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends requests with grace, another one at once (uvicorn's hook)."""
        self.force_exit = self.should_exit
        self.should_exit, self.signal = True, sig
