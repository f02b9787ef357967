"""What REST and gRPC have in common: who asks, within which limits; then scores, a count and a line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from louver.cloud.aside import Aside
from louver.cloud.budgets import Budgets
from louver.cloud.clients import ANYONE, Clients
from louver.cloud.heads import Heads
from louver.cloud.logs import RequestLines
from louver.cloud.metrics import Metrics
from louver.cloud.protocol import Call, RestHeads
from louver.cloud.refusals import Refusal
from louver.cloud.repository import Repository, Served
from louver.cloud.settings import Settings
from louver.cloud.tokens import Client
from louver.cloud.traces import Traces
from louver.errors import StorageError

__all__ = ["GONE", "Common", "Request", "Service"]

_log = logging.getLogger("louver.cloud")
GONE = 499
"""The status in log and metrics of a request whose client left before it was answered; nobody receives it."""


@dataclass(slots=True)
class Request:
    """What becomes known of one request for scores while it is handled; all that a log line may hold."""

    protocol: str
    client: Client | None = None
    served: Served | None = None
    rows: int = 0
    n_bytes: int = 0
    held_bytes: int = 0
    status: int = 200
    since: float = field(default_factory=time.perf_counter)
    traceparent: bytes | None = None
    queue_s: float = 0.0
    compute_s: float | None = None

    def timed(self, queue_s: float, compute_s: float) -> None:
        """Takes down how long it waited for its run, and how long the run of its batch took."""
        self.queue_s, self.compute_s = queue_s, compute_s


Charge = Callable[[Client, int, tuple[str, str], str, bytes], Awaitable[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What several servers have in common, and one process keeps for all of them: see `keeper.py`.

    clients: None where nobody is asked who they are. admit: counts a request of a client with a rate. charge: as that
    of `Budgets`.

    Raises:
        Refusal: `admit` 429 and 503; `charge` 403 and 503.
    """

    clients: Clients | None
    admit: Callable[[Client], Awaitable[None]]
    charge: Charge


