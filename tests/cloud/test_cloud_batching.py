"""The batcher alone, with networks that are functions."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from contextlib import closing

import numpy as np
import pytest

from louver.cloud.batching import Batcher, Workers
from louver.cloud.refusals import Refusal
from louver.cloud.settings import Batching
from louver.errors import ConfigError


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def double(feature: np.ndarray) -> np.ndarray:
    return 2 * feature


class Gate:
    """A network that waits until it is let go, and remembers what it was given."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[float]] = []

    def __call__(self, feature: np.ndarray) -> np.ndarray:
        self.batches.append(feature[:, 0].tolist())
        assert self.open.wait(10)
        return 2 * feature


def run(work, network=double, **options):
    """Runs `await work(batcher)` with a batcher over `network`."""
    batching = Batching(**{"workers": 1, "threads": 1, **options})

    async def main():
        with closing(Workers(batching.workers)) as workers:
            return await asyncio.wait_for(work(Batcher(network, workers, batching)), 10)

    return asyncio.run(main())


def test_each_gets_its_own_rows():
    async def work(batcher):
        return await asyncio.gather(*(batcher.submit(rows(*range(i, 2 * i + 1))) for i in range(1, 20)))

    for i, found in enumerate(run(work, max_rows=7), 1):
        assert found[:, 0].tolist() == [2 * value for value in range(i, 2 * i + 1)]


def test_what_waits_goes_together_up_to_the_largest_batch():
    gate = Gate()

    async def work(batcher):
        first = batcher.submit(rows(1))
        await asyncio.sleep(0.02)  # the only worker has it
        rest = [batcher.submit(rows(*[value] * size)) for value, size in ((2, 2), (3, 1), (4, 2), (5, 9), (6, 1))]
        gate.open.set()
        await asyncio.gather(first, *rest)

    run(work, gate, max_rows=4)
    # Five rows would be too many; nine by themselves are one request, and are not split.
    assert gate.batches == [[1], [2, 2, 3], [4, 4], [5] * 9, [6]]


def test_requests_of_the_same_moment_are_one_batch():
    seen = []

    async def work(batcher):
        await asyncio.gather(*(batcher.submit(rows(value)) for value in range(5)))

    run(work, lambda feature: seen.append(len(feature)) or feature)
    assert seen == [5]


