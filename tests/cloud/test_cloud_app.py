"""The application in process: what is right is answered, what is wrong is refused with a reason, whatever it is."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import threading
import tracemalloc
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor

from bundles import FEATURE, N_SCORES, toy_bundle
from louver.cloud import Batching, Limits, Repository, Settings, create_app, rpc
from louver.cloud import inference_pb2 as messages
from louver.cloud.tokens import add_client, remove_client
from louver.errors import ConfigError
from servers import Answer, ask, asking, binary, features, head_of, infer_path, message_of, truth

LIMITS = Limits(
    body_bytes=20_000, decoded_bytes=30_000, header_bytes=2_000, json_bytes=10_000, rows=9, held_bytes=200_000
)


class Place:
    """Two models, one of each type, behind one application."""

    def __init__(self, folder: Path, *, workers: int = 2, **options) -> None:
        self.toy = toy_bundle(folder / "toy")
        self.real = toy_bundle(folder / "real", name="real", encoding="float32", seed=1)
        batching = Batching(workers=workers, threads=1)
        self.repository = Repository([folder / "toy", folder / "real"], batching=batching)
        self.app = create_app(self.repository, Settings(limits=LIMITS, **options))
        self.app.service.lines.write = lambda line: None

    def ask(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **options) -> Answer:
        return asyncio.run(ask(self.app, path, body, headers, **options))

    def close(self) -> None:
        self.repository.close()
        self.app.service.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    made.close()


def padded(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body) + b"\x50\x2a\x4d\x18" + (99).to_bytes(4, "little") + bytes(99)


# What is right


@pytest.mark.parametrize("encoding", ["", "identity", "zstd", "gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", ["toy", "real"])
def test_scores_are_those_of_onnxruntime(place, name, rows, encoding):
    bundle = getattr(place, name)
    feature = features(rows, dtype=np.uint8 if name == "toy" else np.float32)
    body, headers = asking(feature, call_id="some id")
    change = {"zstd": padded, "gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)
    if encoding:
        headers["content-encoding"] = encoding
    found = place.ask(infer_path(bundle), change(body), headers, chunk=777)
    assert found.status == 200
    np.testing.assert_allclose(found.scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)
    head = json.loads(found.body[: int(found.headers["inference-header-content-length"])])
    assert (head["id"], head["model_name"], head["model_version"]) == ("some id", bundle.name, bundle.id)


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("name", ["toy", "real"])
def test_a_tensor_as_json(place, name, is_nested):
    bundle = getattr(place, name)
    feature = features(2, dtype=np.uint8 if name == "toy" else np.float32)
    head = head_of(feature, parameters={}, data=(feature if is_nested else feature.reshape(-1)).tolist())
    del head["outputs"]
    found = place.ask(f"/v2/models/{name}/infer", json.dumps(head).encode())
    (output,) = json.loads(found.body)["outputs"]
    assert found.headers["content-type"] == "application/json"
    assert (output["shape"], output["datatype"]) == ([2, N_SCORES], "FP32")
    scores = np.array(output["data"]).reshape(output["shape"])
    np.testing.assert_allclose(scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_tensor_may_start_anywhere(place, shift):
    feature = features(2, dtype=np.float32)
    text = json.dumps(head_of(feature)).encode()
    text += b" " * ((shift - len(text)) % 4)
    found = place.ask(infer_path(place.real), *binary(text, feature.tobytes()))
    np.testing.assert_allclose(found.scores, truth(place.real, feature), rtol=1e-5, atol=1e-5)


def test_bytes_are_asked_for_by_output_or_by_request(place):
    feature = features(1)
    head = {key: value for key, value in head_of(feature).items() if key != "outputs"}
    for extra, is_binary in (
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"parameters": {"binary_data_output": True, "timeout": 5}, "outputs": []}, True),
        ({"outputs": [{"name": "scores"}]}, False),
        ({"parameters": {"binary_data_output": True}, "outputs": [{"name": "scores"}]}, True),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "scores", "parameters": {"binary_data": False}}],
            },
            False,
        ),
    ):
        found = place.ask(infer_path(place.toy), *binary({**head, **extra}, feature.tobytes()))
        assert found.status == 200, extra
        assert ("inference-header-content-length" in found.headers) == is_binary, extra


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_best_classes_are_those_of_the_scores(place, is_binary):
    feature = features(3)
    scores = truth(place.toy, feature)
    for count in (2, 0, 99, 2):  # heads that differ in this alone, and one again
        head = head_of(feature, call_id="an-id")
        head["outputs"][0]["parameters"] = {"binary_data": is_binary, "classification": count}
        found = place.ask(infer_path(place.toy), *binary(head, feature.tobytes()))
        text = found.body[: int(found.headers.get("inference-header-content-length", len(found.body)))]
        (output,) = json.loads(text)["outputs"]
        if not count:
            assert (output["datatype"], output["shape"]) == ("FP32", [3, N_SCORES])
            continue
        assert (output["datatype"], output["shape"]) == ("BYTES", [3, min(count, N_SCORES)])
        texts = deserialize_bytes_tensor(found.body[len(text) :]).tolist() if is_binary else output["data"]
        texts = [one.decode() if is_binary else one for one in texts]
        best = [(i, label) for i in range(3) for label in np.argsort(-scores[i])[:count]]
        assert [one.partition(":")[2] for one in texts] == [f"{label}:class {label}" for _, label in best]
        told = [float(one.partition(":")[0]) for one in texts]
        np.testing.assert_allclose(told, [scores[one] for one in best], rtol=1e-5, atol=1e-5)


def test_parameters_that_some_clients_send_have_no_effect(place):
    feature, more = features(2), {"priority": 9, "timeout": 1}
    own = {"sequence_id": "a", "sequence_start": True, "sequence_end": False, "mine": 1.5}
    head = head_of(feature, parameters={"binary_data_size": feature.nbytes, **more})
    head["outputs"][0]["parameters"] |= more
    found = place.ask(infer_path(place.toy), *binary({**head, "parameters": more | own}, feature.tobytes()))
    np.testing.assert_allclose(found.scores, truth(place.toy, feature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("parts", "status"), [(64, 200), (65, 400)])
def test_as_many_frames_as_the_document_says(place, parts, status):
    body, headers = asking(features(2))
    headers["content-encoding"] = "zstd"
    skippable = b"\x50\x2a\x4d\x18" + (1).to_bytes(4, "little") + b"x"
    found = place.ask(infer_path(place.toy), zstandard.compress(body) + skippable * (parts - 1), headers)
    assert found.status == status


@pytest.mark.parametrize(("flushes", "words"), [(4098, "does not parse"), (4099, "more blocks than its size needs")])
def test_a_stream_that_is_flushed_as_often_as_the_document_says(place, flushes, words):
    """4,096 blocks, and one for each 8 KiB of 30,000 bytes: 4,099, the last of which ends the frame."""
    stream = zstandard.ZstdCompressor().compressobj()
    parts = (stream.compress(b"a") + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for _ in range(flushes))
    found = place.ask(infer_path(place.toy), b"".join(parts) + stream.flush(), {"content-encoding": "zstd"})
    assert found.status == 400
    assert words in found.error


def test_scores_do_not_depend_on_the_company(place):
    """Forty requests of different sizes at once, and each alone."""
    sent = [features(1 + i % 7, seed=i) for i in range(40)]

    async def together() -> list[Answer]:
        return await asyncio.gather(*(ask(place.app, infer_path(place.toy), *asking(one)) for one in sent))

    for one, found in zip(sent, asyncio.run(together()), strict=True):
        np.testing.assert_allclose(found.scores, truth(place.toy, one), rtol=1e-5, atol=1e-5)


def test_health_and_metadata(place):
    assert [place.ask(f"/v2/health/{what}").status for what in ("live", "ready")] == [200, 200]
    toy = place.toy
    for path in ("/v2/models/toy/ready", f"/v2/models/toy/versions/{toy.id}/ready"):
        assert place.ask(path).status == 200
    assert place.ask(f"/v2/models/toy/versions/{place.real.id}/ready").status == 404
    server = json.loads(place.ask("/v2").body)
    assert (server["name"], server["extensions"]) == ("louver", ["binary_tensor_data", "classification"])
    for path in ("/v2/models/toy", f"/v2/models/toy/versions/{toy.id}"):
        assert json.loads(place.ask(path).body) == {
            "name": "toy",
            "versions": [toy.id],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "feature", "datatype": "UINT8", "shape": [-1, *FEATURE]}],
            "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, N_SCORES]}],
        }


# What is wrong

ONE, REAL = features(2), features(2, dtype=np.float32)
GOOD = head_of(ONE)
NOT_FINITE = REAL.copy()
NOT_FINITE[1, 2, 3, 4] = np.nan
INFINITE = REAL.copy()
INFINITE[0, 0, 0, 0] = -np.inf


def raw(text: bytes, tensor: bytes = ONE.tobytes()) -> tuple[bytes, dict[str, str]]:
    return binary(text, tensor)


def of(**changes) -> tuple[bytes, dict[str, str]]:
    return binary(head_of(ONE, **changes), ONE.tobytes())


def data(values: object, shape: object = None) -> tuple[bytes, dict[str, str]]:
    return json.dumps(head_of(ONE, parameters={}, data=values, shape=shape or [2, *FEATURE])).encode(), {}


WRONG = {
    "nothing": ((b"", {}), 400, "does not parse"),
    "no JSON": ((b"hello", {}), 400, "does not parse"),
    "a list": ((b"[]", {}), 400, "an object"),
    "a number": (raw(b"7"), 400, "an object"),
    "no UTF-8": ((b"\xff\xfe{}", {}), 400, "UTF-8"),
    "UTF-16": ((json.dumps(GOOD).encode("utf-16"), {}), 400, "UTF-8"),
    "too deep": ((b'{"inputs":' + b"[" * 5000, {}), 400, "deep"),
    "too deep and long": (raw(b"[" * 2001), 413, "at most 2000 bytes of JSON"),
    "a long number": ((b'{"id": ' + b"1" * 5000 + b"}", {}), 400, "too long"),
    "NaN in JSON": ((b'{"id": NaN}', {}), 400, "NaN is no JSON"),
    "a key twice": (raw(b'{"id": "a", "id": "b"}'), 400, "twice"),
    "JSON and a tail": (raw(json.dumps(GOOD).encode() + b"x"), 400, "does not parse"),
    "no inputs": (raw(b"{}"), 400, "inputs"),
    "inputs that are none": (binary({**GOOD, "inputs": []}, b""), 400, "hold feature"),
    "inputs that are no list": (binary({**GOOD, "inputs": {}}, b""), 400, "list of objects"),
    "inputs that are no objects": (binary({**GOOD, "inputs": [7]}, b""), 400, "list of objects"),
    "a tensor twice": (binary({**GOOD, "inputs": GOOD["inputs"] * 2}, ONE.tobytes() * 2), 400, "nothing else"),
    "a thousand tensors": (raw(json.dumps({"inputs": [{}] * 400}).encode()), 400, "hold feature"),
    "another input": (of(name="image"), 400, "hold feature"),
    "another output": (binary({**GOOD, "outputs": [{"name": "x"}]}, ONE.tobytes()), 400, "hold scores"),
    "an output twice": (binary({**GOOD, "outputs": GOOD["outputs"] * 2}, ONE.tobytes()), 400, "hold scores"),
    "outputs that are no list": (binary({**GOOD, "outputs": 5}, ONE.tobytes()), 400, "list of objects"),
    "an unknown key": (binary({**GOOD, "more": 1}, ONE.tobytes()), 400, "unknown key 'more'"),
    "an unknown key of the input": (of(more=1), 400, "unknown key"),
    "an unknown parameter": (of(parameters={"shared_memory_region": "x"}), 400, "does not support"),
    "parameters that are no object": (of(parameters=[]), 400, "an object"),
    "a parameter of Triton": (binary({**GOOD, "parameters": {"triton_x": 1}}, ONE.tobytes()), 400, "does not support"),
    "a parameter that is a list": (
        binary({**GOOD, "parameters": {"mine": [1]}}, ONE.tobytes()),
        400,
        "does not support",
    ),
    "a size of text": (of(parameters={"binary_data_size": "160"}), 400, "to be int"),
    "a size of truth": (of(parameters={"binary_data_size": True}), 400, "to be int"),
    "a size of less": (of(parameters={"binary_data_size": 159}), 400, "expected binary_data_size 160"),
    "a size below 0": (of(parameters={"binary_data_size": -1}), 400, "expected binary_data_size 160"),
    "classes below 0": (
        binary({**GOOD, "outputs": [{"name": "scores", "parameters": {"classification": -3}}]}, ONE.tobytes()),
        400,
        "1 to 1000 classes, got -3",
    ),
    "a class count of text": (
        binary({**GOOD, "outputs": [{"name": "scores", "parameters": {"classification": "3"}}]}, ONE.tobytes()),
        400,
        "to be int",
    ),
    "a size and data": (of(data=[1]), 400, "both"),
    "bytes that nobody told of": (of(parameters={}), 400, "no input has a binary_data_size"),
    "an id that is a number": (binary({**GOOD, "id": 5}, ONE.tobytes()), 400, "expected id"),
    "an id that is a book": (binary({**GOOD, "id": "x" * 300}, ONE.tobytes()), 400, "expected id"),
    "another type": (of(datatype="FP32"), 400, "expected datatype UINT8"),
    "no type": (of(datatype=None), 400, "expected datatype UINT8"),
    "a type that is a list": (of(datatype=["UINT8"]), 400, "expected datatype UINT8"),
    "no shape": (of(shape=None), 400, r"expected shape [n, 4, 4, 5]"),
    "another shape": (of(shape=[2, 4, 5, 4]), 400, "expected shape"),
    "a flat shape": (of(shape=[2, 80]), 400, "expected shape"),
    "an empty shape": (of(shape=[]), 400, "expected shape"),
    "a shape of truths": (of(shape=[True, *FEATURE]), 400, "expected shape"),
    "a shape of halves": (of(shape=[2.0, *FEATURE]), 400, "expected shape"),
    "a shape below 0": (of(shape=[-2, *FEATURE]), 400, "expected 1 to 9 images"),
    "no rows": (binary(head_of(ONE[:0]), b""), 400, "expected 1 to 9 images"),
    "too many rows": (asking(features(10)), 400, "expected 1 to 9 images"),
    "rows past all": (of(shape=[10**30, *FEATURE]), 400, "expected 1 to 9 images"),
    "more rows than bytes": (of(shape=[3, *FEATURE], parameters={"binary_data_size": 240}), 400, "got 160"),
    "a byte less": (raw(json.dumps(GOOD).encode(), ONE.tobytes()[:-1]), 400, "expected 160 bytes of tensor"),
    "a byte more": (raw(json.dumps(GOOD).encode(), ONE.tobytes() + b"x"), 400, "expected 160 bytes of tensor"),
    "no header where one is due": ((json.dumps(GOOD).encode() + ONE.tobytes(), {}), 400, ""),
    "a header past the body": ((b"{}", {"inference-header-content-length": "3"}), 400, "not within"),
    "a header of nothing": ((b"{}", {"inference-header-content-length": "0"}), 400, "not within"),
    "a header below 0": ((b"{}", {"inference-header-content-length": "-1"}), 400, "number of bytes"),
    "a header of words": ((b"{}", {"inference-header-content-length": "two"}), 400, "number of bytes"),
    "a header past all": ((b"{}", {"inference-header-content-length": "9" * 30}), 400, "number of bytes"),
    "data of another number": (data([1, 2, 3]), 400, "expected 160 numbers"),
    "data that is no list": (data("x"), 400, "expected 160 numbers"),
    "data of nothing": (data([]), 400, "expected 160 numbers"),
    "data of 256": (data([256] + [0] * 159), 400, "0 to 255"),
    "data of -1": (data([-1] + [0] * 159), 400, "0 to 255"),
    "data of halves": (data([0.5] + [0] * 159), 400, "0 to 255"),
    "data of truths": (data([True] + [0] * 159), 400, "0 to 255"),
    "data of text": (data(["1"] + [0] * 159), 400, "0 to 255"),
    "data of null": (data([None] + [0] * 159), 400, "0 to 255"),
    "data nested otherwise": (data(ONE.reshape(2, 5, 4, 4).tolist()), 400, "nesting"),
    "data nested too deep": (data(ONE[..., None].tolist()), 400, "0 to 255"),
    "data nested in part": (data([*ONE.tolist()[:1], [1, 2]]), 400, "nesting"),
    "an unknown encoding": ((asking(ONE)[0], {**asking(ONE)[1], "content-encoding": "br"}), 415, "zstd, gzip, deflate"),
    "no such encoding as told": ((asking(ONE)[0], {**asking(ONE)[1], "content-encoding": "zstd"}), 400, "not zstd"),
    "a long body": ((bytes(20_001), {}), 413, "at most 20000 bytes"),
    "a body that is told to be long": ((b"", {"content-length": "20001"}), 413, "at most 20000 bytes"),
    "a length of words": ((b"", {"content-length": "many"}), 400, "number of bytes"),
    "a bomb": ((padded(bytes(10**7)), {"content-encoding": "zstd"}), 413, "over 30000 bytes"),
    "long JSON": ((b" " * 10_001, {}), 413, "at most 10000 bytes of JSON"),
}
WRONG_REAL = {
    "NaN": (asking(NOT_FINITE), 400, "NaN or infinity"),
    "infinity": (asking(INFINITE), 400, "NaN or infinity"),
    "scores past FP32": (asking(np.full((1, *FEATURE), 3e38, np.float32)), 400, "scores are not finite"),
    "a number past FP32": (data([1e300] + [0] * 159), 400, "expected datatype FP32"),
    "NaN as JSON": (
        (
            json.dumps(
                {"inputs": [{**head_of(REAL)["inputs"][0], "parameters": {}, "data": [1e39] + [0] * 159}]}
            ).encode(),
            {},
        ),
        400,
        "NaN or infinity",
    ),
    "a whole number past all": (
        (
            json.dumps(
                {"inputs": [{**head_of(REAL)["inputs"][0], "parameters": {}, "data": [10**400] + [0] * 159}]}
            ).encode(),
            {},
        ),
        400,
        "past FP32",
    ),
}


@pytest.mark.parametrize("case", [*WRONG, *WRONG_REAL])
def test_what_is_wrong_is_refused_with_the_reason(place, case):
    (body, headers), status, words = {**WRONG, **WRONG_REAL}[case]
    bundle = place.real if case in WRONG_REAL else place.toy
    found = place.ask(infer_path(bundle), body, headers)
    assert (found.status, found.headers["content-type"]) == (status, "application/json")
    assert words in found.error
    assert len(found.error) < 300
    assert place.app.service.held_bytes == 0


def test_other_addresses_and_methods(place):
    for path in (
        "/",
        "/v2/",
        "/v2/models",
        "/v2/models/toy/config",
        "/v2/models//infer",
        "/v2/models/a/b/infer",
        "/x\x00",
    ):
        found = place.ask(path, method="GET")
        assert found.status == 404, path
        assert "no such address" in found.error
    found = place.ask(infer_path(place.toy), method="GET")
    assert (found.status, found.headers["allow"]) == (405, "POST")
    assert place.ask("/v2", method="DELETE").status == 405


def test_an_unknown_version_says_which_are_served(place):
    found = place.ask(f"/v2/models/toy/versions/{place.real.id}/infer", *asking(ONE))
    assert found.status == 404
    assert place.toy.id in found.error
    assert "real, toy" in place.ask("/v2/models/tox/infer", *asking(ONE)).error


def test_too_much_at_once_is_refused_and_let_go(place):
    """Bodies that do not end, until no more may be held."""
    service = place.app.service

    async def work() -> tuple[Answer, int]:
        stuck = asyncio.Event()

        async def send(message):
            raise AssertionError("nobody is there to be answered")

        async def one():
            asked = False

            async def once():
                nonlocal asked
                if asked:
                    await stuck.wait()
                    return {"type": "http.disconnect"}
                asked = True
                return {"type": "http.request", "body": bytes(19_000), "more_body": True}

            scope = {"type": "http", "method": "POST", "path": infer_path(place.toy), "headers": []}
            await place.app(scope, once, send)

        tasks = [asyncio.create_task(one()) for _ in range(10)]
        await asyncio.sleep(0.01)
        held = service.held_bytes
        found = await ask(place.app, infer_path(place.toy), bytes(15_000))
        stuck.set()
        await asyncio.gather(*tasks)
        return found, held

    found, held = asyncio.run(work())
    assert held == 190_000
    assert (found.status, found.headers["retry-after"]) == (503, "1")
    assert service.held_bytes == 0
    assert place.ask(infer_path(place.toy), *asking(ONE)).status == 200


# Anything at all


def judge(found: Answer) -> None:
    assert found.status == 200 or 400 <= found.status < 500, (found.status, found.body)
    if found.status != 200:
        assert found.error
        assert found.error.isprintable()


anything = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("feature"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "parameters", "data", "inputs", "outputs", "id"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=300), st.sampled_from(["", "zstd", "gzip", "deflate"]), st.none() | st.integers(-3, 400))
@anything
def test_random_bodies(place, body, encoding, head):
    headers = {} if head is None else {"inference-header-content-length": str(head)}
    judge(place.ask(infer_path(place.toy), body, {**headers, "content-encoding": encoding}))


@given(json_values, st.booleans())
@anything
def test_random_json(place, value, is_inside):
    content = {**GOOD, "inputs": [value]} if is_inside else value
    text = json.dumps(content, allow_nan=True).encode()
    judge(place.ask(infer_path(place.toy), *raw(text)))
    judge(place.ask(infer_path(place.toy), text))


@given(st.sampled_from(["toy", "real"]), st.sampled_from(["", "zstd", "gzip", "deflate"]), st.data())
@anything
def test_mutated_bodies(place, name, encoding, drawn):
    bundle = getattr(place, name)
    body, headers = asking(features(3, dtype=np.uint8 if name == "toy" else np.float32), call_id="an id")
    if encoding:
        change = {"zstd": padded, "gzip": gzip.compress, "deflate": zlib.compress}[encoding]
        body, headers = change(body), {**headers, "content-encoding": encoding}
    changed = bytearray(body)
    for _ in range(drawn.draw(st.integers(1, 3))):
        # The JSON stands at the start: that is where a change hurts.
        at = drawn.draw(st.integers(0, min(len(changed), 250) - 1) | st.integers(0, len(changed) - 1))
        kind = drawn.draw(st.sampled_from(["set", "cut", "insert", "flip"]))
        if kind == "set":
            changed[at] = drawn.draw(st.integers(0, 255))
        elif kind == "flip":
            changed[at] ^= 1 << drawn.draw(st.integers(0, 7))
        elif kind == "insert":
            changed[at:at] = drawn.draw(st.binary(min_size=1, max_size=4))
        else:
            del changed[at : at + drawn.draw(st.integers(1, 40))]
        if not changed:
            break
    judge(place.ask(infer_path(bundle), bytes(changed), headers))


def test_memory_does_not_grow_with_what_is_refused(place):
    rng = np.random.default_rng(0)
    good, headers = asking(ONE)

    async def some(count: int) -> None:
        for i in range(count):
            body = bytearray(good)
            body[rng.integers(len(body) - ONE.nbytes)] ^= 1 << rng.integers(8)
            await ask(place.app, f"/v2/models/{'toy' if i % 3 else i}/infer", bytes(body), headers)
            await ask(place.app, infer_path(place.toy), padded(bytes(10**5)), {"content-encoding": "zstd"})

    asyncio.run(some(300))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        asyncio.run(some(1500))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 100_000  # 3,000 bodies: 33 bytes each


# Who asks


@pytest.fixture
def guarded(tmp_path):
    file = tmp_path / "tokens.json"
    tokens = {
        "free": add_client(file, "free"),
        "few": add_client(file, "few", images_per_day=7, images_total=100),
        "slow": add_client(file, "slow", requests_per_s=0.01, burst=2),
    }
    made = Place(tmp_path, tokens=file)
    yield made, tokens
    made.close()


def test_all_but_health_needs_a_token(guarded):
    place, tokens = guarded
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/toy/ready"):
        assert place.ask(path).status == 200
    unknown = place.ask("/v2/models/tox/ready")
    assert unknown.status == 404
    assert "toy" not in unknown.error.replace("tox", "")
    for path in ("/v2", "/v2/models/toy", infer_path(place.toy), "/v2/models/tox/infer"):
        for token in (None, "x", tokens["free"][:-1]):
            found = place.ask(path, *asking(ONE), token=token)
            assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer")
            assert place.toy.id not in found.error
        assert place.ask(path, *asking(ONE), token=tokens["free"]).status in (200, 404)


def test_a_budget_is_counted_in_images(guarded):
    place, tokens = guarded

    def few(rows: int, call_id: str | None = None, *, seed: int = 0) -> int:
        return place.ask(
            infer_path(place.toy), *asking(features(rows, seed=seed), call_id=call_id), token=tokens["few"]
        ).status

    assert few(4, "a") == 200
    assert few(4, "a") == 200  # a repetition
    assert place.ask(infer_path(place.toy), *of(shape=[3]), token=tokens["few"]).status == 400  # costs nothing
    assert few(4, "a", seed=5) == 403  # the id again, for other images
    assert few(4, "b") == 403
    assert few(3) == 200
    assert few(1) == 403
    assert place.ask(infer_path(place.toy), *asking(features(8)), token=tokens["free"]).status == 200
    told = place.app.service.metrics_text().decode()
    assert 'louver_budget_left_images{client="few"} 0.0' in told
    assert 'louver_budget_used_images{client="few"} 7.0' in told
    assert 'louver_budget_refusals_total{client="few"} 3.0' in told
    assert 'client="free"' not in told


def test_each_model_and_version_that_a_request_is_sent_to_is_paid_for(tmp_path):
    """Over REST the address alone names the model: the bodies are the same, byte by byte."""
    token = add_client(tmp_path / "tokens.json", "few", images_total=100)
    first = [toy_bundle(tmp_path / name, name=name, seed=seed) for seed, name in enumerate("ab")]
    repository = Repository([tmp_path / "a", tmp_path / "b"], batching=Batching(threads=1))
    app = create_app(repository, Settings(tokens=tmp_path / "tokens.json"))
    app.service.lines.write = lambda line: None
    body = asking(features(3), call_id="same")

    def used(path: str) -> int:
        assert asyncio.run(ask(app, path, *body, token=token)).status == 200
        return app.service.budgets.used(app.service.clients.all[0])

    assert [used(f"/v2/models/{name}/infer") for name in "aabba"] == [3, 3, 6, 6, 6]
    assert used(infer_path(first[0])) == 6  # the version that answered is named now
    toy_bundle(tmp_path / "a", name="a", seed=2)
    assert repository.reload() == []
    assert [used("/v2/models/a/infer") for _ in range(2)] == [9, 9]
    assert used(infer_path(first[0])) == 9  # leaving, and paid for
    repository.close()
    app.service.close()


def test_whoever_asks_too_fast_is_told_when_to_come_again(guarded):
    place, tokens = guarded
    found = [place.ask(infer_path(place.toy), *asking(ONE), token=tokens["slow"]) for _ in range(3)]
    assert [one.status for one in found] == [200, 200, 429]
    assert 90 <= int(found[2].headers["retry-after"]) <= 100


def test_a_revoked_token_is_refused_without_a_restart(guarded):
    place, tokens = guarded
    assert place.ask("/v2", token=tokens["free"]).status == 200
    remove_client(place.app.service.settings.tokens, "free")
    place.app.service.clients._looked -= 2
    assert place.ask("/v2", token=tokens["free"]).status == 401
    assert place.ask("/v2", token=tokens["few"]).status == 200


def test_what_a_full_queue_refuses_is_not_charged(tmp_path):
    file = tmp_path / "tokens.json"
    token = add_client(file, "few", images_total=20)
    bundle = toy_bundle(tmp_path / "toy")
    repository = Repository([tmp_path / "toy"], batching=Batching(workers=1, threads=1, queue=3))
    app = create_app(repository, Settings(tokens=file))
    app.service.lines.write = lambda line: None
    batcher = repository.find("toy", None).batcher
    network, gate = batcher._network, threading.Event()
    batcher._network = lambda feature: network(feature) if gate.wait(10) else feature

    async def work() -> list[Answer]:
        asyncio.get_running_loop().call_later(0.3, gate.set)
        calls = [asking(features(1), call_id=str(i)) for i in range(10)]
        return await asyncio.gather(*(ask(app, infer_path(bundle), *one, token=token) for one in calls))

    found = asyncio.run(work())
    answered = sum(one.status == 200 for one in found)
    assert sum(one.status == 503 and "retry-after" in one.headers for one in found) == 10 - answered > 0
    assert app.service.budgets.left(app.service.clients.all[0]) == 20 - answered
    repository.close()
    app.service.close()


def test_what_was_computed_is_charged_and_what_failed_is_not(tmp_path):
    file = tmp_path / "tokens.json"
    token = add_client(file, "few", images_total=10)
    bundle = toy_bundle(tmp_path / "toy", encoding="float32")
    repository = Repository([tmp_path / "toy"], batching=Batching(workers=1, threads=1))
    app = create_app(repository, Settings(tokens=file))
    app.service.lines.write = lambda line: None
    batcher = repository.find("toy", None).batcher
    network = batcher._network

    def fails(feature: np.ndarray) -> np.ndarray:
        raise RuntimeError("of no fault of the client")

    def left_after(status: int, feature: np.ndarray, call_id: str) -> int:
        body, headers = asking(feature, call_id=call_id)
        found = asyncio.run(ask(app, infer_path(bundle), body, headers, token=token))
        assert found.status == status
        return app.service.budgets.left(app.service.clients.all[0])

    feature = features(3, dtype=np.float32)
    batcher._network = fails
    assert left_after(500, feature, "a") == 10
    assert left_after(500, feature[:1], "alone") == 10
    batcher._network = network
    assert left_after(200, feature, "a") == 7  # the same again: it was not paid for before
    assert left_after(200, feature, "a") == 7
    assert left_after(400, np.full((4, *FEATURE), 3e38, np.float32), "b") == 3
    repository.close()
    app.service.close()


# What is told


def test_a_line_holds_names_and_numbers_only(guarded):
    place, tokens = guarded
    written: list[str] = []
    place.app.service.lines.write = written.append
    feature = features(2)
    body, headers = asking(feature, call_id="my-call-id")
    place.ask(infer_path(place.toy), body, {**headers, "x-secret": "in a header"}, token=tokens["few"])
    place.ask(infer_path(place.toy), body[:-5], headers, token=tokens["few"])
    place.ask("/v2/models/secret-name/infer", body, headers, token=tokens["few"])
    place.ask(infer_path(place.toy), body, headers, token="secret-token")
    assert all(line.endswith("\n") for line in written)
    lines = [json.loads(line) for line in written]
    keys = {"time", "level", "event", "protocol", "client", "model", "version", "rows", "status", "ms"}
    assert [line.keys() for line in lines] == [keys] * 4
    assert [(line["client"], line["model"], line["rows"], line["status"]) for line in lines] == [
        ("few", "toy", 2, 200),
        ("few", "toy", 0, 400),
        ("few", None, 0, 404),
        (None, None, 0, 401),
    ]
    everything = json.dumps(lines)
    assert not any(word in everything for word in (*tokens.values(), "secret", "my-call-id", "in a header"))


def test_metrics_count_what_happened(tmp_path):
    place = Place(tmp_path)
    place.ask(infer_path(place.toy), *asking(features(5)))
    place.ask(infer_path(place.toy), *of(shape=[3]))
    for i in range(30):
        place.ask(f"/v2/models/guess-{i}/infer")
    told = place.app.service.metrics_text().decode().splitlines()
    which = f'model="toy",protocol="rest",status="%d",version="{place.toy.id}"'
    assert f"louver_requests_total{{{which % 200}}} 1.0" in told
    assert f"louver_requests_total{{{which % 400}}} 1.0" in told
    assert 'louver_requests_total{model="",protocol="rest",status="404",version=""} 30.0' in told
    toy = f'model="toy",version="{place.toy.id}"'
    assert f"louver_images_total{{{toy}}} 5.0" in told
    assert f"louver_batch_images_sum{{{toy}}} 5.0" in told
    assert f"louver_request_seconds_count{{{toy}}} 2.0" in told
    assert f"louver_waiting_requests{{{toy}}} 0.0" in told
    assert not any("guess" in line for line in told)
    assert any(line.startswith("louver_build{louver=") for line in told)
    place.close()


def test_who_leaves_while_waiting_is_dropped(tmp_path):
    place = Place(tmp_path)
    served = place.repository.find("toy", None)

    async def work() -> None:
        waiting = asyncio.get_running_loop().create_future()
        served.batcher.submit = lambda feature, **options: waiting
        body, headers = asking(ONE)
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            raise AssertionError("nobody is there")

        scope = {
            "type": "http",
            "method": "POST",
            "path": infer_path(place.toy),
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
        await asyncio.wait_for(place.app(scope, receive, send), 5)
        assert waiting.cancelled()

    asyncio.run(work())
    assert 'status="499"' in place.app.service.metrics_text().decode()
    place.close()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_features_of_those_who_left_are_not_in_memory(tmp_path, protocol):
    """Fifty clients that leave while the only worker is busy, one after another; what stays is answered."""
    place = Place(tmp_path, workers=1)
    service, served = place.app.service, place.repository.find("toy", None)
    network, submit, go = served.batcher._network, served.batcher.submit, threading.Event()
    served.batcher._network = lambda feature: network(feature) if go.wait(10) else feature
    alive: list[weakref.ref[np.ndarray]] = []

    def watched(feature, **options):
        alive.append(weakref.ref(feature))
        return submit(feature, **options)

    served.batcher.submit = watched
    feature = features(9)

    class Context:
        def invocation_metadata(self):
            return ()

    async def leaves_rest() -> None:
        body, headers = asking(feature)
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": zstandard.compress(body)}]

        async def receive():
            return messages.pop()

        async def send(message):
            raise AssertionError("nobody is there")

        fields = {**headers, "content-encoding": "zstd"}
        scope = {"type": "http", "method": "POST", "path": infer_path(place.toy)}
        await place.app({**scope, "headers": [(k.encode(), v.encode()) for k, v in fields.items()]}, receive, send)

    async def leaves_grpc() -> None:
        tensor = messages.ModelInferRequest.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
        asked = messages.ModelInferRequest(
            model_name="toy", model_version=place.toy.id, inputs=[tensor], raw_input_contents=[feature.tobytes()]
        )
        task = asyncio.create_task(rpc._infer(service, message_of(asked.SerializeToString()), Context()))
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    async def work() -> None:
        stays = [features(4, seed=1), features(2, seed=2)]
        running = asyncio.create_task(ask(place.app, infer_path(place.toy), *asking(ONE)))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(ask(place.app, infer_path(place.toy), *asking(one))) for one in stays]
        await asyncio.sleep(0.02)
        del alive[:]
        for _ in range(50):
            await (leaves_rest if protocol == "rest" else leaves_grpc)()
        await asyncio.sleep(0)
        assert len(alive) == 50
        assert not any(one() is not None for one in alive)
        assert served.batcher._rows == 6
        go.set()
        for found, its in zip(await asyncio.gather(running, *waiting), (ONE, *stays), strict=True):
            np.testing.assert_allclose(found.scores, truth(place.toy, its), rtol=1e-5, atol=1e-5)
        assert served.batcher._rows == 0

    gc.disable()
    try:
        asyncio.run(work())
    finally:
        gc.enable()
    assert service.held_bytes == 0
    place.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limits(body_bytes=0),
        lambda: Limits(rows=0),
        lambda: Limits(body_s=0),
        lambda: Settings(retry_window_s=-1),
        lambda: Settings(budgets=Path("b")),
    ],
)
def test_settings_that_cannot_be_are_refused(make):
    with pytest.raises(ConfigError):
        make()
