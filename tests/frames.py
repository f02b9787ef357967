"""HTTP/2 by hand, for tests of clients that misbehave: a library would do what it should."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from servers import Running

DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def head(path: str) -> bytes:
    def field(name: str, value: str) -> bytes:
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    return b"".join(field(*one) for one in {**fields, "content-type": "application/grpc"}.items())


@contextmanager
def connected(server: Running, *, window: int = 65_535) -> Iterator[socket.socket]:
    """A connection on which each answer is given `window` bytes, and no more."""
    host, _, port = server.told["grpc"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as one:
        settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window))
        one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(SETTINGS, 1, 0))
        yield one
