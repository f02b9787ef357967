"""Batches out of requests: a queue for each model, and threads that run the network for all of them.

Everything but the run itself happens on the event loop, so there is no lock. A request costs one future and one place
in a deque. Where one request is alone and its network quick, the run happens there too: the way to a thread and back
would take longer than the network.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from louver.cloud.refusals import Refusal
from louver.cloud.settings import Batching

__all__ = ["Batcher", "Run", "Timed", "Workers"]

Run = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Rows of features in, as many rows of scores out; called in a thread, or on the event loop where it is very short."""

Timed = Callable[[float, float], None]
"""Told the seconds that a request waited for its run, and those that the run took."""

_BUSY_S = 1.0
_SHORT_S = 100e-6
"""What a run may hold up the event loop on average: about what the way to a thread and back takes."""

_FIRST_DEBT_S = 20 * _SHORT_S
_MOST_DEBT_S = 10.0
_log = logging.getLogger("louver.cloud")
_NO_ROWS: NDArray[Any] = np.empty(0, np.uint8)


@dataclass(slots=True, eq=False)
class _Waiting:
    feature: NDArray[Any]
    future: asyncio.Future[NDArray[np.float32]]
    since: float
    timed: Timed | None = None
    came: float = 0.0
    is_queued: bool = True


class _Outcome:
    """What a run gave: scores, or whatever it raised, which is for those who wait and not for the thread."""

    scores: NDArray[np.float32]
    error: BaseException | None = None
    begun = 0.0
    seconds = 0.0

    def __enter__(self) -> _Outcome:
        self.begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.seconds = time.perf_counter() - self.begun
        self.error = error
        return True


class _Pace:
    """Whether a run of one image is so short that a thread is not worth the way there, by the times that were seen.

    An account: each run takes its seconds from it and brings in `_SHORT_S`, and only a model that owes nothing may hold
    up the event loop. So every model begins in threads, a slow one stays there, and one that turns slow once goes back
    there until as many quick runs have made up for it.
    """

    def __init__(self) -> None:
        self._debt_s = _FIRST_DEBT_S

    @property
    def is_short(self) -> bool:
        return self._debt_s == 0

    def saw(self, seconds: float) -> None:
        self._debt_s = min(_MOST_DEBT_S, max(0.0, self._debt_s + seconds - _SHORT_S))


