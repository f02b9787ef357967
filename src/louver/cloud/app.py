"""The server as an ASGI application: Open Inference Protocol V2 over REST, with the binary tensor extension.

It owns neither the event loop nor the signals of its process, so that any ASGI server, or a replica of Ray Serve, can
hold it. What protects a connection (slow headers, too many of them) belongs to who holds it; see `server.py`.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.cloud.encoding import decode
from louver.cloud.json_text import LONG
from louver.cloud.protocol import Call, answer_call, model_metadata, read_call
from louver.cloud.refusals import Refusal, shown
from louver.cloud.repository import Repository, Served
from louver.cloud.service import GONE, Common, Request, Service
from louver.cloud.settings import Settings
from louver.cloud.traces import Traces
from louver.cloud.within import Within

__all__ = ["EXTENSIONS", "App", "create_app"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[["_Exchange"], Awaitable[None]]

EXTENSIONS = ("binary_tensor_data", "classification")
_INLINE_BYTES = 2**18
"""Bodies of up to this size, before and after, are decompressed on the event loop: a thread would cost more."""

_LONG_BYTES = 2**22
"""Tensors longer than this are looked through for NaN in a thread."""

_WATCH_AFTER_S = 0.005
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


@dataclass(slots=True, eq=False)
class _Exchange:
    """One HTTP request and the way to answer it."""

    service: Service
    scope: Scope
    receive: Receive
    send: Send
    headers: dict[bytes, bytes]
    parts: dict[str, str]

    def need_token(self) -> None:
        self.service.identify(self.headers.get(b"authorization"))

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """Sends an answer whole; a client that does not take it in time is left."""
        fields = [*headers, (b"content-length", b"%d" % len(body))]
        if self.service.is_draining:  # the client's next request then goes to whoever takes over
            fields.append((b"connection", b"close"))
        with Within(self.service.settings.limits.answer_s):
            await self.send({"type": "http.response.start", "status": status, "headers": fields})
            await self.send({"type": "http.response.body", "body": body})

    async def tell(self, content: object, status: int = 200) -> None:
        await self.answer(status, json.dumps(content).encode(), _JSON)

    async def refuse(self, refusal: Refusal) -> None:
        headers = [_JSON]
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(refusal.retry_after_s))))
        if refusal.status == 408:
            headers.append((b"connection", b"close"))
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.answer(refusal.status, json.dumps({"error": refusal.reason}).encode(), *headers)


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path, whose parts in braces reach the handler by name."""

    method: str
    path: str
    handler: Handler

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))


