"""Connections whose answers meet a deadline from their first byte on.

A socket's timeout is for one read, so a server that sends a byte now and then could hold a thread for days with nothing
but the head of an answer, which the standard library reads in one go. Here every read looks at the clock first.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

__all__ = ["pool_of", "set_deadline"]

_mine = threading.local()


def set_deadline(deadline: float) -> None:
    """Answers that this thread awaits from now on end at `deadline`, by the monotonic clock."""
    _mine.deadline = deadline


class _UntilDeadline(io.RawIOBase):
    def __init__(self, inner: io.RawIOBase, deadline: float) -> None:
        self._inner, self._deadline = inner, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:  # noqa: ANN401 - whatever a buffered reader hands in
        if time.monotonic() > self._deadline:
            raise TimeoutError("the deadline passed while reading")
        count: int | None = self._inner.readinto(buffer)
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - as its base
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_UntilDeadline(self.fp.detach(), _mine.deadline))


class _Plain(HTTPConnection):
    response_class = _Response


class _Secure(HTTPSConnection):
    response_class = _Response


def pool_of(host: str, port: int, n_kept: int, context: ssl.SSLContext | None) -> urllib3.HTTPConnectionPool:
    """Connections to one server, of which `n_kept` stay open; over TLS if there is a context."""
    pool: urllib3.HTTPConnectionPool
    if context is None:
        pool = urllib3.HTTPConnectionPool(host, port, maxsize=n_kept)
        pool.ConnectionCls = _Plain
    else:
        pool = urllib3.HTTPSConnectionPool(host, port, maxsize=n_kept, ssl_context=context)
        pool.ConnectionCls = _Secure
    return pool
