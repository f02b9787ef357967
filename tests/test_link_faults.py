"""The real client and the real server over a bad link: nothing is lost, nothing is answered twice or wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bundles import IMAGE, toy_bundle
from links import link
from louver.bundle import EDGE, Bundle
from louver.edge import Delivery, Edge, Settings
from louver.errors import CloudAwayError
from servers import Running, running, truth


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("bundles") / "b", has_head=True)


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("logs") / "log", bundle.folder) as one:
        yield one


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *IMAGE), np.float32)


def expected(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    (sent,) = onnxruntime.InferenceSession(bundle.path(EDGE)).run(["feature"], {"image": images})
    return truth(bundle, sent)


def test_five_percent_lost_and_two_hundred_milliseconds(bundle: Bundle, server: Running) -> None:
    images = pictures(24)
    scores = expected(bundle, images)
    with link(server.port, delay_s=0.1, loss=0.05) as bad, Edge(bundle, server=bad.address) as edge:
        started = time.monotonic()
        answers = list(edge.infer_many(images[i : i + 1] for i in range(24)))
        seconds = time.monotonic() - started
        assert bad.n_connections <= 4, "connections are reused"
    np.testing.assert_allclose(np.concatenate([one.scores for one in answers]), scores, rtol=1e-5, atol=1e-5)
    assert len({one.request_id for one in answers}) == 24
    assert seconds < 24 * 0.4, "requests are under way together"


def test_cut_for_ten_seconds_the_queue_keeps_everything_in_order(
    bundle: Bundle, server: Running, tmp_path: Path
) -> None:
    images = pictures(12, seed=1)
    scores = expected(bundle, images)
    settings = Settings(
        queue_folder=tmp_path / "queue",
        read_timeout_s=0.5,
        connect_timeout_s=0.5,
        deadline_s=1.0,
        backoff_s=0.05,
        breaker_failures=3,
        breaker_pause_s=0.5,
    )
    delivered: list[Delivery] = []
    with (
        link(server.port, delay_s=0.01) as bad,
        Edge(bundle, server=bad.address, policy="queue", settings=settings) as edge,
    ):
        first = edge.infer(images[:1])
        assert first.source == "cloud"
        healer = threading.Timer(10.0, lambda: setattr(bad, "is_cut", False))
        bad.is_cut = True
        healer.start()
        waiting = [edge.infer(images[i : i + 1]) for i in range(1, 12)]
        assert {one.source for one in waiting} == {"queue"}
        edge.send_in_background(delivered.append, every_s=0.2)
        until = time.monotonic() + 40
        while edge.n_waiting and time.monotonic() < until:
            time.sleep(0.1)
        healer.join()
        after = edge.infer(images[:1])
        assert after.source == "cloud", "the breaker has closed"
    assert [one.request_id for one in delivered] == [one.request_id for one in waiting]
    np.testing.assert_allclose(np.concatenate([one.scores for one in delivered]), scores[1:], rtol=1e-5, atol=1e-5)


def test_cut_under_the_other_policies(bundle: Bundle, server: Running) -> None:
    quick = Settings(read_timeout_s=0.3, connect_timeout_s=0.3, deadline_s=0.8, backoff_s=0.05)
    with link(server.port) as bad:
        bad.is_cut = True
        with Edge(bundle, server=bad.address, settings=quick) as edge:
            started = time.monotonic()
            with pytest.raises(CloudAwayError):
                edge.infer(pictures(1))
            assert time.monotonic() - started < 5, "the deadline holds"
        with Edge(bundle, server=bad.address, policy="local", settings=quick) as edge:
            answer = edge.infer(pictures(1))
        assert answer.is_degraded
        assert answer.scores is not None
