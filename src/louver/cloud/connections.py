"""What protects a connection of the REST server before there is a request: slow heads, long heads, too many of them.

uvicorn has no limit for these, so its protocol is extended here. A sweep once a second looks at each connection; a
timer for each would cost every request.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["GuardedProtocol", "sweep"]

MOST_HEAD_BYTES = 2**15
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


class GuardedProtocol(HttpToolsProtocol):
    """A connection that knows since when it owes the head of a request, and since when it is to be closed."""

    most_connections = 1024
    """Set by the server on a subclass of its own."""

    waits_since: float | None = None
    closing_since: float | None = None
    head_bytes = 0

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - uvicorn narrows it as well
        """Refuses the connection if there are too many."""
        super().connection_made(transport)
        self._whole = _Whole(transport)
        self.transport = cast("asyncio.Transport", self._whole)
        self.waits_since = self.loop.time()
        if len(self.connections) > self.most_connections:
            self._close_with(b"503 Service Unavailable", b"too many connections", b"retry-after: 1\r\n")

    def on_message_begin(self) -> None:
        """A head begins."""
        self.waits_since = self.loop.time()
        self.head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self.waits_since = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Counts the bytes of a head that does not end."""
        if self.closing_since is not None:
            return
        super().data_received(data)
        if self.waits_since is not None:
            self.head_bytes += len(data)
            if self.head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
                self._close_with(b"431 Request Header Fields Too Large", b"the head of the request is too long")

    def on_response_complete(self) -> None:
        """The answer is written."""
        self._whole.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        self._close_with(b"400 Bad Request", b"this is no HTTP request")

    def _close_with(self, status: bytes, reason: bytes, headers: bytes = b"") -> None:
        body = b'{"error": "%s"}' % reason
        self.transport.write(_PLAIN % (status, len(body), headers, body))
        self.closing_since = self.loop.time()
        self.transport.close()


def sweep(connections: set[Any], *, head_s: float, idle_s: float, answer_s: float) -> None:
    """Ends connections that owe a head for longer than `head_s`, and those whose last answer is not taken."""
    now = asyncio.get_running_loop().time()
    for one in list(connections):
        if one.transport.is_closing():
            one.closing_since = one.closing_since or now
            if now - one.closing_since > answer_s:
                one.transport.abort()  # closing waits for the client to read, which it may never do
        elif one.waits_since is not None:
            if now - one.waits_since > head_s:
                one.transport.abort()
        elif one.cycle is None or one.cycle.response_complete:
            # Between requests: uvicorn's own timer ends an idle connection, but any byte stops that timer.
            one.waits_since = now + idle_s
