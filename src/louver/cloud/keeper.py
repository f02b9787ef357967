"""What the replicas of one service have in common, kept by one process for all of them.

A budget on the disk of one machine cannot be shared by those who count on their own, and a rate that each replica
allows is as many times too high. So one keeper holds the files: replicas ask it about each request of a client with a
rate or a budget, and hear from it twice a second who the clients are, which bundles there are, and when to end. It
knows nothing of Ray; `ray_engine.py` makes an actor of it.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from louver.bundle import CLOUD, MANIFEST
from louver.cloud.budgets import Budgets
from louver.cloud.clients import Clients
from louver.cloud.models import model_of
from louver.cloud.refusals import Refusal
from louver.cloud.repository import read_each
from louver.cloud.settings import Settings
from louver.cloud.tokens import Client
from louver.errors import StorageError
from louver.signing import Maker, trusted_bundle
from louver.storage import refusals

__all__ = ["Content", "Judged", "Keeper", "News", "Report", "Seen", "read_contents", "write_contents"]

_MOST_BILLS = 2**14
_MOST_LINES = 2**16
_SILENT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a replica needs of a bundle, as bytes that fit together."""

    version: str
    manifest: bytes
    cloud: bytes
    is_leaving: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says of itself. lines: of its log since the last one. metrics: in Prometheus's format, or none."""

    replica: str
    in_flight: int
    lines: Sequence[str] = ()
    metrics: bytes = b""


@dataclass(frozen=True, kw_only=True)
class News:
    """What a replica hears. generation: changes with the bundles. clients: None where nobody is asked."""

    generation: int
    clients: tuple[Client, ...] | None
    is_draining: bool
    is_closing: bool


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Whether a request goes on. bill: by which a charge can be put back. Values cross processes better than errors."""

    bill: int | None = None
    status: int = 200
    reason: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All replicas at one moment, and the log lines since the last look."""

    replicas: int
    in_flight: int
    lines: tuple[str, ...]


