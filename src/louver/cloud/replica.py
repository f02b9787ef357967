"""One replica: the ASGI application of `create_app` with its own batches, in a process that Ray Serve started.

Its bundles, clients and limits come from the keeper. A replica that has not heard the keeper for a while answers
nothing more: it could not know that a token was taken back, or what a client has used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from louver.cloud.app import App, Receive, Scope, Send, create_app
from louver.cloud.clients import Clients
from louver.cloud.keeper import Judged, News, Report, write_contents
from louver.cloud.logs import JsonLines, told_if_ended
from louver.cloud.refusals import Refusal
from louver.cloud.repository import Repository
from louver.cloud.service import Common
from louver.cloud.settings import Batching, Limits, Settings
from louver.cloud.tokens import Client
from louver.errors import ConfigError, LouverError

__all__ = ["Replica"]

SYNC_S = 0.5
METRICS_S = 2.0
LOST_S = 10.0
_ASK_S = 5.0
_FETCH_S = 60.0
_READ_AGAIN_S = 5.0
_MOST_LINES = 10_000
_log = logging.getLogger("louver.cloud")


class Replica:
    """What Ray Serve makes one or more of. `keeper` is an actor made of `Keeper`."""

    def __init__(self, keeper: Any, limits: Limits, batching: Batching, keep_s: float) -> None:  # noqa: ANN401 - Ray's
        _close_inner_port()
        self._keeper = keeper
        self._name = ray.get_runtime_context().get_actor_id()[:12]
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._keep_log()
        self._folder = tempfile.TemporaryDirectory(prefix="louver-")
        self._generation, contents = ray.get(keeper.contents.remote())
        bundles = Path(self._folder.name)
        write_contents(bundles, contents)
        # The names were compared with what is served when all began; since then a model may have been taken away.
        self._repository = Repository([bundles], batching=batching, keep_s=keep_s, may_lack_names=True)
        if any(one.is_leaving for one in contents):
            # Read once with them, so that they are known as what was replaced.
            write_contents(bundles, [one for one in contents if not one.is_leaving])
            self._repository.reload()
        news: News = ray.get(keeper.sync.remote(Report(replica=self._name, in_flight=0)))
        clients = Clients(None) if news.clients is not None else None
        common = Common(clients=clients, admit=self._admit, charge=self._charge)
        self._app: App = create_app(self._repository, Settings(limits=limits), common=common)
        self._app.service.lines.write = self._keep_line
        self._in_flight = 0
        self._is_closing = False
        self._heard = self._measured = time.monotonic()
        self._hear(news)
        self._following: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        """What Ray Serve calls for each request; asked for in the loop that requests will run in."""
        self._following = told_if_ended(self._follow(), what="hearing the keeper")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, receive, send)

        return answer  # a function: uvicorn would take a method for an application of ASGI 2

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._is_lost and scope["path"] != "/v2/health/live":
            await _send_away(send, "this server cannot look up who may ask, and for what")
            return
        if self._is_closing and scope["path"].endswith("/infer"):
            await _send_away(send, "this server is about to end")
            return
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1

    # What is asked of the keeper

    async def _admit(self, client: Client) -> None:
        _raise_if_refused(await self._ask(self._keeper.admit.remote(client.name)))

    async def _charge(
        self, client: Client, rows: int, model: tuple[str, str], call_id: str, content: bytes
    ) -> Callable[[], None]:
        digest = hashlib.sha256(content).digest()
        judged = await self._ask(self._keeper.charge.remote(client.name, rows, model, call_id, digest))
        _raise_if_refused(judged)

        def back() -> None:
            if judged.bill is not None:
                self._keeper.put_back.remote(judged.bill)

        return back

    async def _ask(self, answer: Any) -> Judged:  # noqa: ANN401 - Ray's
        try:
            async with asyncio.timeout(_ASK_S):
                judged: Judged = await answer
        except (RayError, TimeoutError) as error:
            raise Refusal(503, "the server cannot look up the limits of clients", retry_after_s=5.0) from error
        return judged

    # What it tells without being asked

    @property
    def _is_lost(self) -> bool:
        """Whether the keeper was not heard for too long. Asked by each request, so that it holds if `_follow` ends."""
        return time.monotonic() - self._heard > LOST_S

    async def _follow(self) -> None:
        is_told = False
        while True:
            await asyncio.sleep(SYNC_S)
            now = time.monotonic()
            is_measured = now - self._measured >= METRICS_S
            lines = list(self._lines)
            report = Report(
                replica=self._name,
                in_flight=self._in_flight,
                lines=lines,
                metrics=self._app.service.metrics_text() if is_measured else b"",
            )
            try:
                async with asyncio.timeout(_ASK_S):
                    news = await self._keeper.sync.remote(report)
            except (RayError, LouverError, OSError) as error:  # a time that is over is an OSError too
                if self._is_lost and not is_told:
                    is_told = True
                    _log.error("keeper lost: answering nothing more", extra={"error": type(error).__name__})
                    self._app.service.is_draining = True
                continue
            self._heard, is_told = time.monotonic(), False
            for _ in lines:
                self._lines.popleft()
            if is_measured:
                self._measured = now
            self._hear(news)
            self._repository.sweep()
            # Beside this: a large bundle takes longer to read than a replica may be without the keeper.
            if news.generation != self._generation and (self._reading is None or self._reading.done()):
                self._reading = told_if_ended(self._read_again(), what="taking up bundles")

    def _hear(self, news: News) -> None:
        service = self._app.service
        if service.clients is not None:
            known = news.clients or ()
            if list(known) != service.clients.all:
                service.clients.replace(known)
        service.is_draining = news.is_draining
        self._is_closing = news.is_closing

    async def _read_again(self) -> None:
        """Takes up the bundles of the keeper; what fails is logged, and tried again after a while."""
        bundles = Path(self._folder.name)
        try:
            async with asyncio.timeout(_FETCH_S):
                generation, contents = await self._keeper.contents.remote()

            def read() -> list[str]:
                write_contents(bundles, [one for one in contents if not one.is_leaving])
                return self._repository.reload()

            failures = await asyncio.to_thread(read)
        except (RayError, LouverError, OSError) as error:
            reason = str(error) or type(error).__name__
            _log.error("bundles not taken up: what was served goes on", extra={"reason": reason})
            await asyncio.sleep(_READ_AGAIN_S)
            return
        for failure in failures:
            _log.error("bundle not loaded: what was served goes on", extra={"reason": failure})
        self._generation = generation

    def _keep_line(self, line: str) -> None:
        """Keeps the line of a request, which no logger makes, beside those of the log."""
        self._lines.append(f'{line.rstrip().removesuffix("}")}, "replica": "{self._name}"}}')

    def _keep_log(self) -> None:
        handler = _Kept(self._lines, self._name)
        handler.setFormatter(JsonLines())
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


def _close_inner_port() -> None:
    """Binds to loopback a port that Ray opens in each replica for calls between deployments, of which we have none.

    It would be open to every address, and unpickles what it is sent.

    Raises:
        ConfigError: this version of Ray opens it in another way.
    """
    from ray.serve._private import replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        raise ConfigError(f"expected a Ray whose replicas are known to stay on this machine, got {ray.__version__}")

    def bind_here(server: object, address: str) -> int:
        port: int = bind(server, address.replace("[::]:", "127.0.0.1:"))
        return port

    replica.add_port_to_grpc_server = bind_here


class _Kept(logging.Handler):
    """Keeps lines until they are told to the keeper."""

    def __init__(self, lines: deque[str], replica: str) -> None:
        super().__init__()
        self._lines = lines
        self._replica = replica

    def emit(self, record: logging.LogRecord) -> None:
        record.replica = self._replica
        self._lines.append(self.format(record))


async def _send_away(send: Send, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _raise_if_refused(judged: Judged) -> None:
    if judged.status != 200:
        raise Refusal(judged.status, judged.reason, retry_after_s=judged.retry_after_s)
