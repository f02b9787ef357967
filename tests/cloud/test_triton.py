"""Triton: the model repository that we write, and that our server answers its clients as the real one does.

The second half needs a Triton server: LOUVER_TRITON names an environment that holds the wheel nvidia-pytriton, made as
CONTRIBUTING.md tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
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


def _ask(module, client, feature: np.ndarray, model: str, version: str, *, is_binary: bool, zipped: str | None):
    is_rest = module is tritonclient.http
    tensor = module.InferInput("feature", list(feature.shape), "UINT8")
    tensor.set_data_from_numpy(feature, **({"binary_data": is_binary} if is_rest else {}))
    output = module.InferRequestedOutput("scores", **({"binary_data": is_binary} if is_rest else {}))
    packed = {"request_compression_algorithm": zipped} if is_rest else {"compression_algorithm": zipped}
    return client.infer(model, [tensor], outputs=[output], model_version=version, request_id="7", **packed)


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