class Keeper:
    """Holds the files of clients and budgets, and the bytes of bundles, for replicas on any machine.

    With a `maker` every bundle must be signed by it, also one that is read again.

    Raises:
        BundleError: a path holds no bundle, or a bundle is not as it was exported, or not signed.
        ConfigError: the file of tokens is not as it must be, or the maker's key cannot be read.
        StorageError: the budgets are damaged, or another server holds them.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        settings: Settings,
        *,
        keep_s: float,
        maker: Maker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = paths
        self._keep_s = keep_s
        self._maker = maker
        self._clock = clock
        self._folders = read_contents(paths, maker)
        self._current = _by_version(self._folders)
        self._leaving: dict[str, tuple[Content, float]] = {}
        self._generation = 1
        self._reading = asyncio.Lock()
        self._clients = Clients(settings.tokens) if settings.tokens is not None else None
        path = settings.budgets_path
        self._budgets = Budgets(path, retry_window_s=settings.retry_window_s) if path is not None else None
        self._bills: OrderedDict[int, Callable[[], None]] = OrderedDict()
        self._last_bill = 0
        self._reports: dict[str, tuple[Report, float]] = {}
        self._metrics: dict[str, bytes] = {}
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._is_draining = self._is_closing = False

    async def contents(self) -> tuple[int, list[Content]]:
        """The generation and its bundles; those that were replaced and are still answered come with a mark."""
        now = self._clock()
        leaving = [one for one, until in self._leaving.values() if now < until]
        return self._generation, [*self._current.values(), *leaving]

    async def sync(self, report: Report) -> News:
        """Hears one replica, and tells it what is new."""
        now = self._clock()
        self._reports[report.replica] = report, now
        if report.metrics:
            self._metrics[report.replica] = report.metrics
        self._lines.extend(report.lines)
        for name in [name for name, (_, when) in self._reports.items() if now - when > _SILENT_S]:
            del self._reports[name]
            self._metrics.pop(name, None)
        return News(
            generation=self._generation,
            clients=tuple(self._clients.all) if self._clients is not None else None,
            is_draining=self._is_draining,
            is_closing=self._is_closing,
        )

    async def admit(self, name: str) -> Judged:
        """Counts one request of a client with a rate."""
        try:
            client = self._named(name)
            assert self._clients is not None
            self._clients.admit(client)
        except Refusal as refusal:
            return _judged(refusal)
        return Judged()

    async def charge(self, name: str, rows: int, model: tuple[str, str], call_id: str, digest: bytes) -> Judged:
        """Takes rows off a client's budget; `model` and `digest`, for the body, are to know a repetition by."""
        if self._budgets is None:
            return Judged()
        try:
            back = await self._budgets.charge(self._named(name), rows, model, call_id, digest)
        except Refusal as refusal:
            return _judged(refusal)
        except StorageError:
            return Judged(status=503, reason="the server cannot write down budgets", retry_after_s=5.0)
        self._last_bill += 1
        self._bills[self._last_bill] = back
        if len(self._bills) > _MOST_BILLS:  # a bill is put back within moments, or never
            self._bills.popitem(last=False)
        return Judged(bill=self._last_bill)

    async def put_back(self, bill: int) -> None:
        """Gives back what was charged for a request that was not computed."""
        back = self._bills.pop(bill, None)
        if back is not None:
            back()

    async def reload(self) -> list[str]:
        """Reads the bundles again, and says what could not be read; where one fails, what was there stays."""
        failures: list[str] = []
        async with self._reading:
            # Signatures and first runs take seconds, and replicas ask in the meantime.
            self._folders = await asyncio.to_thread(
                read_contents, self._paths, self._maker, before=self._folders, failures=failures
            )
        found = _by_version(self._folders)
        now = self._clock()
        self._leaving = {
            version: pair for version, pair in self._leaving.items() if version not in found and now < pair[1]
        }
        for version, one in self._current.items():
            if version not in found:
                leaving = Content(version=version, manifest=one.manifest, cloud=one.cloud, is_leaving=True)
                self._leaving[version] = leaving, now + self._keep_s
        self._current = found
        self._generation += 1
        return failures

    async def drain(self, *, is_closing: bool = False) -> None:
        """Replicas say that they are not ready; with `is_closing`, they take nothing new either."""
        self._is_draining = True
        self._is_closing = self._is_closing or is_closing

    async def look(self) -> Seen:
        """What the replicas said of late."""
        now = self._clock()
        alive = [report for report, when in self._reports.values() if now - when <= _SILENT_S]
        lines, self._lines = tuple(self._lines), deque(maxlen=_MOST_LINES)
        return Seen(replicas=len(alive), in_flight=sum(one.in_flight for one in alive), lines=lines)

    async def metrics_text(self) -> bytes:
        """The metrics of all replicas, each with its name as a label, and the budgets, in Prometheus's format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged(self._metrics, [self._replicas(), *self._budget_gauges()]))
        return generate_latest(registry)

    async def close(self) -> None:
        """Writes down the budgets. To be called when no replica asks anymore."""
        if self._budgets is not None:
            self._budgets.close()
            self._budgets = None

    def _named(self, name: str) -> Client:
        known = self._clients.all if self._clients is not None else []
        client = next((one for one in known if one.name == name), None)
        if client is None:
            raise Refusal(401, "unknown token: it is wrong, or has been revoked")
        return client

    def _replicas(self) -> GaugeMetricFamily:
        return GaugeMetricFamily("louver_replicas", "Replicas that answer.", value=len(self._reports))

    def _budget_gauges(self) -> Iterator[GaugeMetricFamily]:
        if self._clients is None or self._budgets is None:
            return
        left = GaugeMetricFamily("louver_budget_left_images", "Images left in the budget.", labels=["client"])
        used = GaugeMetricFamily("louver_budget_used_images", "Images used, ever.", labels=["client"])
        for client in self._clients.all:
            images = self._budgets.left(client)
            if images is not None:
                left.add_metric([client.name], images)
                used.add_metric([client.name], self._budgets.used(client))
        yield from (left, used)


class _Merged(Collector):
    """The families of several texts as one, so that each is told once."""

    def __init__(self, texts: dict[str, bytes], own: Iterable[Metric]) -> None:
        self._texts = texts
        self._own = own

    def collect(self) -> Iterator[Metric]:
        families = {one.name: one for one in self._own}
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    merged.add_sample(sample.name, labels, sample.value)
        yield from families.values()


def read_contents(
    paths: Sequence[Path],
    maker: Maker | None = None,
    *,
    before: Mapping[Path, Content] | None = None,
    failures: list[str] | None = None,
) -> dict[Path, Content]:
    """By folder, the bundles in `paths`: the bytes whose hash is that of their manifest.

    With those of `before`, one that is not among them is run once, for it may take the place of one that runs. With a
    list for failures, each goes there and `before` fills its place.

    Raises:
        BundleError: without that list: no bundle, one that is not as it was exported or does not run, or one that
            `maker` did not sign.
        ConfigError: without that list: the maker's key cannot be read.
    """
    known: dict[str, Content] = {}
    # At the start whoever starts the service has run them all.
    has_run = {one.version for one in before.values()} if before is not None else None

    def read(folder: Path) -> Content:
        bundle = trusted_bundle(folder, maker)
        if has_run is not None and bundle.id not in has_run:
            model_of(bundle, threads=1)
            has_run.add(bundle.id)
        content = Content(version=bundle.id, manifest=bundle.manifest, cloud=bundle.content(CLOUD))
        return known.setdefault(bundle.id, content)  # the very same bundle twice takes memory once

    return read_each(paths, read, before or {}, failures=failures)


def _by_version(folders: Mapping[Path, Content]) -> dict[str, Content]:
    return {one.version: one for one in folders.values()}


def write_contents(folder: Path, contents: Sequence[Content]) -> None:
    """Makes `folder` hold these bundles and no other; whoever loads them checks them again.

    Raises:
        StorageError: the disk refused; called again, it goes on from there.
    """
    with refusals(folder, then="free space: it is tried again by itself"):
        for one in contents:
            into = folder / one.version
            if not (into / MANIFEST).is_file():
                into.mkdir(parents=True, exist_ok=True)
                (into / CLOUD).write_bytes(one.cloud)
                # Last, and whole: a folder with a manifest is not written again.
                whole = into / f"{MANIFEST}.part"
                whole.write_bytes(one.manifest)
                whole.replace(into / MANIFEST)
        stay = {one.version for one in contents}
        for into in folder.iterdir():
            if into.name not in stay:
                shutil.rmtree(into)


def _judged(refusal: Refusal) -> Judged:
    return Judged(status=refusal.status, reason=refusal.reason, retry_after_s=refusal.retry_after_s)
