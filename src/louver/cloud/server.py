"""The server of one machine: listeners, what protects them, signals, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from louver.cloud.app import App, Receive, Scope, Send
from louver.cloud.certificates import Certificates
from louver.cloud.connections import GuardedProtocol, sweep
from louver.cloud.logs import told_if_ended
from louver.cloud.metrics import CONTENT_TYPE
from louver.cloud.models import Model
from louver.cloud.rpc import create_rpc_server
from louver.cloud.service import Service
from louver.errors import ConfigError

__all__ = ["Addresses", "Listening", "Started", "free_port", "serve", "serve_metrics"]

_log = logging.getLogger("louver.cloud")
_SWEEP_S = 1.0
_IDLE_S = 75
"""Longer than most load balancers keep a connection, so that it is they who close it."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where to listen, and what protects it.

    Ports: 0 takes a free one; None for `grpc_port` and `metrics_port` is none at all. Metrics are on loopback always:
    they name clients and their budgets, which a device that holds a token has no business with. drain_s: after SIGTERM,
    how long it goes on listening while it says that it is not ready.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    is_insecure_public: bool = False
    drain_s: float = 5.0
    connections: int = 1024
    head_s: float = 10.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both a certificate and its key: give --tls-cert and --tls-key")
        if self.client_ca is not None and self.tls_cert is None:
            raise ConfigError("certificates of clients need TLS: give --tls-cert and --tls-key too")
        for name, most in (("drain_s", 86_400), ("connections", 2**20), ("head_s", 3600)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected a number from 0 to {most}, got {getattr(self, name)!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, *, has_tokens: bool) -> None:
        """Refuses to be reached from elsewhere without TLS and tokens.

        Raises:
            ConfigError: with what is missing.
        """
        if self.is_loopback or self.is_insecure_public or (self.tls_cert is not None and has_tokens):
            return
        missing = [
            *(["--tls-cert and --tls-key"] if self.tls_cert is None else []),
            *([] if has_tokens else ["--tokens"]),
        ]
        raise ConfigError(
            f"--host {self.host} can be reached from other machines: expected {' and '.join(missing)} too; "
            "give them, stay on 127.0.0.1 behind a proxy that does both, or say --insecure-public"
        )


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a server listens, once it does."""

    rest: str
    grpc: str | None
    metrics: str | None


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a server says of itself once it listens. n_clients: None where nobody is asked who they are."""

    addresses: Addresses
    models: tuple[Model, ...]
    n_clients: int | None


async def serve(app: App, listening: Listening, *, started: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT, then ends in order: not ready, drained, closed.

    SIGHUP reads bundles and certificates again; files of certificates that change are read without it too.
    Must run in the main thread, whose signals it takes while it runs.

    Raises:
        ConfigError: too little protection for its address, a certificate that cannot be used, or a taken address.
        StorageError: what clients have used cannot be written at the end.
    """
    service = app.service
    listening.check(has_tokens=service.clients is not None)
    certificates = _certificates(listening)
    loop = asyncio.get_running_loop()
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    async with contextlib.AsyncExitStack() as stack:
        rest_socket = stack.enter_context(_socket(listening.host, listening.port))
        server = _rest_server(app, listening, certificates)
        metrics = rpc = rpc_address = None
        if listening.metrics_port is not None:

            async def text() -> bytes:
                return service.metrics_text()

            metrics = await stack.enter_async_context(serve_metrics(listening.metrics_port, text))
        if listening.grpc_port is not None:
            rpc, port = create_rpc_server(
                service,
                f"{host}:{listening.grpc_port}",
                certificates,
                connections=listening.connections,
                head_s=listening.head_s,
                idle_s=_IDLE_S,
            )
            await rpc.start()
            rpc_address = f"{host}:{port}"
        running = loop.create_task(server.serve([rest_socket]))
        sweeping = told_if_ended(_sweep(service, server, listening, certificates), what="looking after connections")
        signals = _Signals(service, certificates)
        with signals.taken(loop):
            while not server.started:
                await asyncio.sleep(0.005)
            rest = f"{'https' if certificates is not None else 'http'}://{host}:{rest_socket.getsockname()[1]}"
            started(Addresses(rest=rest, grpc=rpc_address, metrics=metrics))
            await signals.ending.wait()
            # Goes on answering while whoever balances load learns that it should go elsewhere.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(signals.at_once.wait(), listening.drain_s)
            _log.info("closing")
            server.should_exit = True
            grace_s = _grace_s(service)
            if rpc is not None:
                await rpc.stop(grace_s)
            await running
        sweeping.cancel()
    service.close()
    _log.info("ended")


class _Signals:
    """What signals ask for: SIGTERM drains, SIGINT (or a second SIGTERM) ends without waiting, SIGHUP reads again."""

    def __init__(self, service: Service, certificates: Certificates | None) -> None:
        self._service = service
        self._certificates = certificates
        self.ending = asyncio.Event()
        self.at_once = asyncio.Event()
        self._reload: asyncio.Task[None] | None = None
        self._is_asked_again = False

    @contextlib.contextmanager
    def taken(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Takes the signals of the process for a while."""
        handlers = {
            signal.SIGTERM: self._end,
            signal.SIGINT: lambda: self._end(is_at_once=True),
            signal.SIGHUP: self._read_again,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _end(self, *, is_at_once: bool = False) -> None:
        if is_at_once or self.ending.is_set():
            self.at_once.set()
        if not self.ending.is_set():
            waiting = sum(len(one.batcher) for one in self._service.repository.current)
            _log.info("draining", extra={"waiting": waiting})
        self._service.is_draining = True
        self.ending.set()

    def _read_again(self) -> None:
        if self._reload is not None and not self._reload.done():
            self._is_asked_again = True  # what is being read now may be older than this signal
        else:
            self._reload = told_if_ended(self._run(), what="reading bundles")

    async def _run(self) -> None:
        repository = self._service.repository
        while True:
            self._is_asked_again = False
            if self._certificates is not None:
                self._certificates.refresh(is_asked=True)
            for failure in await asyncio.to_thread(repository.reload):
                _log.error("bundle not loaded: what was served goes on", extra={"reason": failure})
            models = [f"{one.model.name}/{one.model.version}" for one in repository.current]
            leaving = [f"{one.model.name}/{one.model.version}" for one in repository.leaving]
            _log.info("bundles read", extra={"models": models, "leaving": leaving})
            if not self._is_asked_again:
                return


class _Server(uvicorn.Server):
    """uvicorn's server without its signals, which are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _rest_server(app: App, listening: Listening, certificates: Certificates | None) -> _Server:
    config = uvicorn.Config(
        app,
        http=type("Guarded", (GuardedProtocol,), {"most_connections": listening.connections}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_grace_s(app.service),
    )
    config.load()
    config.ssl = certificates.context if certificates is not None else None
    return _Server(config)


@contextlib.asynccontextmanager
async def serve_metrics(port: int, text: Callable[[], Awaitable[bytes]]) -> AsyncIterator[str]:
    """Serves `text()` to Prometheus on 127.0.0.1, and gives the address; 0 takes a free port.

    Raises:
        ConfigError: the port is taken.
    """
    with _socket("127.0.0.1", port) as listener:
        server = _metrics_server(text)
        running = asyncio.get_running_loop().create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        finally:
            server.should_exit = True
            await running


def free_port(host: str, port: int = 0) -> int:
    """`port` if nobody listens there, and for 0 one where nobody does at this moment.

    Raises:
        ConfigError: it is taken.
    """
    with _socket(host, port) as found:
        chosen: int = found.getsockname()[1]
    return chosen


def _metrics_server(text: Callable[[], Awaitable[bytes]]) -> _Server:
    async def metrics_app(scope: Scope, receive: Receive, send: Send) -> None:
        is_found = scope["type"] == "http" and scope["path"] == "/metrics" and scope["method"] == "GET"
        body = await text() if is_found else b"expected GET /metrics\n"
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200 if is_found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(
        metrics_app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=16,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


async def _sweep(service: Service, rest: _Server, listening: Listening, certificates: Certificates | None) -> None:
    answer_s = service.settings.limits.answer_s
    while True:
        await asyncio.sleep(min(_SWEEP_S, listening.head_s / 4))
        sweep(rest.server_state.connections, head_s=listening.head_s, idle_s=_IDLE_S, answer_s=answer_s)
        service.repository.sweep()
        if certificates is not None:
            certificates.refresh()


def _grace_s(service: Service) -> int:
    """How long what is in flight at the end may take: its body, its answer, and the queue between them."""
    return int(2 * (service.settings.limits.body_s + service.settings.limits.answer_s)) + 1


def _socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise ConfigError(f"cannot listen on {host}: {reason}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.set_inheritable(False)
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another") from error
    return found


def _certificates(listening: Listening) -> Certificates | None:
    if listening.tls_cert is None or listening.tls_key is None:
        return None
    return Certificates(listening.tls_cert, listening.tls_key, listening.client_ca)
