"""A small cloud for the tests of the edge: it speaks the wire, remembers what it was sent, and misbehaves when told.

It decodes with other code than the edge encodes with, and never repairs what it is sent: what is off is answered 400.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import onnxruntime
import zstandard

from louver.bundle import CLOUD, Bundle

LENGTH = "Inference-Header-Content-Length"


@dataclass
class Seen:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    port: int

    @property
    def content(self) -> bytes:
        """The body decoded by what its header says, padding and all."""
        encoding = self.headers.get("content-encoding", "identity")
        if encoding == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(self.body), read_across_frames=True) as reader:
                return reader.read()
        return gzip.decompress(self.body) if encoding == "gzip" else self.body

    @property
    def header(self) -> dict[str, Any]:
        return json.loads(self.content[: int(self.headers[LENGTH.lower()])])

    @property
    def id(self) -> str:
        return self.header["id"]

    @property
    def feature(self) -> np.ndarray:
        (one,) = self.header["inputs"]
        raw = self.content[int(self.headers[LENGTH.lower()]) :]
        assert len(raw) == one["parameters"]["binary_data_size"]
        return np.frombuffer(raw, {"UINT8": np.uint8, "FP32": np.float32}[one["datatype"]]).reshape(one["shape"])


Behavior = Callable[["Handler", Seen], None]


class Cloud:
    """A server of one bundle on loopback: `script` says what it does with the next requests, `always` with the rest."""

    def __init__(self, bundle: Bundle, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.bundle = bundle
        self.session = onnxruntime.InferenceSession(bundle.path(CLOUD))
        self.seen: list[Seen] = []
        self.script: deque[Behavior] = deque()
        self.always: Behavior = answer
        self.n_connections = 0
        self.server = Server(("127.0.0.1", port), Handler)
        self.server.cloud = self
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if tls else "http"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def scores(self, feature: np.ndarray) -> np.ndarray:
        return self.session.run(["scores"], {"feature": feature})[0]


class Server(ThreadingHTTPServer):
    cloud: Cloud
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):  # a client that hangs up or breaks TLS is what tests provoke
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20

    def setup(self) -> None:
        super().setup()
        self.server.cloud.n_connections += 1

    def do_POST(self) -> None:
        cloud = self.server.cloud
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(path=self.path, headers=headers, body=body, port=self.client_address[1])
        cloud.seen.append(seen)
        (cloud.script.popleft() if cloud.script else cloud.always)(self, seen)

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """An answer in one write, so that a test sees no half of it by chance."""
        self.log_request(status)
        lines = [f"HTTP/1.1 {status} -", *(f"{k}: {v}" for k, v in (headers or {}).items())]
        if "Content-Length" not in (headers or {}):
            lines.append(f"Content-Length: {len(content)}")
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


def answer_of(cloud: Cloud, seen: Seen, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """A right answer, or one with parts of it replaced: scores, shape, datatype, size, id, version, outputs."""
    scores = changes.get("scores", cloud.scores(seen.feature))
    raw = np.ascontiguousarray(scores, np.float32).tobytes()
    output = {
        "name": changes.get("name", "scores"),
        "shape": changes.get("shape", list(scores.shape)),
        "datatype": changes.get("datatype", "FP32"),
        "parameters": {"binary_data_size": changes.get("size", len(raw))},
    }
    header = {
        "model_name": cloud.bundle.name,
        "model_version": changes.get("version", cloud.bundle.id),
        "id": changes.get("id", seen.id),
        "outputs": changes.get("outputs", [output]),
    }
    text = json.dumps(header).encode()
    return text + raw, {"Content-Type": "application/octet-stream", LENGTH: str(len(text))}


def answer(handler: Handler, seen: Seen) -> None:
    handler.reply(200, *answer_of(handler.server.cloud, seen))


def changed(**changes: Any) -> Behavior:
    return lambda handler, seen: handler.reply(200, *answer_of(handler.server.cloud, seen, **changes))


def status(code: int, reason: str = "told to", headers: dict[str, str] | None = None) -> Behavior:
    return lambda handler, seen: handler.reply(code, json.dumps({"error": reason}).encode(), headers)


def raw(content: bytes, headers: dict[str, str] | None = None) -> Behavior:
    return lambda handler, seen: handler.reply(200, content, headers)


def silent(seconds: float) -> Behavior:
    """Takes the request and says nothing for a while; then hangs up."""

    def wait(handler: Handler, seen: Seen) -> None:
        threading.Event().wait(seconds)
        handler.close_connection = True

    return wait


def slow(seconds: float) -> Behavior:
    def wait(handler: Handler, seen: Seen) -> None:
        threading.Event().wait(seconds)
        answer(handler, seen)

    return wait


def reset_after(n_bytes: int) -> Behavior:
    """Sends the first bytes of a right answer and resets the connection."""

    def cut(handler: Handler, seen: Seen) -> None:
        content, headers = answer_of(handler.server.cloud, seen)
        lines = ["HTTP/1.1 200 -", *(f"{k}: {v}" for k, v in headers.items()), f"Content-Length: {len(content)}"]
        whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + content
        handler.wfile.write(whole[: min(n_bytes, len(whole) - 1)])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return cut


class Tap:
    """A proxy on loopback that keeps every byte that a client sends through it."""

    def __init__(self, port: int) -> None:
        self.sent = bytearray()
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, sink, keep in ((client, server, self.sent), (server, client, bytearray())):
                thread = threading.Thread(target=_pump, args=(source, sink, keep), daemon=True)
                self._threads.append(thread)
                thread.start()


def _pump(source: socket.socket, sink: socket.socket, keep: bytearray) -> None:
    with source, contextlib.suppress(OSError):
        while piece := source.recv(2**16):
            keep += piece
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)  # a connection that breaks on one side breaks on the other
