"""`Edge`: images in, answers out; between them a feature, and nothing else of the images."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from louver.bundle import Bundle, read_bundle
from louver.edge.address import Credential
from louver.edge.half import EdgeHalf, HeadHalf, checked_images
from louver.edge.settings import Policy, Settings
from louver.edge.transport import Transport
from louver.edge.wire import Request, request_of
from louver.errors import (
    AnswerError,
    BundleError,
    BusyError,
    CloudAwayError,
    CloudRefusedError,
    ConfigError,
    DamagedError,
    LouverError,
    nearest,
)

if TYPE_CHECKING:
    from louver.edge.outbox import Outbox

__all__ = ["Answer", "Delivery", "Edge", "Flushed"]

_log = logging.getLogger("louver.edge")

_PARTING_S = 1.0
"""How long a source that is given up may take to notice."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one call of `Edge.infer`.

    `source`: "cloud"; "local", the bundle's small head; or "queue", where the feature waits on disk, `scores` is None,
    and the scores come later through `Edge.flush` under the same `request_id`. `scores` are [n, *output_shape];
    `labels` name the highest score of each image, None where the bundle has no labels or there are no scores.
    `edge_ms`: computing the feature and packing it; `wire_ms`: from the first byte sent until the answer was checked,
    with all tries and waits. `sent_bytes`: the body of one try, without headers and TLS. `tries`: how many the cloud's
    answer took, 0 where the cloud did not answer.
    """

    request_id: str
    source: Literal["cloud", "local", "queue"]
    scores: NDArray[np.float32] | None
    labels: tuple[str, ...] | None
    edge_ms: float
    wire_ms: float
    sent_bytes: int
    tries: int

    @property
    def is_degraded(self) -> bool:
        """Whether the small head answered instead of the cloud."""
        return self.source == "local"


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A late answer to a request that had waited on disk."""

    request_id: str
    scores: NDArray[np.float32]
    labels: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Flushed:
    """What came of sending what waited: how many were delivered and still wait, and damaged entries set aside."""

    n_delivered: int
    n_waiting: int
    damaged: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    request: Request
    feature: NDArray[np.generic] = field(repr=False)
    edge_ms: float
    place: int
    """In the queue, should it have to wait: taken when its feature was computed, since tries may end in any order."""