class Service:
    """The parts of one server, and the way of a request through them. It belongs to one event loop.

    With `common`, clients and their limits are not its own. With `traces`, each request for scores is a span there.

    Raises:
        ConfigError: the file of tokens is not as it must be.
        StorageError: the budgets are damaged, or another server holds them.
    """

    def __init__(
        self,
        repository: Repository,
        settings: Settings,
        *,
        common: Common | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.repository = repository
        self.settings = settings
        self.lines = RequestLines()
        self.clients: Clients | None = None
        self.budgets: Budgets | None = None
        self.traces = traces
        self._common = common
        if common is not None:
            self.clients = common.clients
        elif settings.tokens is not None:
            self.clients = Clients(settings.tokens)
        if common is None and settings.budgets_path is not None:
            self.budgets = Budgets(settings.budgets_path, retry_window_s=settings.retry_window_s)
        self.metrics = Metrics(repository, self.clients, self.budgets)
        self.aside = Aside()
        self.is_draining = False
        self.held_bytes = 0
        self.rest_heads = RestHeads()
        self.rpc_heads: Heads[bytes, tuple[str, str, int, int]] = Heads()
        """Name, version, images and classes, by all of a message but its id and its tensor."""
        self._n_open = 0

    def close(self) -> None:
        """Sends the last traces and writes down the budgets. To be called when no request is handled anymore."""
        self.aside.close()
        if self.traces is not None:
            self.traces.close()
        if self.budgets is not None:
            self.budgets.close()

    @property
    def is_ready(self) -> bool:
        """Whether new clients should come here."""
        return not self.is_draining

    def metrics_text(self) -> bytes:
        """The metrics at this moment, in Prometheus's format."""
        self.metrics.held_bytes = self.held_bytes
        return self.metrics.text()

    def identify(self, authorization: bytes | None) -> Client:
        """Who asks.

        Raises:
            Refusal: 401.
        """
        return self.clients.identify(authorization) if self.clients is not None else ANYONE

    def begun(self, protocol: str) -> Request:
        """A request for scores that has just come; `ended` must follow, whatever becomes of it."""
        self._n_open += 1
        return Request(protocol)

    async def admit(self, request: Request, authorization: bytes | None) -> Client:
        """Who asks, and whether now: all that can be refused before anything else is read.

        Raises:
            Refusal: 401, 429, and 503 where rates are kept elsewhere and cannot be asked for.
        """
        request.client = client = self.identify(authorization)
        if self._common is not None:
            if client.requests_per_s is not None:
                await self._common.admit(client)
        elif self.clients is not None:
            self.clients.admit(client)
        return client

    def hold(self, request: Request, n_bytes: int) -> None:
        """Counts bytes that are in memory for a request; whoever handles it takes them off at its end.

        Raises:
            Refusal: 503, when all requests together would hold more than they may.
        """
        if self.held_bytes + n_bytes > self.settings.limits.held_bytes:
            raise Refusal(503, "too many large requests at once", retry_after_s=1.0)
        self.held_bytes += n_bytes
        request.held_bytes += n_bytes

    async def submit(self, request: Request, call: Call, content: bytes) -> asyncio.Future[NDArray[np.float32]]:
        """A future of the scores; cancelled, it is dropped. `content`: the body as it came, to know a repetition by.

        What is charged for it is put back if it is refused here, and if the network fails; not if its scores are no
        numbers, since it was computed then.

        Raises:
            Refusal: 403 the budget is spent, 503 too many wait. The future: 500 the network failed.
        """
        assert request.served is not None
        assert request.client is not None
        request.rows = len(call.feature)
        self.metrics.watch(request.served)
        charge: Charge | None = self.budgets.charge if self.budgets is not None else None
        if self._common is not None:
            charge = self._common.charge
        if charge is None or not request.client.has_budget:
            return self._run(request, request.served, call)
        model = request.served.model
        try:
            put_back = await charge(request.client, request.rows, (model.name, model.version), call.id, content)
        except StorageError as error:
            _log.error("budgets not written", extra={"reason": str(error)})
            raise Refusal(503, "the server cannot write down budgets", retry_after_s=5.0) from error
        try:
            scores = self._run(request, request.served, call)
        except Refusal:
            put_back()
            raise

        def settle(scores: asyncio.Future[NDArray[np.float32]]) -> None:
            # Not when the client has left: what is computed by then it could have had.
            if not scores.cancelled() and scores.exception() is not None:
                put_back()

        scores.add_done_callback(settle)
        return scores

    def _run(self, request: Request, served: Served, call: Call) -> asyncio.Future[NDArray[np.float32]]:
        timed = request.timed if self.traces is not None else None
        return served.batcher.submit(call.feature, is_alone=self._n_open == 1, timed=timed)

    def checked(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores, if they are numbers.

        Raises:
            Refusal: 400.
        """
        if not np.isfinite(scores).all():
            raise Refusal(400, "the scores are not finite; send the feature as the half on the device makes it")
        return scores

    def ended(self, request: Request) -> None:
        """Lets go of what a request held, counts it and writes its line, once its answer is on its way.

        Also where its client has left while it runs: what the run still has is bounded by itself, see `Batcher`.
        """
        self._n_open -= 1
        self.held_bytes -= request.held_bytes
        seconds = time.perf_counter() - request.since
        # In the next turn of the loop: what has been sent leaves at the end of this one.
        asyncio.get_running_loop().call_soon(self._count, request, seconds)

    def _count(self, request: Request, seconds: float) -> None:
        self.metrics.count(
            request.served,
            request.protocol,
            request.status,
            seconds=seconds,
            rows=request.rows,
            n_bytes=request.n_bytes,
        )
        if request.status == 403 and request.client is not None:
            self.metrics.count_spent(request.client.name)
        model = request.served.model if request.served is not None else None
        self.lines.add(
            protocol=request.protocol,
            client=request.client.name if request.client is not None else None,
            model=model.name if model is not None else None,
            version=model.version if model is not None else None,
            rows=request.rows,
            status=request.status,
            ms=1000 * seconds,
        )
        if self.traces is not None:
            self.traces.add(request, seconds)