class App:
    """What `create_app` gives: an ASGI application, with the service that a gRPC server may share."""

    def __init__(self, service: Service, routes: Sequence[Route]) -> None:
        self.service = service
        self._routes = [(route.method, route.pattern.fullmatch, route.handler) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await _lifespan(self.service, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"expected http, got {scope['type']}")
        exchange = _Exchange(self.service, scope, receive, send, dict(scope["headers"]), {})
        try:
            handler, exchange.parts = self._route(scope["method"], scope["path"])
            await handler(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)

    def _route(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        allowed = []
        for its_method, match, handler in self._routes:
            found = match(path)
            if found is not None and its_method == method:
                return handler, found.groupdict()
            if found is not None:
                allowed.append(its_method)
        return _not_here(allowed), {}


def create_app(
    repository: Repository, settings: Settings, *, common: Common | None = None, traces: Traces | None = None
) -> App:
    """The ASGI application that serves what is in `repository`.

    common: clients and limits kept for several servers. traces: where spans of requests go, if anywhere.

    Raises:
        ConfigError: the file of tokens is not as it must be.
        StorageError: the budgets are damaged, or another server holds them.
    """
    routes = [
        Route("POST", "/v2/models/{model}/versions/{version}/infer", _infer),
        Route("POST", "/v2/models/{model}/infer", _infer),
        Route("GET", "/v2/health/live", _live),
        Route("GET", "/v2/health/ready", _ready),
        Route("GET", "/v2/models/{model}/ready", _model_ready),
        Route("GET", "/v2/models/{model}/versions/{version}/ready", _model_ready),
        Route("GET", "/v2/models/{model}", _model),
        Route("GET", "/v2/models/{model}/versions/{version}", _model),
        Route("GET", "/v2", _server),
    ]
    return App(Service(repository, settings, common=common, traces=traces), routes)


async def _lifespan(service: Service, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            service.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "lifespan.startup.complete"})


def _not_here(allowed: list[str]) -> Handler:
    async def handler(exchange: _Exchange) -> None:
        if not allowed:
            raise Refusal(404, f"no such address: {shown(exchange.scope['path'])}")
        body = json.dumps({"error": f"expected {' or '.join(allowed)}"}).encode()
        await exchange.answer(405, body, _JSON, (b"allow", ", ".join(allowed).encode()))

    return handler


# Health asks for no token: whoever balances load has none. It tells nothing that a token protects.


async def _live(exchange: _Exchange) -> None:
    await exchange.tell({"live": True})


async def _ready(exchange: _Exchange) -> None:
    is_ready = exchange.service.is_ready
    await exchange.tell({"ready": is_ready}, 200 if is_ready else 503)


async def _model_ready(exchange: _Exchange) -> None:
    try:
        exchange.service.repository.find(exchange.parts["model"], exchange.parts.get("version"))
    except Refusal as refusal:
        # Without the reason, which names what is served: that is for those who hold a token.
        raise Refusal(refusal.status, "no such model and version here") from refusal
    is_ready = exchange.service.is_ready
    await exchange.tell({"name": exchange.parts["model"], "ready": is_ready}, 200 if is_ready else 503)


async def _server(exchange: _Exchange) -> None:
    exchange.need_token()
    await exchange.tell({"name": "louver", "version": version_of("louver"), "extensions": list(EXTENSIONS)})


async def _model(exchange: _Exchange) -> None:
    exchange.need_token()
    repository, name = exchange.service.repository, exchange.parts["model"]
    served = repository.find(name, exchange.parts.get("version"))
    versions = [one.model.version for one in repository.current if one.model.name == name]
    await exchange.tell(model_metadata(served.model, versions))


# Scores


async def _infer(exchange: _Exchange) -> None:
    service = exchange.service
    request = service.begun("rest")
    if service.traces is not None:
        request.traceparent = exchange.headers.get(b"traceparent")
    try:
        await _infer_as(exchange, request)
    except Refusal as refusal:
        request.status = refusal.status
        raise
    except (_Gone, TimeoutError):
        request.status = GONE
    finally:
        service.ended(request)


async def _infer_as(exchange: _Exchange, request: Request) -> None:
    service, parts, headers = exchange.service, exchange.parts, exchange.headers
    await service.admit(request, headers.get(b"authorization"))
    request.served = served = service.repository.find(parts["model"], parts.get("version"))
    head = _length(headers, b"inference-header-content-length")
    content = await _read_body(exchange, request)
    body = await _decoded(service, content, headers.get(b"content-encoding", b"").decode("latin-1"))
    if body is not content:
        service.hold(request, len(body))
    call = await _call(service, served, body, head)
    scores = service.checked(await _unless_gone(exchange, await service.submit(request, call, content)))
    work = partial(answer_call, served.model, call, scores)
    head, answer = await service.aside.do(work) if call.classes else work()
    if head is None:
        await exchange.answer(200, answer, _JSON)
    else:
        await exchange.answer(200, answer, _BINARY, (b"inference-header-content-length", b"%d" % head))


async def _decoded(service: Service, content: bytes, encoding: str) -> bytes:
    """The body without its compression, in a thread if what comes out is long: what came says nothing about that."""
    limit = service.settings.limits.decoded_bytes
    if not encoding:
        return decode(content, encoding, limit)
    if len(content) <= _INLINE_BYTES:
        try:
            return decode(content, encoding, min(limit, _INLINE_BYTES))
        except Refusal as refusal:
            if refusal.status != 413 or limit <= _INLINE_BYTES:
                raise
    return await service.aside.do(partial(decode, content, encoding, limit))


async def _call(service: Service, served: Served, body: bytes, head: int | None) -> Call:
    """The call in a body, read in a thread if its JSON or its tensor is long."""
    read = partial(read_call, body, head, served.model, service.settings.limits, service.rest_heads)
    if len(body) <= LONG or (head is not None and head <= LONG and len(body) <= _LONG_BYTES):
        return read()
    return await service.aside.do(read)


class _Gone(Exception):  # noqa: N818 - no error: clients may leave
    """The client has left; there is nobody to answer."""


async def _read_body(exchange: _Exchange, request: Request) -> bytes:
    """The body as received; refused as soon as it is known to be too long."""
    service = exchange.service
    limits = service.settings.limits
    told = _length(exchange.headers, b"content-length")
    if told is not None and told > limits.body_bytes:
        raise _too_large(limits.body_bytes)
    chunks: list[bytes] = []
    try:
        with Within(limits.body_s):
            more = True
            while more:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                more = message.get("more_body", False)
                if chunk := message.get("body", b""):
                    request.n_bytes += len(chunk)
                    if request.n_bytes > limits.body_bytes:
                        raise _too_large(limits.body_bytes)
                    service.hold(request, len(chunk))
                    chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError as error:
        raise Refusal(408, f"the body took more than {limits.body_s:g} s") from error


async def _unless_gone(exchange: _Exchange, waiting: asyncio.Future[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What `waiting` gives; it is cancelled when the client leaves, so that nothing is computed for nobody."""
    if waiting.done():
        return waiting.result()
    loop = asyncio.get_running_loop()
    watchers: list[asyncio.Task[None]] = []
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await exchange.receive())["type"] != "http.disconnect":
            pass
        gone = True
        waiting.cancel()

    # Most answers are there before this: they do not pay for a task that waits beside them.
    timer = loop.call_later(_WATCH_AFTER_S, lambda: watchers.append(loop.create_task(watch())))
    try:
        return await waiting
    except asyncio.CancelledError:
        if gone:
            raise _Gone from None
        raise
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()


def _length(headers: Mapping[bytes, bytes], name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise Refusal(400, f"expected {name.decode()} to be a number of bytes")
    return int(value)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"expected a body of at most {most} bytes; compress it, or send fewer images in a request")