class Workers:
    """Threads that do jobs in the order in which they come. An executor's futures would cost twice the way there."""

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"louver-run-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Has a job done, which must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        """Waits for all jobs, and ends the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Batcher:
    """Runs what waits for one model, together where that is possible.

    `workers` are shared by all models; `told` is given the rows of each batch. Whoever waits may be cancelled: a
    request that is not yet running is dropped with its feature, and one that is running is computed for nobody. So of
    those who have left no more is in memory than what is running: for each model `workers` times a batch, or a request
    that is larger than that.
    """

    def __init__(
        self, run: Run, workers: Workers, batching: Batching, *, told: Callable[[int], None] | None = None
    ) -> None:
        self._network = run
        self._workers = workers
        self._batching = batching
        self._told = told or (lambda rows: None)
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._running = 0
        self._pace = _Pace()
        self._is_called = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that wait for a run. A place whose client has left is none, though it is still there."""
        return sum(not one.future.done() for one in self._queue)

    def submit(
        self, feature: NDArray[Any], *, is_alone: bool = False, timed: Timed | None = None
    ) -> asyncio.Future[NDArray[np.float32]]:
        """A future of the scores of these rows, in the running event loop.

        timed: is called when the run is over. is_alone: nobody else is there who would be held up, or could come into
        the same batch. Then one image is run here and now if its model is known to be quick, and the future is done.

        Raises:
            Refusal: 503, when as many requests wait as may wait.
        """
        if len(self._queue) >= self._batching.queue:
            self._forget()
            if len(self._queue) >= self._batching.queue:
                raise Refusal(503, f"{len(self._queue)} requests wait already", retry_after_s=_BUSY_S)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        is_free = not (self._queue or self._running or self._batching.max_delay_s)
        if is_alone and is_free and len(feature) == 1 and self._pace.is_short:
            self._run_here(feature, future, timed)
            return future
        came = time.perf_counter() if timed is not None else 0.0
        one = _Waiting(feature, future, loop.time(), timed, came)
        future.add_done_callback(partial(self._on_done, one))
        self._queue.append(one)
        self._rows += len(feature)
        self._wake(loop)
        return future

    def _run_here(
        self, feature: NDArray[Any], future: asyncio.Future[NDArray[np.float32]], timed: Timed | None
    ) -> None:
        self._told(1)
        outcome = self._outcome([feature])
        self._pace.saw(outcome.seconds)
        if timed is not None:
            timed(0.0, outcome.seconds)
        if outcome.error is None:
            future.set_result(outcome.scores)
        else:
            future.set_exception(_failed(outcome.error))

    def _on_done(self, one: _Waiting, future: asyncio.Future[NDArray[np.float32]]) -> None:
        if one.is_queued:  # its client has left
            self._let_go(one)

    def _let_go(self, one: _Waiting) -> None:
        """Takes the feature out of the queue at once; the place, which costs little, goes when it is reached.

        What a request holds is given back when its client leaves: kept here, features of the gone could be any number.
        Once more it does nothing.
        """
        self._rows -= len(one.feature)
        one.feature = _NO_ROWS

    def _forget(self) -> None:
        """Drops from the queue what nobody waits for anymore."""
        for one in self._queue:
            if one.future.done():
                self._let_go(one)
        self._queue = deque(one for one in self._queue if not one.future.done())

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sees to it that what waits is run when it is due and a worker is free."""
        if self._is_called or not self._queue or self._running >= self._batching.workers:
            return
        due = self._queue[0].since + self._batching.max_delay_s
        if self._rows >= self._batching.max_rows or due <= loop.time():
            # Not at once: requests that came in the same turn of the loop are then in the same batch.
            self._is_called = True
            loop.call_soon(self._dispatch, loop)
        elif self._timer is None:
            self._timer = loop.call_at(due, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._wake(loop)

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_called = False
        batch = self._take()
        if batch:
            self._start(loop, batch)
        self._wake(loop)

    def _take(self) -> list[_Waiting]:
        """The next of the queue, up to the largest batch; one that is larger by itself goes alone."""
        batch: list[_Waiting] = []
        rows = 0
        while self._queue:
            one = self._queue[0]
            if one.future.done():
                self._let_go(one)
            elif batch and rows + len(one.feature) > self._batching.max_rows:
                break
            else:
                batch.append(one)
                rows += len(one.feature)
                self._rows -= len(one.feature)
                one.is_queued = False
            self._queue.popleft()
        return batch

    def _start(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        self._running += 1
        features = [one.feature for one in batch]
        self._told(sum(map(len, features)))

        def job() -> None:
            loop.call_soon_threadsafe(self._deliver, loop, batch, self._outcome(features))

        self._workers.submit(job)

    def _outcome(self, features: list[NDArray[Any]]) -> _Outcome:
        with _Outcome() as outcome:
            outcome.scores = self._network(features[0] if len(features) == 1 else np.concatenate(features))
        return outcome

    def _deliver(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting], outcome: _Outcome) -> None:
        self._running -= 1
        if len(batch) == 1 and len(batch[0].feature) == 1:
            self._pace.saw(outcome.seconds)
        for one in batch:
            if one.timed is not None:
                one.timed(outcome.begun - one.came, outcome.seconds)
        if outcome.error is not None:
            self._fail(loop, batch, outcome.error)
        else:
            start = 0
            for one in batch:
                stop = start + len(one.feature)
                if not one.future.done():
                    one.future.set_result(outcome.scores[start:stop])
                start = stop
        self._wake(loop)

    def _fail(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting], error: BaseException) -> None:
        """Of a batch, each request is tried alone: an error reaches only the request that causes it."""
        if len(batch) == 1:
            refusal = _failed(error)
            if not batch[0].future.done():
                batch[0].future.set_exception(refusal)
            return
        for one in batch:
            if not one.future.done():
                self._start(loop, [one])


def _failed(error: BaseException) -> Refusal:
    """What the client is told of a failed run. The error's message may hold values of the feature: nobody gets it."""
    _log.error("a run failed", extra={"error": type(error).__name__})
    return Refusal(500, "the network failed on this request")
