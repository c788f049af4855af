"""Bodies of requests: read, bounded so that no client can break the budget, and forgotten."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from starlette.requests import Request

from edgekit.server import ask
from edgekit.server.error import ApiError

BODY_SECONDS = 30.0  # a body must have come in
LEAST_BODY, BODY_BYTES_PER_TOKEN = 1 << 16, 8
BODIES_HELD = 4  # times the largest body there may be, all that wait together
# Libraries take 7 MiB, 64 connections with full buffers some 5, JSON some 30 times its bytes
BESIDES_BYTES, BESIDES_PER_BODY = 12 << 20, 32
T = TypeVar("T")


def body_bytes(context: int) -> int:
    """The most bytes that a request may have, by the tokens of the context."""
    return LEAST_BODY + BODY_BYTES_PER_TOKEN * context


def server_bytes(context: int) -> int:
    """What serving takes besides the model."""
    return BESIDES_BYTES + (BESIDES_PER_BODY + BODIES_HELD) * body_bytes(context)


class Bodies:
    """All bodies in memory.

    Attributes:
        most: Bytes of one; what the context can hold, generously.
        held: Bytes of all that came and are not answered.
    """

    def __init__(self, context: int) -> None:
        """For a context of so many tokens."""
        self.most, self.held = body_bytes(context), 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, parse: Callable[[ask.Body], T]) -> AsyncIterator[T]:
        """What ``parse`` makes of a request's JSON object; it counts as held in the block.

        Only as ``application/json``, which a web page may not send to another origin unasked.

        Raises:
            ApiError: It is no such object, too large, too slow, or too many are held.
        """
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the content type is {kind[:80]!a}, needs application/json")
        data = bytearray()
        try:
            await self._read_into(data, request)
            yield parse(ask.loads(bytes(data)))
        finally:
            self.held -= len(data)

    async def _read_into(self, data: bytearray, request: Request) -> None:
        try:
            await asyncio.wait_for(self._collect(data, request), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body did not come in {BODY_SECONDS:.0f} s") from error

    async def _collect(self, data: bytearray, request: Request) -> None:
        async for chunk in request.stream():
            data += chunk
            self.held += len(chunk)
            if len(data) > self.most:
                raise ApiError(413, f"the body has more than {self.most} bytes")
            if self.held > BODIES_HELD * self.most:
                raise ApiError(429, "too much is asked for at once; try again later")
