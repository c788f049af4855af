"""Run the application on a socket until the process is told to end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from edgekit.errors import EdgekitError

MAX_CONNECTIONS = 64
MAX_HEADERS = 1 << 14  # bytes
KEEP_ALIVE_SECONDS = 30


def bind(host: str, port: int) -> socket.socket:
    """A socket on ``host``, not listening yet; ``port`` 0 takes one that is free.

    Raises:
        EdgekitError: The address cannot be had.
    """
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise EdgekitError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another "
            "--port or --host"
        ) from error
    return found


def url_of(bound: socket.socket) -> str:
    """``http://host:port`` of the socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Ends at once at the second signal, whichever it is.

    Uvicorn's own ``force_exit`` does not: from Python 3.12 on it waits for open connections first.
    """

    async def until_told(self, bound: socket.socket, is_ready: Callable[[], None]) -> None:
        """Serve until a signal comes."""
        self._loop = asyncio.get_running_loop()
        self._serving = self._loop.create_task(self.serve([bound]))
        while not self.started and not self._serving.done():
            await asyncio.sleep(0.01)
        if not self._serving.done():
            is_ready()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            logging.getLogger("uvicorn.error").disabled = True  # of requests it breaks off
            self._loop.call_soon_threadsafe(self._serving.cancel)
        super().handle_exit(sig, frame)


def listen(app: Starlette, bound: socket.socket, is_ready: Callable[[], None]) -> None:
    """Answer until a signal comes; then finish what was asked and return.

    After INT or TERM nothing new is taken; a second one ends at once.

    Args:
        app: The application.
        bound: Where to listen.
        is_ready: Called when it listens.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    for name in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it is done
        signal.signal(name, lambda number, frame: None)
    asyncio.run(_Server(config).until_told(bound, is_ready))
