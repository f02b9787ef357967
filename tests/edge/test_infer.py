"""`Edge`: the same answers as both halves run by hand, for any thread, and images that are refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bundles import FEATURE, IMAGE, N_SCORES, toy_bundle
from clouds import Cloud, answer, silent, slow, status
from louver.bundle import CLOUD, EDGE, Bundle, Noise, read_bundle
from louver.edge import Edge, Settings
from louver.edge.half import draw
from louver.errors import AnswerError, BundleError, BusyError, CloudAwayError, CloudRefusedError, ConfigError, DataError

QUICK = {"backoff_s": 0.01, "most_backoff_s": 0.02, "read_timeout_s": 5.0}


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *IMAGE), np.float32)


def by_hand(bundle: Bundle, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edge, cloud = (onnxruntime.InferenceSession(bundle.path(file)) for file in (EDGE, CLOUD))
    (feature,) = edge.run(["feature"], {"image": images})
    return feature, cloud.run(["scores"], {"feature": feature})[0]


@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
@pytest.mark.parametrize("encoding", ["uint8", "float32"])
def test_answers_are_those_of_both_halves_run_by_hand(tmp_path: Path, encoding: str, compression: str) -> None:
    bundle = toy_bundle(tmp_path, encoding=encoding)
    with (
        Cloud(bundle) as cloud,
        Edge(bundle, server=cloud.address, settings=Settings(compression=compression)) as edge,
    ):
        for n in (1, 5):
            images = pictures(n, seed=n)
            kept = images.copy()
            found = edge.infer(images)
            feature, scores = by_hand(bundle, images)
            np.testing.assert_array_equal(cloud.seen[-1].feature, feature)
            np.testing.assert_array_equal(found.scores, scores)
            np.testing.assert_array_equal(images, kept)
            assert found.labels == tuple(f"class {i}" for i in scores.argmax(1))
            assert (found.source, found.is_degraded, found.tries) == ("cloud", False, 1)
            assert found.request_id == cloud.seen[-1].id
            assert found.sent_bytes == len(cloud.seen[-1].body)
            assert found.edge_ms > 0
            assert found.wire_ms > 0
        assert cloud.seen[0].path == f"/v2/models/toy/versions/{bundle.id}/infer"
        assert cloud.seen[0].headers["accept-encoding"] == "identity"
        assert cloud.n_connections == 1  # kept open and used again


def test_a_path_does_as_well_and_an_embedding_has_no_labels(tmp_path: Path) -> None:
    import dataclasses

    from louver.bundle import write_manifest

    bundle = toy_bundle(tmp_path)
    bundle = write_manifest(tmp_path, "toy", dataclasses.replace(bundle.serving, labels=()), {})
    with Cloud(bundle) as cloud, Edge(str(tmp_path), server=cloud.address + "/") as edge:
        found = edge.infer(pictures(3))
    assert found.labels is None
    assert found.scores.shape == (3, N_SCORES)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([[0.5]], "expected images as a numpy array, got list"),
        (np.zeros((2, *IMAGE), np.uint8), "got uint8; divide by 255"),
        (np.zeros((2, *IMAGE)), "got float64; convert"),
        (np.zeros(IMAGE, np.float32), r"expected images of shape \[n, 3, 8, 10\]"),
        (np.zeros((0, *IMAGE), np.float32), r"n of 1 or more, got \[0, 3, 8, 10\]"),
        (np.zeros((2, 3, 10, 8), np.float32), r"got \[2, 3, 10, 8\]"),
        (np.full((1, *IMAGE), np.nan, np.float32), "got NaN or infinity"),
        (np.full((1, *IMAGE), np.inf, np.float32), "got NaN or infinity"),
        (np.full((1, *IMAGE), 1.01, np.float32), r"in \[0,1\], got 1.01 to 1.01"),
        (np.full((1, *IMAGE), -0.01, np.float32), r"in \[0,1\]"),
    ],
)
def test_wrong_images_are_refused_and_nothing_is_sent(cloud: Cloud, images: object, words: str) -> None:
    with Edge(cloud.bundle, server=cloud.address) as edge:
        with pytest.raises(DataError, match=words):
            edge.infer(images)
        assert cloud.seen == []
        assert edge.infer(np.asfortranarray(pictures(2))).scores.shape == (2, N_SCORES)


# Noise


def test_noise_is_new_for_each_request_and_from_the_operating_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = toy_bundle(tmp_path, has_noise=True)
    images = pictures(1)
    with Cloud(bundle) as cloud:
        for _ in range(2):
            with Edge(bundle, server=cloud.address) as edge:
                edge.infer(images)
                edge.infer(images)
        features = [seen.feature for seen in cloud.seen]
        assert len({feature.tobytes() for feature in features}) == 4
        # Of one entropy comes one noise: there is no other source.
        monkeypatch.setattr("os.urandom", bytes)
        with Edge(bundle, server=cloud.address) as edge:
            edge.infer(images)
            edge.infer(images)
        np.testing.assert_array_equal(cloud.seen[-1].feature, cloud.seen[-2].feature)


@pytest.mark.parametrize(
    ("kind", "mean", "deviation", "kurtosis"),
    [("normal", 0, 1, 3), ("laplace", 0, 1, 6), ("uniform", 0.5, 12**-0.5, 1.8)],
)
def test_noise_has_the_distribution_that_the_bundle_names(
    kind: str, mean: float, deviation: float, kurtosis: float
) -> None:
    found = draw([Noise(name="a", shape=(50, 40), kind=kind), Noise(name="b", shape=(3,), kind=kind)], 100)
    assert {name: value.shape for name, value in found.items()} == {"a": (100, 50, 40), "b": (100, 3)}
    values = found["a"].astype(np.float64)
    assert found["a"].dtype == np.float32
    assert values.mean() == pytest.approx(mean, abs=0.01)
    assert values.std() == pytest.approx(deviation, rel=0.02)
    assert ((values - values.mean()) ** 4).mean() / values.var() ** 2 == pytest.approx(kurtosis, rel=0.08)
    if kind == "uniform":
        assert values.min() >= 0
        assert values.max() < 1


# Bundles and addresses


def test_a_bundle_that_lies_is_refused(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "a")
    content = bytearray((tmp_path / "a" / EDGE).read_bytes())
    content[99] ^= 1
    (tmp_path / "a" / EDGE).write_bytes(content)
    with pytest.raises(BundleError, match="not the file that was exported"):
        Edge(bundle, server="http://127.0.0.1:1")
    with pytest.raises(BundleError, match=r"without head\.onnx"):
        Edge(toy_bundle(tmp_path / "b"), server="http://127.0.0.1:1", policy="local")
    held = read_bundle(tmp_path / "b")
    toy_bundle(tmp_path / "b", seed=3)
    with pytest.raises(BundleError, match=r"expected bundle .* read it again"):
        Edge(held, server="http://127.0.0.1:1")


@pytest.mark.parametrize("file", ["garbage", "other inputs", "other shape", "other type"])
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, file: str) -> None:
    import dataclasses

    from louver.bundle import file_hash, write_manifest

    serving = toy_bundle(tmp_path).serving
    changes = {}
    if file == "garbage":
        (tmp_path / EDGE).write_bytes(b"no graph" * 9)
    elif file == "other inputs":
        (tmp_path / EDGE).write_bytes((tmp_path / CLOUD).read_bytes())
    elif file == "other shape":
        changes["feature_shape"] = (5, *FEATURE[1:])
    else:
        changes["encoding"] = "float32"
    changes["files"] = {one: file_hash(tmp_path / one) for one in serving.files}
    bundle = write_manifest(tmp_path, "toy", dataclasses.replace(serving, **changes), {})
    words = {
        "garbage": "onnxruntime cannot load it",
        "other inputs": "expected inputs image and output feature, got feature and scores",
        "other shape": r"expected a feature of \(1, 5, 4, 5\), got \(1, 4, 4, 5\)",
        "other type": "expected FP32 features, got uint8",
    }
    with pytest.raises(BundleError, match=words[file]):  # noqa: SIM117
        with Edge(bundle, server="http://127.0.0.1:1") as edge:
            edge.infer(pictures(1))


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("cloud.example", "expected an address such as"),
        ("ftp://cloud.example", "expected an address such as"),
        ("https://", "expected an address such as"),
        ("https://cloud.example:99999", "expected an address such as"),
        ("https://cloud.example/?token=hush", "without user, password or query"),
        ("me:hush@cloud.example", "without user, password or query"),
        ("https://cloud.example:port", "mend it"),
        ("https://me:hush@cloud.example", "without user, password or query"),
        ("https://cloud.example/a b", "expected a path of letters"),
        ("http://cloud.example", "everyone on the way could read the features"),
        ("http://192.0.2.7:80", "allow it by name"),
    ],
)
def test_an_address_that_cannot_be_is_refused(bundle: Bundle, server: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Edge(bundle, server=server)
    assert "hush" not in str(caught.value)


def test_plain_http_to_another_machine_is_allowed_by_name_alone(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="the token and the features"):
        Edge(bundle, server="http://cloud.example", token="hush")
    with Edge(bundle, server="http://cloud.example", token="hush", settings=Settings(allow_plain_http=True)) as edge:
        assert "cloud.example" in repr(edge)
    for near in ("http://localhost:1", "http://127.8.9.1", "http://[::1]:8080"):
        with Edge(bundle, server=near, token="hush") as edge:
            assert near.rstrip("/") in repr(edge)


def test_an_unknown_policy_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="policy: got 'que'; nearest: queue"):
        Edge(bundle, server="http://127.0.0.1:1", policy="que")
    with Edge(bundle, server="http://127.0.0.1:1") as edge:
        with pytest.raises(ConfigError, match="expected \"queue\", got 'fail'"):
            edge.flush(print)
        with pytest.raises(ConfigError, match='expected "queue"'):
            edge.send_in_background(print)
        assert edge.n_waiting == 0


# Threads, order, back-pressure


def test_sixteen_threads_get_their_own_answers(cloud: Cloud) -> None:
    cloud.always = slow(0.01)
    with Edge(cloud.bundle, server=cloud.address, settings=Settings(most_in_flight=8)) as edge:
        images = [pictures(1 + i % 3, seed=i) for i in range(64)]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(edge.infer, images))
    for one, got in zip(images, found, strict=True):
        np.testing.assert_array_equal(got.scores, by_hand(cloud.bundle, one)[1])
    assert len({got.request_id for got in found}) == 64
    assert cloud.n_connections <= 8


def test_many_are_answered_in_order_while_the_next_is_computed(cloud: Cloud) -> None:
    waits = iter([0.2, 0.0, 0.1] + [0.0] * 20)
    guard = threading.Lock()

    def uneven(handler: object, seen: object) -> None:
        with guard:
            wait = next(waits)
        slow(wait)(handler, seen)

    cloud.always = uneven
    with Edge(cloud.bundle, server=cloud.address, settings=Settings(most_in_flight=3)) as edge:
        found = list(edge.infer_many(pictures(2, seed=i) for i in range(9)))
    assert len(found) == 9
    for i, got in enumerate(found):
        np.testing.assert_array_equal(got.scores, by_hand(cloud.bundle, pictures(2, seed=i))[1])


def test_pipelining_is_faster_than_one_after_the_other(cloud: Cloud) -> None:
    cloud.always = slow(0.2)
    with Edge(cloud.bundle, server=cloud.address, settings=Settings(most_in_flight=4)) as edge:
        started = time.monotonic()
        assert len(list(edge.infer_many(pictures(1, seed=i) for i in range(8)))) == 8
        assert time.monotonic() - started < 1.3  # one after the other takes 1.6 s


def test_an_error_comes_after_the_answers_that_came_before_it(cloud: Cloud) -> None:
    with Edge(cloud.bundle, server=cloud.address) as edge:
        found = edge.infer_many([pictures(1), pictures(2), np.zeros(IMAGE, np.float32), pictures(1)])
        assert [len(next(found).scores) for _ in range(2)] == [1, 2]
        with pytest.raises(DataError):
            next(found)
        cloud.always = lambda handler, seen: (status(400) if len(seen.feature) == 3 else answer)(handler, seen)
        found = edge.infer_many(pictures(n) for n in (2, 3, 4))
        assert next(found).scores is not None
        with pytest.raises(CloudRefusedError, match="refuses a request"):
            list(found)
        # Given up early, it leaves nothing behind that would hold up the rest.
        early = edge.infer_many(pictures(1, seed=i) for i in range(9))
        next(early)
        early.close()
        assert len(list(edge.infer_many(pictures(1, seed=i) for i in range(9)))) == 9


def test_an_answer_does_not_wait_for_the_next_picture(cloud: Cloud) -> None:
    is_triggered, gave_up, is_let_go = threading.Event(), [], threading.Event()

    def camera():
        try:
            yield pictures(1)
            if not is_triggered.wait(5):
                gave_up.append("waited for an answer")
            yield pictures(2)
            while True:
                yield pictures(3)
        finally:
            is_let_go.set()

    with Edge(cloud.bundle, server=cloud.address) as edge:
        found = edge.infer_many(camera())
        assert len(next(found).scores) == 1
        assert gave_up == []
        is_triggered.set()
        assert [len(next(found).scores) for _ in range(2)] == [2, 3]
        found.close()
        assert is_let_go.wait(5)
        assert [one.name for one in threading.enumerate() if one.name == "louver-source"] == []


def test_what_the_source_raises_comes_after_the_answers(cloud: Cloud) -> None:
    def camera():
        yield pictures(1)
        yield pictures(2)
        raise OSError("unplugged")

    cloud.always = slow(0.1)
    with Edge(cloud.bundle, server=cloud.address) as edge:
        found = edge.infer_many(camera())
        assert [len(next(found).scores) for _ in range(2)] == [1, 2]
        with pytest.raises(OSError, match="unplugged"):
            next(found)
        assert list(found) == []


def test_who_does_not_take_answers_holds_back_the_source(cloud: Cloud) -> None:
    taken: list[int] = []

    def source():
        for i in range(99):
            taken.append(i)
            yield pictures(1, seed=i)

    with Edge(cloud.bundle, server=cloud.address, settings=Settings(most_in_flight=2)) as edge:
        found = edge.infer_many(source())
        for n_given in range(1, 4):
            next(found)
            while len(cloud.seen) <= n_given or len(taken) <= n_given + 1:
                time.sleep(0.005)
            time.sleep(0.05)  # in which there could be more
            assert len(cloud.seen) == n_given + 1
            assert len(taken) == n_given + 2
        found.close()
        assert len(taken) == 5


def run_alone(code: str, folder: Path, bundle: Bundle, *, within_s: float) -> subprocess.CompletedProcess[str]:
    """What a process of its own does with the folder of a bundle and the address of a cloud."""
    with Cloud(bundle) as cloud:
        command = [sys.executable, "-c", code, str(folder), cloud.address]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=within_s)


def test_a_source_that_blocks_for_ever_keeps_no_process_alive(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path)
    code = (
        "import sys, threading, numpy as np\n"
        "from louver.edge import Edge\n"
        "def source():\n"
        f"    yield np.zeros((1, *{IMAGE}), np.float32)\n"
        "    threading.Event().wait()\n"
        "with Edge(sys.argv[1], server=sys.argv[2]) as edge:\n"
        "    for answer in edge.infer_many(source()):\n"
        "        print(answer.source)\n"
        "        break\n"
    )
    done = run_alone(code, tmp_path, bundle, within_s=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cloud\n", "")


def test_one_more_than_the_bound_waits_and_is_then_refused(cloud: Cloud) -> None:
    cloud.always = slow(0.5)
    settings = Settings(most_in_flight=1, slot_timeout_s=0.1)
    with Edge(cloud.bundle, server=cloud.address, settings=settings) as edge, ThreadPoolExecutor(1) as pool:
        first = pool.submit(edge.infer, pictures(1))
        while not cloud.seen:
            time.sleep(0.005)
        with pytest.raises(BusyError, match=r"expected at most 1 requests in flight, got one more for 0\.1 s"):
            edge.infer(pictures(1))
        assert first.result().scores is not None
        assert len(cloud.seen) == 1
        assert edge.infer(pictures(1)).scores is not None
        first = pool.submit(edge.infer, pictures(1))
        while len(cloud.seen) < 3:
            time.sleep(0.005)
        assert len(list(edge.infer_many([pictures(1)]))) == 1  # a source is slowed instead
        assert first.result().scores is not None


# When the cloud is away


def test_fail_raises_and_local_answers_with_the_head(cloud: Cloud) -> None:
    images = pictures(2)
    settings = Settings(tries=2, breaker_failures=2, breaker_pause_s=0.2, **QUICK)
    with (
        Edge(cloud.bundle, server=cloud.address, settings=settings) as strict,
        Edge(cloud.bundle, server=cloud.address, policy="local", settings=settings) as tolerant,
    ):
        assert not tolerant.infer(images).is_degraded
        cloud.always = status(503)
        with pytest.raises(CloudAwayError, match="HTTP 503: told to"):
            strict.infer(images)
        found = tolerant.infer(images)
        assert (found.source, found.is_degraded, found.tries) == ("local", True, 0)
        np.testing.assert_array_equal(found.scores, by_hand(cloud.bundle, images)[1])  # the toy's head is its cloud
        n_seen = len(cloud.seen)
        assert tolerant.infer(images).is_degraded
        assert len(cloud.seen) == n_seen  # the breaker is open
        cloud.always = answer
        time.sleep(0.25)
        assert tolerant.infer(images).source == "cloud"


def test_a_broken_answer_is_an_error_under_every_policy(cloud: Cloud) -> None:
    from clouds import raw

    cloud.always = raw(b"garbage")
    with Edge(cloud.bundle, server=cloud.address, policy="local") as edge, pytest.raises(AnswerError):
        edge.infer(pictures(1))


def test_a_closed_edge_says_so_and_waits_for_nothing(cloud: Cloud) -> None:
    cloud.always = silent(0.5)
    edge = Edge(cloud.bundle, server=cloud.address, settings=Settings(read_timeout_s=0.2, backoff_s=20, tries=3))
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(edge.infer, pictures(1))
        while not cloud.seen:
            time.sleep(0.005)
        started = time.monotonic()
        edge.close()
        assert time.monotonic() - started < 5
        with pytest.raises(CloudAwayError):
            under_way.result()
    with pytest.raises(ConfigError, match="closed"):
        edge.infer(pictures(1))


# What it stands on


def test_a_device_needs_neither_torch_nor_the_lab(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path, has_noise=True)
    code = (
        "import sys, numpy as np\n"
        "from louver.edge import Edge\n"
        "with Edge(sys.argv[1], server=sys.argv[2]) as edge:\n"
        f"    assert edge.infer(np.full((1, *{IMAGE}), 0.5, np.float32)).scores.shape == (1, {N_SCORES})\n"
        "heavy = {'torch', 'torchvision', 'timm', 'onnx', 'jaxtyping', 'pydantic', 'scipy', 'PIL', 'cv2',\n"
        "         'cryptography', 'typer', 'rich', 'pandas', 'requests', 'ray'}\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('louver.')}\n"
        "print(sorted(heavy & set(sys.modules)), sorted(ours))\n"
    )
    done = run_alone(code, tmp_path, bundle, within_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] ['bundle', 'edge', 'errors', 'graph_errors', 'storage', 'triton']"
