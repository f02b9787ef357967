"""Requests and servers for the tests of the cloud half: in process, and as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from bundles import FEATURE
from louver.bundle import CLOUD, Bundle
from louver.cloud.tokens import Client

PATIENCE_S = 60.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]

    @property
    def scores(self) -> np.ndarray:
        """Of a binary answer, whose JSON is checked against its bytes."""
        head = int(self.headers["inference-header-content-length"])
        (output,) = json.loads(self.body[:head])["outputs"]
        assert (output["name"], output["datatype"]) == ("scores", "FP32")
        assert output["parameters"]["binary_data_size"] == len(self.body) - head
        return np.frombuffer(self.body[head:], "<f4").reshape(output["shape"])


def features(rows: int, *, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype is np.uint8:
        return rng.integers(0, 256, (rows, *FEATURE), np.uint8)
    return rng.normal(size=(rows, *FEATURE)).astype(dtype)


def truth(bundle: Bundle, feature: np.ndarray) -> np.ndarray:
    """One image after the other, by onnxruntime alone."""
    session = onnxruntime.InferenceSession(bundle.path(CLOUD))
    return np.concatenate([session.run(["scores"], {"feature": one[None]})[0] for one in feature])


def head_of(feature: np.ndarray, *, call_id: str | None = None, **changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "feature",
        "shape": list(feature.shape),
        "datatype": "UINT8" if feature.dtype == np.uint8 else "FP32",
        "parameters": {"binary_data_size": feature.nbytes},
    }
    known = {"inputs": [{**tensor, **changes}], "outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}
    return known if call_id is None else {"id": call_id, **known}


def binary(head: Any, tensor: bytes) -> tuple[bytes, dict[str, str]]:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return text + tensor, {
        "inference-header-content-length": str(len(text)),
        "content-type": "application/octet-stream",
    }


def asking(feature: np.ndarray, *, call_id: str | None = None) -> tuple[bytes, dict[str, str]]:
    return binary(head_of(feature, call_id=call_id), feature.tobytes())


def infer_path(bundle: Bundle) -> str:
    return f"/v2/models/{bundle.name}/versions/{bundle.id}/infer"


async def ask(
    app: Any,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    method: str | None = None,
    token: str | None = None,
    chunk: int | None = None,
) -> Answer:
    """One request to an ASGI application, its body in pieces of `chunk` bytes."""
    import asyncio

    size = chunk or max(1, len(body))
    pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    fields = dict(headers or {})
    if token is not None:
        fields["authorization"] = f"Bearer {token}"
    scope = {
        "type": "http",
        "method": method or ("POST" if path.endswith("/infer") else "GET"),
        "path": path,
        "headers": [(key.lower().encode(), value.encode()) for key, value in fields.items()],
    }
    await asyncio.wait_for(app(scope, receive, send), PATIENCE_S)
    start, end = sent
    assert not end.get("more_body")
    return Answer(start["status"], {key.decode(): value.decode() for key, value in start["headers"]}, end["body"])


def message_of(content: bytes) -> Callable[[Client], Awaitable[bytes]]:
    """How a handler of gRPC reads this message."""

    async def read(client: Client) -> bytes:
        return content

    return read


class Running:
    """A `louver serve` process and what it said of itself."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        self.told = json.loads(line)
        self.host, _, port = self.told["rest"].partition("://")[2].rpartition(":")
        self.port = int(port)

    def connect(self, tls: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
        if tls is not None:
            return http.client.HTTPSConnection(self.host, self.port, timeout=PATIENCE_S, context=tls)
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)

    def ask(
        self,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        token: str | None = None,
        method: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Answer:
        connection = self.connect(tls)
        fields = dict(headers or {})
        if token is not None:
            fields["authorization"] = f"Bearer {token}"
        try:
            connection.request(method or ("POST" if path.endswith("/infer") else "GET"), path, body or None, fields)
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one kind."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if line["event"] == event]

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running(log: Path, *paths: Path | str, options: tuple[str, ...] = ()) -> Iterator[Running]:
    """A server on free ports of 127.0.0.1; killed if it does not end by itself."""
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "louver", "serve", *map(str, paths), *ports, "--threads", "1", "--json", *options]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "COLUMNS": "200"}
        )
    try:
        server = Running(process, log)
        yield server
        server.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
