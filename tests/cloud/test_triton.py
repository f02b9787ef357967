"""Triton: the model repository that we write, and that our server answers its clients as the real one does.

What asks a Triton server needs one: LOUVER_TRITON names an environment that holds the wheel nvidia-pytriton, made as
CONTRIBUTING.md tells. What can be asked of our server alone is asked everywhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from bundles import IMAGE, toy_bundle
from louver.bundle import CLOUD, Bundle
from louver.edge import Edge, Settings
from louver.errors import BundleError, ConfigError
from louver.triton import triton_name, write_triton
from servers import features, running, truth
from tritons import triton_running

ENVIRONMENT = os.environ.get("LOUVER_TRITON")
needs_triton = pytest.mark.skipif(
    ENVIRONMENT is None, reason="needs a Triton server: LOUVER_TRITON names its environment"
)


def test_the_repository_says_what_the_bundle_is(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "b")
    model = write_triton(bundle, tmp_path / "models", max_batch=7, max_delay_us=90)
    assert model.name == triton_name(bundle) == f"toy-{bundle.id}"
    assert (model / "1" / "model.onnx").read_bytes() == bundle.path(CLOUD).read_bytes()
    text = (model / "config.pbtxt").read_text()
    for line in (
        "max_batch_size: 7",
        "TYPE_UINT8 dims: [ 4, 4, 5 ]",
        "TYPE_FP32 dims: [ 7 ]",
        "microseconds: 90",
        bundle.id,
    ):
        assert line in text
    assert 'label_filename: "labels.txt"' in text
    assert (model / "labels.txt").read_text().split("\n") == list(bundle.serving.labels)
    assert (
        "TYPE_FP32 dims: [ 4, 4, 5 ]"
        in (
            write_triton(toy_bundle(tmp_path / "f", encoding="float32"), tmp_path / "models") / "config.pbtxt"
        ).read_text()
    )


def test_what_is_there_is_not_overwritten_and_nothing_is_left_half(tmp_path: Path, monkeypatch) -> None:
    bundle = toy_bundle(tmp_path / "b")
    with pytest.raises(ConfigError, match="batch of 1 or more"):
        write_triton(bundle, tmp_path / "models", max_batch=0)

    def full(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("louver.triton.write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_triton(bundle, tmp_path / "models")
    assert not list((tmp_path / "models").glob("*"))
    write_triton(bundle, tmp_path / "models")
    with pytest.raises(ConfigError, match="is there already"):
        write_triton(bundle, tmp_path / "models")
    (bundle.folder / CLOUD).unlink()
    with pytest.raises((BundleError, FileNotFoundError)):
        write_triton(bundle, tmp_path / "others")


def test_triton_is_sent_no_zstd() -> None:
    with pytest.raises(ConfigError, match="gzip or none for Triton"):
        Settings(is_triton=True)
    assert Settings(is_triton=True, compression="gzip").is_triton


# Beside the real one


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("bundles") / "b")


@pytest.fixture(scope="module")
def triton(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Ports of a Triton server with the bundle's cloud half: (REST, gRPC)."""
    with triton_running(Path(ENVIRONMENT or ""), bundle, tmp_path_factory.mktemp("triton")) as ports:
        yield ports


def _tensors(kind: str, feature: np.ndarray, *, is_binary: bool = True, classes: int = 0) -> dict[str, list[Any]]:
    """What is sent and what is asked for, as the client of this protocol wants it."""
    module, binary = {"http": (tritonclient.http, {"binary_data": is_binary}), "grpc": (tritonclient.grpc, {})}[kind]
    tensor = module.InferInput("feature", list(feature.shape), "UINT8")
    tensor.set_data_from_numpy(feature, **binary)
    return {"inputs": [tensor], "outputs": [module.InferRequestedOutput("scores", class_count=classes, **binary)]}


def _ask(module, client, feature: np.ndarray, model: str, version: str, *, is_binary: bool, zipped: str | None):
    is_rest = module is tritonclient.http
    tensors = _tensors("http" if is_rest else "grpc", feature, is_binary=is_binary)
    packed = {"request_compression_algorithm": zipped} if is_rest else {"compression_algorithm": zipped}
    return client.infer(model, **tensors, model_version=version, request_id="7", **packed)


