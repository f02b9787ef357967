"""What Prometheus may ask: counts, times and sizes, by model and version, and budgets by client. Never content."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from louver.cloud.budgets import Budgets
from louver.cloud.clients import Clients
from louver.cloud.repository import Repository, Served

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MODEL = ("model", "version")
_UNKNOWN = ("", "")
"""For names that are not served: a client must not be able to fill the memory with labels."""


@dataclass(frozen=True, slots=True)
class _OfModel:
    seconds: Histogram
    bytes_in: Counter
    images: Counter


class Metrics:
    """One registry for one server: two in a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "louver_requests", "Requests for scores.", (*_MODEL, "protocol", "status"), registry=registry
        )
        self._seconds = Histogram(
            "louver_request_seconds", "From the head of a request to its answer.", _MODEL, buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._batch = Histogram("louver_batch_images", "Images in one run.", _MODEL, buckets=_ROWS, registry=registry)
        self._bytes = Counter("louver_received_bytes", "Bytes of bodies, as received.", _MODEL, registry=registry)
        self._images = Counter("louver_images", "Images that were answered.", _MODEL, registry=registry)
        self._waiting = Gauge("louver_waiting_requests", "Requests that wait for a run.", _MODEL, registry=registry)
        self._held = Gauge("louver_held_bytes", "Bytes of bodies in memory.", registry=registry)
        self._refused = Counter(
            "louver_budget_refusals", "Requests refused since the budget of images is spent.", ("client",),
            registry=registry,
        )  # fmt: skip
        self._left = Gauge("louver_budget_left_images", "Images left in the budget.", ("client",), registry=registry)
        self._used = Gauge("louver_budget_used_images", "Images used, ever.", ("client",), registry=registry)
        Gauge("louver_build", "1, with the version of Louver.", ("louver",), registry=registry).labels(
            version("louver")
        ).set(1)
        self._models: dict[tuple[str, str], _OfModel] = {}
        self._counts: dict[tuple[str, str, str, int], Counter] = {}

    def watch(self, one: Served) -> None:
        """Counts the batches of a model from now on, once however often it is called."""
        if not one.told:
            one.told.append(self._batch.labels(one.model.name, one.model.version).observe)

    def count(self, one: Served | None, protocol: str, status: int, *, seconds: float, rows: int, n_bytes: int) -> None:
        """One request that has ended."""
        which = (one.model.name, one.model.version) if one is not None else _UNKNOWN
        found = self._models.get(which)
        if found is None:
            parts = (self._seconds, self._bytes, self._images)
            found = self._models[which] = _OfModel(*(part.labels(*which) for part in parts))  # type: ignore[arg-type]
        key = (*which, protocol, status)
        counter = self._counts.get(key)
        if counter is None:
            counter = self._counts[key] = self._requests.labels(*which, protocol, str(status))
        counter.inc()
        found.seconds.observe(seconds)
        found.bytes_in.inc(n_bytes)
        if status == 200:
            found.images.inc(rows)

    def count_spent(self, client: str) -> None:
        """A request that was refused since a budget is spent."""
        self._refused.labels(client).inc()

    def text(self, repository: Repository, clients: Clients | None, budgets: Budgets | None, held_bytes: int) -> bytes:
        """All of it in Prometheus's format, with what is true at this moment."""
        self._held.set(held_bytes)
        self._waiting.clear()
        for one in (*repository.current, *repository.leaving):
            self._waiting.labels(one.model.name, one.model.version).set(len(one.batcher))
        self._left.clear()
        self._used.clear()
        if clients is not None and budgets is not None:
            for client in clients.all:
                left = budgets.left(client)
                if left is not None:
                    self._left.labels(client.name).set(left)
                    self._used.labels(client.name).set(budgets.used(client))
        return generate_latest(self._registry)
