"""What Prometheus may ask: counts, times and sizes, by model and version, and budgets by client. Never content.

Requests add to plain numbers on the event loop; families and labels are made when somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from louver.cloud.budgets import Budgets
from louver.cloud.clients import Clients
from louver.cloud.repository import Repository, Served

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MODEL = ("model", "version")
_UNKNOWN = ("", "")
"""For names that are not served: a client must not be able to fill the memory with labels."""


class _Histogram:
    """Counts of values up to each bound, and above the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, accumulate(self._counts), strict=True)]
        family.add_metric(labels, buckets, self._sum)


class _OfModel:
    """The numbers of one model and version."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.seconds = _Histogram(_SECONDS)
        self.batches = _Histogram(_IMAGES)
        self.n_bytes = 0
        self.images = 0


class Metrics(Collector):
    """The numbers of one server. Two servers in a process do not mix."""

    def __init__(
        self, repository: Repository | None = None, clients: Clients | None = None, budgets: Budgets | None = None
    ) -> None:
        self.held_bytes = 0
        self._repository, self._clients, self._budgets = repository, clients, budgets
        self._models: dict[tuple[str, str], _OfModel] = {}
        self._spent: dict[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def watch(self, one: Served) -> None:
        """Counts the batches of a model from now on, once however often it is called."""
        if not one.told:
            one.told.append(self._of(one).batches.observe)

    def count(self, one: Served | None, protocol: str, status: int, *, seconds: float, rows: int, n_bytes: int) -> None:
        """One request that has ended."""
        found = self._of(one)
        key = (protocol, status)
        found.requests[key] = found.requests.get(key, 0) + 1
        found.seconds.observe(seconds)
        found.n_bytes += n_bytes
        if status == 200:
            found.images += rows

    def count_spent(self, client: str) -> None:
        """A request that was refused since a budget is spent."""
        self._spent[client] = self._spent.get(client, 0) + 1

    def text(self) -> bytes:
        """All of it in Prometheus's format, with what is true at this moment."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The families, for the registry."""
        requests = CounterMetricFamily(
            "louver_requests", "Requests for scores.", labels=(*_MODEL, "protocol", "status")
        )
        seconds = HistogramMetricFamily(
            "louver_request_seconds", "From the head of a request to its answer.", labels=_MODEL
        )
        batches = HistogramMetricFamily("louver_batch_images", "Images in one run.", labels=_MODEL)
        received = CounterMetricFamily("louver_received_bytes", "Bytes of bodies, as received.", labels=_MODEL)
        images = CounterMetricFamily("louver_images", "Images that were answered.", labels=_MODEL)
        for which, one in self._models.items():
            for (protocol, status), count in one.requests.items():
                requests.add_metric((*which, protocol, str(status)), count)
            one.seconds.add_to(seconds, which)
            one.batches.add_to(batches, which)
            received.add_metric(which, one.n_bytes)
            images.add_metric(which, one.images)
        yield from (requests, seconds, batches, received, images)
        waiting = GaugeMetricFamily("louver_waiting_requests", "Requests that wait for a run.", labels=_MODEL)
        if self._repository is not None:
            for served in (*self._repository.current, *self._repository.leaving):
                waiting.add_metric((served.model.name, served.model.version), len(served.batcher))
        yield waiting
        yield GaugeMetricFamily("louver_held_bytes", "Bytes of bodies in memory.", value=self.held_bytes)
        yield from self._collect_budgets()
        build = GaugeMetricFamily("louver_build", "1, with the version of Louver.", labels=("louver",))
        build.add_metric((version("louver"),), 1)
        yield build

    def _collect_budgets(self) -> Iterator[Metric]:
        refused = CounterMetricFamily(
            "louver_budget_refusals", "Requests refused since the budget of images is spent.", labels=("client",)
        )
        for name, count in self._spent.items():
            refused.add_metric((name,), count)
        left = GaugeMetricFamily("louver_budget_left_images", "Images left in the budget.", labels=("client",))
        used = GaugeMetricFamily("louver_budget_used_images", "Images used, ever.", labels=("client",))
        if self._clients is not None and self._budgets is not None:
            for client in self._clients.all:
                images_left = self._budgets.left(client)
                if images_left is not None:
                    left.add_metric((client.name,), images_left)
                    used.add_metric((client.name,), self._budgets.used(client))
        yield from (refused, left, used)

    def _of(self, one: Served | None) -> _OfModel:
        which = (one.model.name, one.model.version) if one is not None else _UNKNOWN
        found = self._models.get(which)
        if found is None:
            found = self._models[which] = _OfModel()
        return found