@needs_triton
@pytest.mark.parametrize("zipped", [None, "gzip", "deflate"])
@pytest.mark.parametrize(("kind", "is_binary"), [("http", True), ("http", False), ("grpc", True)])
def test_both_answer_triton_s_clients_alike(bundle, triton, tmp_path, kind, is_binary, zipped) -> None:
    module = tritonclient.http if kind == "http" else tritonclient.grpc
    feature = features(5, seed=3)
    expected = truth(bundle, feature)
    with running(tmp_path / "log", bundle.folder) as ours:
        seen = []
        places = [
            ((ours.port, int(ours.told["grpc"].rpartition(":")[2])), bundle.name, bundle.id),
            (triton, triton_name(bundle), "1"),
        ]
        for ports, model, version in places:
            client = module.InferenceServerClient(f"127.0.0.1:{ports[0 if kind == 'http' else 1]}")
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready(model, version)
            assert not client.is_model_ready("nobody")
            metadata = client.get_model_metadata(model, version, **({} if kind == "http" else {"as_json": True}))
            server = client.get_server_metadata(**({} if kind == "http" else {"as_json": True}))
            answer = _ask(module, client, feature, model, version, is_binary=is_binary, zipped=zipped)
            np.testing.assert_allclose(answer.as_numpy("scores"), expected, rtol=1e-5, atol=1e-5)
            told = answer.get_response() if kind == "http" else answer.get_response(as_json=True)
            assert told["id"] == "7"
            with pytest.raises(InferenceServerException):
                _ask(module, client, feature[:, :2], model, version, is_binary=is_binary, zipped=zipped)
            with pytest.raises(InferenceServerException):
                _ask(module, client, feature, "nobody", "", is_binary=is_binary, zipped=zipped)
            seen.append((set(metadata), metadata["inputs"], metadata["outputs"], {"name", "version"} <= set(server)))
            client.close()
        ours_seen, theirs = seen
        assert ours_seen[1:] == theirs[1:]
        assert theirs[0] <= ours_seen[0] | {"platform"}


@needs_triton
def test_our_client_asks_a_real_triton(bundle: Bundle, triton: tuple[int, int]) -> None:
    images = np.random.default_rng(0).random((6, *IMAGE), np.float32)
    settings = Settings(is_triton=True, compression="gzip")
    with Edge(bundle, server=f"http://127.0.0.1:{triton[0]}", settings=settings) as edge:
        answer = edge.infer(images)
    assert not answer.is_degraded
    import onnxruntime

    (sent,) = onnxruntime.InferenceSession(bundle.folder / "edge.onnx").run(["feature"], {"image": images})
    np.testing.assert_allclose(answer.scores, truth(bundle, sent), rtol=1e-5, atol=1e-5)


# The same of ours and of the real one


class Place(NamedTuple):
    """Where the bundle is served, and how it is called there."""

    http: str
    grpc: str
    model: str
    version: str