class Edge:
    """The edge half of a bundle, connected to the server that runs the cloud half. Any thread may use it.

    Use it as a context manager, or call `close`. A `token` that may change is given by a function: it is called once
    more when the server does not know its token (HTTP 401), and where it gives another, the request is sent with that.

    Raises:
        BundleError: no bundle there, a changed byte, or without the head that policy "local" needs.
        ConfigError: an address, token, policy or setting that cannot be.
        MissingExtraError: policy "queue" without `cryptography`.
        StorageError: the queue cannot be opened.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        server: str,
        token: str | Callable[[], str] | None = None,
        policy: Policy = "fail",
        settings: Settings | None = None,
    ) -> None:
        if policy not in get_args(Policy):
            raise ConfigError(f"policy: got {policy!r}; {nearest(str(policy), list(get_args(Policy)))}")
        settings = settings or Settings()
        folder = bundle.folder if isinstance(bundle, Bundle) else bundle
        maker = settings.maker
        if maker is None:
            found = read_bundle(folder)
        else:
            from louver.signing import verify_bundle

            found = verify_bundle(Path(folder), maker)
        if isinstance(bundle, Bundle) and found.id != bundle.id:
            raise BundleError(f"{folder}: expected bundle {bundle.id}, got {found.id}; read it again")
        self.bundle, self.policy, self.settings = found, policy, settings
        self._edge = EdgeHalf(found, threads=settings.threads)
        self._head = HeadHalf(found, threads=settings.threads) if policy == "local" else None
        self._transport = Transport(found, server, Credential(token), settings)
        self._outbox: Outbox | None = None
        if policy == "queue":
            from louver.edge.outbox import Outbox

            self._outbox = Outbox(found, settings)
        self._slots = threading.BoundedSemaphore(settings.most_in_flight)
        self._flushing = threading.Lock()
        self._guard = threading.Lock()
        self._senders: ThreadPoolExecutor | None = None
        self._background: threading.Thread | None = None
        self._closing = threading.Event()

    def __repr__(self) -> str:
        what = f"{self.bundle.name} {self.bundle.id}"
        return f"Edge({what}, server={str(self._transport.address)!r}, policy={self.policy!r})"

    def __enter__(self) -> Edge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way, sends nothing more, and lets go of the queue, which keeps what waits."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._transport.close()
        if self._background is not None and self._background is not threading.current_thread():
            self._background.join()
        if self._senders is not None:
            self._senders.shutdown(wait=True, cancel_futures=True)
        if self._outbox is not None:
            # What another thread asked for may still have to be kept. Not for ever: an interruption can lose a slot.
            until = time.monotonic() + self.settings.read_timeout_s
            for _ in range(self.settings.most_in_flight):
                self._slots.acquire(timeout=max(until - time.monotonic(), 0))
            self._outbox.close()

    @property
    def n_waiting(self) -> int:
        """How many requests wait on disk."""
        return 0 if self._outbox is None else len(self._outbox)

    def infer(self, images: NDArray[np.float32]) -> Answer:
        """The answer for images, float32 [n, c, h, w] in [0,1], of the shape that the bundle takes.

        Raises:
            DataError: other images; nothing was sent.
            BusyError: too much is under way, or the queue is full.
            CloudAwayError: under policy "fail", the cloud was not reached, or was too slow or busy.
            CloudRefusedError: the cloud said no, or is not to be trusted; under any policy.
            AnswerError: what the cloud sent is no answer; under any policy.
            StorageError: under policy "queue", the disk refused to keep the feature.
        """
        images = checked_images(images, self.bundle.serving.image_shape)
        with self._slot():
            prepared = self._prepare(images)
            try:
                return self._finish(prepared)
            finally:
                self._leave(prepared)

    def infer_many(self, batches: Iterable[NDArray[np.float32]]) -> Generator[Answer]:
        """The answers for many calls of `infer`, in order, each as soon as it is there.

        `batches` is read, and features are computed, in a thread of its own: it may be endless, and its next images may
        be long in coming. At most `most_in_flight` batches are under way, and one more is read. The first error, also
        one of `batches`, ends it, once what came before it is answered. Closed early, it reads no more.
        """
        under_way: SimpleQueue[Future[Answer] | None] = SimpleQueue()
        room = threading.Semaphore(self.settings.most_in_flight)
        is_given_up = threading.Event()

        def read() -> None:
            try:
                for batch in batches:
                    images = checked_images(batch, self.bundle.serving.image_shape)
                    room.acquire()
                    if is_given_up.is_set():
                        return
                    under_way.put(self._submit(images))
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the answers are taken
                under_way.put(_failed(error))
            else:
                under_way.put(None)

        reader = threading.Thread(target=read, name="louver-source", daemon=True)
        reader.start()
        try:
            while (future := under_way.get()) is not None:
                yield future.result()
                room.release()
        finally:
            is_given_up.set()
            room.release()
            # So that a camera is let go before its process ends; but one that gives nothing more holds nobody up.
            reader.join(_PARTING_S)

    def flush(self, sink: Callable[[Delivery], object]) -> Flushed:
        """Sends what waits on disk, oldest first, and hands each answer to `sink`; ends early if the cloud is away.

        An entry is deleted when `sink` has returned, so an answer is never lost. If the process dies between the two,
        the same request is answered again after it starts again: its `request_id` is the same, which tells.

        Raises:
            ConfigError: the policy is not "queue".
            CloudRefusedError: the cloud said no; everything is kept. `discard` gives up a request that bars the way.
            AnswerError: what the cloud sent is no answer; everything is kept.
            StorageError: the disk refused.
        """
        outbox = self._queue()
        n_delivered, damaged = 0, []
        with self._flushing:
            for place in outbox.places():
                try:
                    request = outbox.get(place)
                except DamagedError as error:
                    damaged.append(outbox.set_aside(place))
                    _log.warning("%s; set aside as %s", error, damaged[-1].name)
                    continue
                try:
                    with self._slot():
                        scores, _ = self._transport.ask(request)
                except CloudAwayError as error:
                    _log.info("what waits is kept: %s", error)
                    break
                except (CloudRefusedError, AnswerError) as error:
                    raise type(error)(
                        f"{error}; request {request.id} waits before all others and is kept: mend that, or give the "
                        f"request up by --discard {request.id} (in Python: edge.discard)"
                    ) from error
                sink(Delivery(request_id=request.id, scores=scores, labels=self._labels(scores)))
                outbox.remove(place)
                n_delivered += 1
        return Flushed(n_delivered=n_delivered, n_waiting=len(outbox), damaged=tuple(damaged))

    def send_in_background(self, sink: Callable[[Delivery], object], *, every_s: float = 5.0) -> None:
        """Calls `flush` in a thread of its own, every `every_s` while something waits, until `close`.

        What the cloud refuses is logged and tried again; an error of `sink` ends the thread, and its entry is kept.

        Raises:
            ConfigError: the policy is not "queue", or it is being sent already.
        """
        self._queue()
        with self._guard:
            if self._background is not None and self._background.is_alive():
                raise ConfigError("send_in_background: expected one call, got another; one sink takes all")
            self._background = threading.Thread(
                target=self._send_until_closed, args=(sink, every_s), name="louver-queue", daemon=True
            )
            self._background.start()

    def discard(self, request_id: str) -> bool:
        """Gives up a request that waits on disk; whether there was one."""
        outbox = self._queue()
        with self._flushing:
            for place in outbox.places():
                try:
                    is_it = outbox.get(place).id == request_id
                except DamagedError:
                    continue  # `flush` sets it aside
                if is_it:
                    outbox.remove(place)
                    return True
        return False

    def _queue(self) -> Outbox:
        if self._outbox is None:
            raise ConfigError(f'policy: expected "queue", got {self.policy!r}; only then something waits on disk')
        return self._outbox

    def _send_until_closed(self, sink: Callable[[Delivery], object], every_s: float) -> None:
        while not self._closing.is_set():
            if self.n_waiting and not self._transport.breaker.ready_in_s:
                try:
                    self.flush(sink)
                except LouverError as error:
                    if not self._closing.is_set():
                        _log.warning("what waits is kept: %s", error)
            self._closing.wait(every_s)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        self._take_slot()
        try:
            yield
        finally:
            self._slots.release()

    def _take_slot(self, *, is_patient: bool = False) -> None:
        while True:
            if self._closing.is_set():
                raise ConfigError("this edge is closed; open another")
            if self._slots.acquire(timeout=self.settings.slot_timeout_s):
                return
            if not is_patient:
                raise BusyError(
                    f"expected at most {self.settings.most_in_flight} requests in flight, got one more for "
                    f"{self.settings.slot_timeout_s:g} s; send less, or raise most_in_flight"
                )

    def _submit(self, images: NDArray[np.float32]) -> Future[Answer]:
        """Computes the feature here and sends it in another thread; the slot is free when that ends."""
        with self._guard:
            if self._senders is None:
                self._senders = ThreadPoolExecutor(self.settings.most_in_flight, thread_name_prefix="louver-edge")
        # What waits is sent beside it: a source is slowed by that, and not ended.
        self._take_slot(is_patient=True)
        try:
            prepared = self._prepare(images)
        except BaseException:
            self._slots.release()
            raise

        def end(_: object = None) -> None:
            self._leave(prepared)
            self._slots.release()

        try:
            future = self._senders.submit(self._finish, prepared)
        except BaseException:
            end()
            raise
        future.add_done_callback(end)
        return future

    def _prepare(self, images: NDArray[np.float32]) -> _Prepared:
        started = time.perf_counter()
        feature = self._edge(images)
        request = request_of(self.bundle, feature, self.settings)
        edge_ms = 1e3 * (time.perf_counter() - started)
        place = 0 if self._outbox is None else self._outbox.take_place()
        return _Prepared(request=request, feature=feature, edge_ms=edge_ms, place=place)

    def _leave(self, prepared: _Prepared) -> None:
        if self._outbox is not None:
            self._outbox.leave(prepared.place)

    def _finish(self, prepared: _Prepared) -> Answer:
        started = time.perf_counter()
        request = prepared.request
        scores: NDArray[np.float32] | None
        source: Literal["cloud", "local", "queue"] = "cloud"
        try:
            scores, tries = self._transport.ask(request)
        except CloudAwayError:
            if self._outbox is not None:
                self._outbox.put(request, prepared.place)
                source, scores, tries = "queue", None, 0
            elif self._head is not None:
                source, scores, tries = "local", self._head(prepared.feature), 0
            else:
                raise
        return Answer(
            request_id=request.id,
            source=source,
            scores=scores,
            labels=None if scores is None else self._labels(scores),
            edge_ms=prepared.edge_ms,
            wire_ms=1e3 * (time.perf_counter() - started),
            sent_bytes=len(request.body),
            tries=tries,
        )

    def _labels(self, scores: NDArray[np.float32]) -> tuple[str, ...] | None:
        labels = self.bundle.serving.labels
        return tuple(labels[i] for i in scores.argmax(axis=1)) if labels else None


def _failed(error: BaseException) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_exception(error)
    return future