def test_a_delay_waits_for_more_and_ends():
    seen = []

    async def work(batcher):
        started = time.monotonic()
        futures = []
        for value in range(3):
            futures.append(batcher.submit(rows(value)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*futures)
        waited = time.monotonic() - started
        await asyncio.gather(*(batcher.submit(rows(value)) for value in range(8)))  # full: no reason to wait
        return waited, time.monotonic() - started - waited

    waited, full = run(work, lambda feature: seen.append(len(feature)) or feature, max_delay_s=0.3, max_rows=8)
    assert seen == [3, 8]
    assert 0.29 < waited < 2
    assert full < 0.25


def test_a_full_queue_refuses_and_says_when_to_come_again():
    gate = Gate()

    async def work(batcher):
        futures = [batcher.submit(rows(0))]
        await asyncio.sleep(0.02)
        futures += [batcher.submit(rows(value)) for value in (1, 2, 3)]
        with pytest.raises(Refusal) as refused:
            batcher.submit(rows(4))
        futures[2].cancel()
        futures.append(batcher.submit(rows(5)))  # who has left makes room
        gate.open.set()
        found = await asyncio.gather(*futures, return_exceptions=True)
        return refused.value, found

    refused, found = run(work, gate, queue=3)
    assert refused.status == 503
    assert refused.retry_after_s > 0
    assert isinstance(found[2], asyncio.CancelledError)
    assert gate.batches == [[0], [1, 3, 5]]


def test_who_has_left_is_not_computed():
    gate = Gate()

    async def work(batcher):
        first = batcher.submit(rows(1))
        await asyncio.sleep(0.02)
        gone = [batcher.submit(rows(value)) for value in (2, 3)]
        last = batcher.submit(rows(4))
        for one in gone:
            one.cancel()
        first.cancel()  # is running: computed for nobody
        gate.open.set()
        return (await last)[0, 0]

    assert run(work, gate) == 8
    assert gate.batches == [[1], [4]]


@pytest.mark.parametrize("left_at", ["queued", "called", "full"])
def test_who_leaves_the_queue_takes_the_feature_along(left_at):
    """Nothing is collected: a feature that lives on in a cycle may live for long."""
    gate = Gate()

    async def work(batcher):
        first = batcher.submit(rows(1))
        await asyncio.sleep(0.02)  # the only worker has it
        made = [rows(*[value] * size) for value, size in ((2, 3), (3, 2), (4, 7), (5, 1), (6, 2), (7, 1), (8, 1))]
        alive = [weakref.ref(one) for one in made]
        futures = [batcher.submit(one) for one in made]
        del made
        gone, kept = [futures[i] for i in (0, 2, 5)], [futures[i] for i in (1, 3, 4, 6)]
        if left_at == "called":  # the next batch is taken in the same turn of the loop
            batcher._running -= 1
            batcher._wake(asyncio.get_running_loop())
            batcher._running += 1
        for one in gone:
            one.cancel()
        if left_at == "full":  # the queue is looked through before anybody else hears of it
            assert batcher.submit(rows(9, 9)).cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert [one() is not None for one in alive] == [False, True, False, True, True, False, True]
        assert batcher._rows == (0 if left_at == "called" else 6)
        assert len(batcher) == (0 if left_at == "called" else 4)
        gate.open.set()
        found = [one[:, 0].tolist() for one in await asyncio.gather(first, *kept)]
        await asyncio.sleep(0)
        assert batcher._rows == len(batcher) == 0
        return found

    gc.disable()
    try:
        found = run(work, gate, max_rows=6, queue=7)
    finally:
        gc.enable()
    assert found == [[2], [6, 6], [10], [12, 12], [16]]
    assert gate.batches == [[1], [3, 3, 5, 6, 6, 8]]


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, SystemExit])
def test_an_error_reaches_only_its_own_request(kind):
    def network(feature):
        if (feature == 13).any():
            raise kind("13")
        return 2 * feature

    async def work(batcher):
        first = await asyncio.gather(
            *(batcher.submit(rows(value)) for value in (11, 12, 13, 14)), return_exceptions=True
        )
        return first, await batcher.submit(rows(15))

    first, after = run(work, network)
    assert [one[0, 0] for one in (first[0], first[1], first[3])] == [22, 24, 28]
    assert isinstance(first[2], Refusal)
    assert first[2].status == 500
    assert "13" not in first[2].reason
    assert after[0, 0] == 30


def test_workers_run_side_by_side():
    both = threading.Barrier(2, timeout=10)

    def network(feature):
        both.wait()
        return feature

    async def work(batcher):
        await asyncio.gather(*(batcher.submit(rows(value)) for value in (1, 2)))

    run(work, network, workers=2, max_rows=1)


def test_a_call_costs_little():
    """Some microseconds beside the thread; a hundred would be a defect."""

    async def work(batcher):
        best = 1.0
        for _ in range(5):
            started = time.process_time()
            for _ in range(20):
                await asyncio.gather(*(batcher.submit(rows(1)) for _ in range(100)))
            best = min(best, (time.process_time() - started) / 2000)
        return best

    assert run(work, max_rows=100) < 100e-6


def test_a_model_has_its_own_values_and_the_rest_of_all_others():
    batching = Batching(max_rows=9, max_delay_s=0.5, queue=7, max_rows_of={"a": 3, "b": 4}, max_delay_s_of={"b": 0})
    found = {name: batching.of(name) for name in "abc"}
    assert {name: (one.max_rows, one.max_delay_s) for name, one in found.items()} == {
        "a": (3, 0.5),
        "b": (4, 0),
        "c": (9, 0.5),
    }
    assert {(one.queue, one.workers, one.threads) for one in found.values()} == {(7, 2, batching.threads)}
    assert batching.names == {"a", "b"}


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 0},
        {"queue": 0},
        {"workers": 0},
        {"threads": 0},
        {"max_delay_s": -1},
        {"max_delay_s": 99},
        {"max_rows_of": {"a": 3, "b": 0}},
        {"max_delay_s_of": {"a": -1}},
        {"max_delay_s_of": {"a": 99}},
    ],
)
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="expected at least"):
        Batching(**options)