@pytest.fixture(scope="module")
def ours(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    with running(tmp_path_factory.mktemp("ours") / "log", bundle.folder) as server:
        yield server.port, int(server.told["grpc"].rpartition(":")[2])


@pytest.fixture(params=["ours", pytest.param("triton", marks=needs_triton)])
def place(request: pytest.FixtureRequest, bundle: Bundle) -> Place:
    http, grpc = (f"127.0.0.1:{port}" for port in request.getfixturevalue(request.param))
    named = (bundle.name, bundle.id) if request.param == "ours" else (triton_name(bundle), "1")
    return Place(http, grpc, *named)


FEW = [features(rows, seed=rows) for rows in (3, 1, 5)]


def check(bundle: Bundle, found: list[Any]) -> None:
    for answer, feature in zip(found, FEW, strict=True):
        np.testing.assert_allclose(answer.as_numpy("scores"), truth(bundle, feature), rtol=1e-5, atol=1e-5)


def test_async_infer_over_rest(bundle: Bundle, place: Place) -> None:
    with tritonclient.http.InferenceServerClient(place.http, concurrency=3) as client:
        asked = [client.async_infer(place.model, **_tensors("http", one), model_version=place.version) for one in FEW]
        check(bundle, [one.get_result() for one in asked])
        wrong = client.async_infer(place.model, **_tensors("http", FEW[0][:, :2]))
        with pytest.raises(InferenceServerException):
            wrong.get_result()


def test_async_infer_over_grpc(bundle: Bundle, place: Place) -> None:
    with tritonclient.grpc.InferenceServerClient(place.grpc) as client:

        def ask(feature: np.ndarray) -> SimpleQueue[tuple[Any, Any]]:
            told: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
            client.async_infer(
                place.model,
                callback=lambda result, error: told.put((result, error)),
                model_version=place.version,
                **_tensors("grpc", feature),
            )
            return told

        found = [ask(one).get(timeout=20) for one in (*FEW, FEW[0][:, :2])]
    check(bundle, [result for result, _ in found[:3]])
    assert found[3][0] is None
    assert isinstance(found[3][1], InferenceServerException)


def test_a_stream_of_requests(bundle: Bundle, place: Place) -> None:
    told: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(place.grpc) as client:
        client.start_stream(callback=lambda result, error: told.put((result, error)))
        for i, feature in enumerate((FEW[0], FEW[1], FEW[0][:, :2], FEW[2])):
            client.async_stream_infer(
                place.model,
                model_version=place.version,
                request_id=str(i),
                enable_empty_final_response=i == 1,
                **_tensors("grpc", feature),
            )
        client.stop_stream()  # waits for all answers
    found = [told.get(timeout=20) for _ in range(4)]
    assert told.empty()
    assert isinstance(found.pop(2)[1], InferenceServerException)
    check(bundle, [result for result, _ in found])
    responses = [result.get_response() for result, _ in found]
    assert [one.id for one in responses] == ["0", "1", "3"]
    assert [one.parameters["triton_final_response"].bool_param for one in responses] == [True] * 3


def test_the_clients_of_asyncio(bundle: Bundle, place: Place) -> None:
    async def stream() -> AsyncIterator[dict[str, Any]]:
        for i, one in enumerate(FEW):
            yield {"model_name": place.model, "model_version": place.version, "request_id": str(i)} | _tensors(
                "grpc", one
            )

    async def work() -> None:
        for kind, module in (("http", tritonclient.http.aio), ("grpc", tritonclient.grpc.aio)):
            async with module.InferenceServerClient(getattr(place, kind)) as client:
                assert await client.is_server_live()
                assert await client.is_server_ready()
                assert await client.is_model_ready(place.model, place.version)
                asked = (client.infer(place.model, **_tensors(kind, one), model_version=place.version) for one in FEW)
                check(bundle, await asyncio.gather(*asked))
                with pytest.raises(InferenceServerException):
                    await client.infer("nobody", **_tensors(kind, FEW[0]))
                if kind == "grpc":
                    found = [one async for one in client.stream_infer(stream())]
                    assert [error for _, error in found] == [None] * 3
                    check(bundle, [result for result, _ in found])

    asyncio.run(work())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_parameters_for_sequences_and_of_one_s_own_change_nothing(bundle: Bundle, place: Place, kind: str) -> None:
    module = tritonclient.http if kind == "http" else tritonclient.grpc
    own = {"sequence_id": 5, "sequence_start": True, "sequence_end": True, "parameters": {"mine": "x", "more": 3}}
    with module.InferenceServerClient(getattr(place, kind)) as client:
        asked = (client.infer(place.model, **_tensors(kind, one), model_version=place.version, **own) for one in FEW)
        check(bundle, list(asked))


@pytest.mark.parametrize("count", [2, 99])
@pytest.mark.parametrize(("kind", "is_binary"), [("http", True), ("http", False), ("grpc", True)])
def test_the_best_classes(bundle: Bundle, place: Place, kind: str, is_binary: bool, count: int) -> None:
    module = tritonclient.http if kind == "http" else tritonclient.grpc
    with module.InferenceServerClient(getattr(place, kind)) as client:
        tensors = _tensors(kind, FEW[0], is_binary=is_binary, classes=count)
        found = client.infer(place.model, **tensors, model_version=place.version).as_numpy("scores")
    scores = truth(bundle, FEW[0])
    order = np.argsort(-scores)[:, :count]
    assert found.shape == order.shape
    for text, label, score in zip(found.flat, order.flat, np.take_along_axis(scores, order, 1).flat, strict=True):
        told, _, rest = (text.decode() if isinstance(text, bytes) else text).partition(":")
        assert rest == f"{label}:class {label}"
        assert len(told.partition(".")[2]) == 6
        assert float(told) == pytest.approx(score, abs=1e-4)
