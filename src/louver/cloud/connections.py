"""What protects a connection of the REST server beside its requests: slow heads, long heads, too many of anything.

uvicorn has no limit for these, so its protocol is extended here. A sweep once a second looks at each connection; a
timer for each would cost every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["GuardedProtocol", "sweep"]

MOST_HEAD_BYTES = 2**15
_MOST_WAITING = 64
_BESIDE_FIELD = 32
"""Bytes counted with each field, as HTTP/2 does (RFC 9113, section 6.5.2): a short one takes more in memory."""

_LONG = b"the head of the request is too long"
_MANY = b"too many requests before their answers were read"
_LATER = b"retry-after: 1\r\n"
_PLAIN = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n%s"


class _Whole:
    """A transport that sends the head of an answer together with what follows it.

    uvicorn writes them apart, which is two system calls, and wakes the client for a head that it can do nothing with.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a transport has
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Keeps a head, sends anything else at once; `flush` sends a head that nothing followed."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Sends what was kept."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Sends what was kept, and closes."""
        self.flush()
        self._transport.close()


class _Flow(FlowControl):
    """Reads no further while requests wait for those before them, whoever asks for more."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class GuardedProtocol(HttpToolsProtocol):
    """A connection that knows since when it owes the head of a request, and since when it is to be closed.

    Of what a client sends, no more is kept than a body (which the application counts), `MOST_HEAD_BYTES` of each head,
    `_MOST_WAITING` requests that came before they were asked for, and one piece as the network gives it.
    """

    most_connections = 1024
    """Set by the server on a subclass of its own."""

    waits_since: float | None = None
    closing_since: float | None = None
    unread_since: float | None = None
    """Since when the client takes no more of its answers."""

    head_bytes = 0
    """Of a request all but its body: the head, and what may follow a body in pieces."""

    _is_in_head = False
    _is_further = False
    """Whether the piece at hand ended a field or brought a part of a body."""

    _refusal: tuple[bytes, bytes, bytes] | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - uvicorn narrows it as well
        """Refuses the connection if there are too many."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self._whole = _Whole(transport)
        self.transport = cast("asyncio.Transport", self._whole)
        self.waits_since = self.loop.time()
        if len(self.connections) > self.most_connections:
            self._close_with(b"503 Service Unavailable", b"too many connections", _LATER)

    def on_message_begin(self) -> None:
        """A head begins."""
        self.waits_since = self.loop.time()
        self.head_bytes = 0
        self._is_in_head = self._is_further = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Counts what was asked for."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts a field. One behind the body is for nobody, and uvicorn would keep them all."""
        self._count(len(name) + len(value) + _BESIDE_FIELD)
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self.waits_since = None
        self._is_in_head = False
        self._is_further = True
        super().on_headers_complete()
        if len(self.pipeline) > _MOST_WAITING:
            raise ValueError(_MANY)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._is_further = True
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a field, or to the frame of a body, that does not end."""
        if self.closing_since is not None or self._refusal is not None:
            return
        self._is_further = False
        super().data_received(data)
        if not self._is_further and self._refusal is None:
            self.head_bytes += len(data)
            if self.head_bytes > MOST_HEAD_BYTES:
                self._refuse()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self.unread_since = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """The answer is written; what is no request is answered when it is its turn."""
        self._whole.flush()
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._refusal is not None and not self.transport.is_closing():
            self._close_with(*self._refusal)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        self._refuse()

    def _count(self, n_bytes: int) -> None:
        self._is_further = True
        self.head_bytes += n_bytes
        if self.head_bytes > MOST_HEAD_BYTES:
            raise ValueError(_LONG)

    def _refuse(self) -> None:
        """Has the rest of the connection refused, once those before it are answered."""
        if self.head_bytes > MOST_HEAD_BYTES:
            self._refusal = b"431 Request Header Fields Too Large", _LONG, b""
        elif len(self.pipeline) > _MOST_WAITING:
            self._refusal = b"429 Too Many Requests", _MANY, _LATER
        else:
            self._refusal = b"400 Bad Request", b"this is no HTTP request", b""
        self.flow.pause_reading()
        is_cut_short = self.cycle is not None and not self._is_in_head and self.cycle.more_body
        if self.pipeline:
            if is_cut_short:
                self.pipeline.popleft()
        elif is_cut_short or self.cycle is None or self.cycle.response_complete:
            self._close_with(*self._refusal)

    def _close_with(self, status: bytes, reason: bytes, headers: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = b'{"error": "%s"}' % reason
            self.transport.write(_PLAIN % (status, len(body), headers, body))
        self.closing_since = self.loop.time()
        self.transport.close()


def sweep(connections: set[Any], *, head_s: float, idle_s: float, answer_s: float) -> None:
    """Ends connections that owe a head for longer than `head_s`, and those whose answers are not taken."""
    now = asyncio.get_running_loop().time()
    for one in list(connections):
        if one.transport.is_closing():
            one.closing_since = one.closing_since or now
            if now - one.closing_since > answer_s:
                one.transport.abort()  # closing waits for the client to read, which it may never do
        elif one.unread_since is not None and now - one.unread_since > answer_s:
            one.transport.abort()  # whoever answers waits as long: uvicorn, too, for an answer of its own
        elif one.waits_since is not None:
            if now - one.waits_since > head_s:
                one.transport.abort()
        elif one.cycle is None or one.cycle.response_complete:
            # Between requests: uvicorn's own timer ends an idle connection, but any byte stops that timer.
            one.waits_since = now + idle_s
