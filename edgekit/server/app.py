"""The application: routes, what is checked before, and streams that end with their client."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgekit.devices.memory import auto_budget, held_bytes
from edgekit.errors import DoesNotFitError, EdgekitError, UsageError
from edgekit.server import ask as asks
from edgekit.server import metrics
from edgekit.server.access import Access
from edgekit.server.answer import Form, event
from edgekit.server.ask import Ask, Body
from edgekit.server.bodies import Bodies
from edgekit.server.error import ApiError
from edgekit.server.worker import Done, Event, Job, Worker
from edgekit.sizes import parse_size

T = TypeVar("T")


def make_app(worker: Worker, access: Access) -> Starlette:
    """The application over a worker that runs."""
    served = _Served(worker, access)
    routes = [
        Route("/health", served.health),
        Route("/metrics", served.metrics),
        Route("/budget", served.budget, methods=["GET", "POST"]),
        Route("/v1/models", served.models),
        Route("/v1/models/{name:path}", served.model),
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/v1/completions", served.text, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _refused,
            HTTPException: _no_route,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
    )


class _Served:
    def __init__(self, worker: Worker, access: Access) -> None:
        self._worker, self._access = worker, access
        self._name = worker.session.artifact.manifest.name
        self._one_change = asyncio.Lock()
        self._bodies = Bodies(worker.session.plan.context)

    async def health(self, request: Request) -> Response:
        """Whether a depth is loaded."""
        self._check_host(request)
        if self._worker.session.is_given_up:
            return JSONResponse({"status": "memory is short: no depth is loaded"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self._check_host(request)
        return PlainTextResponse(metrics.render(self._worker), media_type=metrics.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._check_api(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """It, by its name."""
        self._check_api(request)
        name = request.path_params["name"]
        if name != self._name:
            raise ApiError(404, f"no model {name[:80]!a}; there is {self._name!a}")
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._completion(request, asks.chat)

    async def text(self, request: Request) -> Response:
        """A text, continued."""
        return await self._completion(request, asks.text)

    async def budget(self, request: Request) -> Response:
        """What is loaded; after a ``POST``, within another budget."""
        self._check_host(request)
        self._access.check_budget(request.headers.get("Authorization", ""))
        if request.method == "POST":
            async with self._bodies.read(request, _budget_of) as n_bytes, self._one_change:
                await self._resize(n_bytes)
        return JSONResponse(self._loaded())

    async def _resize(self, n_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[EdgekitError | None] = loop.create_future()

        def told(error: EdgekitError | None) -> None:
            _later(loop, done.set_result, error)

        self._worker.session.request(n_bytes, told)
        self._worker.wake()
        error = await asyncio.shield(done)
        if isinstance(error, DoesNotFitError):
            raise ApiError(422, f"the old depth stays: {error}", param="budget")
        if error is not None:
            raise ApiError(500, f"the old depth stays: {error}")

    async def _completion(self, request: Request, read: Callable[[Body], Ask]) -> Response:
        self._check_api(request)
        async with self._bodies.read(request, read) as ask:
            answer, form = _Answer(self._worker, ask), Form.of(ask, self._name)
            try:
                first = await _unless_gone(request, answer.next())
                if ask.stream and not isinstance(first, ApiError):
                    return _Stream(answer, form, first)
                return await self._whole(request, answer, form, first)
            except BaseException:
                answer.abandon()
                raise

    async def _whole(
        self, request: Request, answer: "_Answer", form: Form, first: Event
    ) -> Response:
        text, done = await _unless_gone(request, answer.rest(first))
        return JSONResponse(form.whole(text, done.stopped, done.timings))

    def _check_host(self, request: Request) -> None:
        self._access.check_host(request.headers.get("Host", ""))

    def _check_api(self, request: Request) -> None:
        self._check_host(request)
        self._access.check_api(request.headers.get("Authorization", ""))

    def _model(self) -> Body:
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "edgekit"}

    def _loaded(self) -> Body:
        plan = self._worker.session.plan
        return {
            "budget_bytes": plan.budget_bytes,
            "total_bytes": plan.total_bytes,
            "weights_bytes": plan.depths.weights_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "expected_kl": plan.expected_kl,
            "context": plan.context,
            "kv_type": plan.kv_type,
            "resident_bytes": held_bytes(),
        }


class _Answer:
    """The events of one job, awaited in the loop's thread.

    It holds little however slowly its client reads: what is unread is one text, and the request is
    the worker's alone.
    """

    def __init__(self, worker: Worker, ask: Ask) -> None:
        loop = asyncio.get_running_loop()
        self._worker, self._is_gone = worker, threading.Event()
        self._unread, self._has_more = deque[Event](), asyncio.Event()
        worker.submit(Job(ask, lambda found: _later(loop, self._take, found), self._is_gone))

    def _take(self, found: Event) -> None:
        last = self._unread[-1] if self._unread else None
        if isinstance(found, str) and isinstance(last, str):
            self._unread[-1] = last + found
        else:
            self._unread.append(found)
        self._has_more.set()

    async def next(self) -> Event:
        """The text that came since the last one, or what ends the answer."""
        while not self._unread:
            self._has_more.clear()
            await self._has_more.wait()
        return self._unread.popleft()

    async def rest(self, first: Event) -> tuple[str, Done]:
        """All of the text and the end; errors are raised."""
        pieces, found = list[str](), first
        while isinstance(found, str):
            pieces.append(found)
            found = await self.next()
        if isinstance(found, ApiError):
            raise found
        return "".join(pieces), found

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._is_gone.set()
        self._worker.forget_gone()


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], value: T) -> None:
    """Call in the loop's thread, unless the loop has ended: the server was told to end at once."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, value)


class _Stream(StreamingResponse):
    """Server-sent events; when the client goes away, the job ends."""

    def __init__(self, answer: _Answer, form: Form, first: Event) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        events = _events(answer, form, first)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.abandon()


async def _events(answer: _Answer, form: Form, first: Event) -> AsyncIterator[str]:
    for line in form.first():
        yield line
    found = first
    while isinstance(found, str):
        yield form.piece(found)
        found = await answer.next()
    if isinstance(found, ApiError):  # too late for a status
        yield event(found.body)
        return
    for line in form.last(found.stopped, found.timings):
        yield line


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, or raise `ClientDisconnect` when the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _budget_of(body: Body) -> int:
    """Bytes, a size such as ``900MiB``, or ``auto``."""
    value = body.get("budget")
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62:
        return value
    if value == "auto":
        return auto_budget().n_bytes
    try:
        return parse_size(value if isinstance(value, str) else "")
    except UsageError as error:
        message = f"'budget' is {value!a:.60}, needs bytes, a size such as '900MiB', or 'auto'"
        raise ApiError(400, message, param="budget") from error


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body, error.status, headers.get(error.status))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]!a}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(request: Request, error: Exception) -> Response:
    message = f"{type(error).__name__}: {error}; this is a bug, please report it"
    return JSONResponse(ApiError(500, message).body, 500)
