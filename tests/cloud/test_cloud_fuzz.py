"""Twelve thousand bodies and six thousand messages, made up and mutated: each is refused with a reason, or right.

The seeds are fixed, so that what is found is found again. What a fuzzer finds in an hour: `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import random
import resource
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import zstandard

from bundles import toy_bundle
from louver.cloud import Batching, Limits, Repository, Settings, create_app, rpc
from louver.cloud import inference_pb2 as messages
from louver.cloud.turns import Turns
from servers import Answer, asking, features, head_of, infer_path

pytestmark = pytest.mark.timeout(120)

EACH = 3000
WARM = 500
MOST_GROWN = 2 * 2**20
"""Over what follows the first `WARM`, 2,500: 840 bytes each. The allocator alone takes up to half a MiB."""

LIMITS = Limits(body_bytes=20_000, decoded_bytes=30_000, header_bytes=2_000, json_bytes=10_000, rows=9)
PACKED = {
    "identity": bytes,
    "zstd": zstandard.compress,
    "gzip": lambda body: gzip.compress(body, 1),
    "deflate": lambda body: zlib.compress(body, 1),
}
ODD = (b"-1", b"0", b"1e999", b"1" * 40, b"NaN", b"null", b"true", b'"', b"[", b"{", b"\\u0000", b"\xff", b"[[[[[[[[")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    bundles = {
        "toy": toy_bundle(folder / "toy"),
        "real": toy_bundle(folder / "real", name="real", encoding="float32", seed=1),
    }
    repository = Repository([folder], batching=Batching(workers=1, threads=1))
    app = create_app(repository, Settings(limits=LIMITS))
    app.service.lines.write = lambda line: None
    yield bundles, app
    repository.close()
    app.service.close()


def mutated(rng: random.Random, content: bytes) -> bytes:
    """One to three changes, most of them at the start: there stands what says how the rest is read."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(found), 250) if rng.random() < 0.7 else len(found)) if found else 0
        match rng.randrange(7):
            case 0 if found:
                found[at] = rng.randrange(256)
            case 1 if found:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                found[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                del found[at : at + rng.randint(1, 40)]
            case 4:
                found[at:at] = rng.choice(ODD)
            case 5:
                found[at : at + rng.randint(1, 8)] = rng.choice(ODD)
            case _:
                found += found[at : at + rng.randint(1, 60)]
    return bytes(found)


# REST


def asked_for(name: str) -> tuple[bytes, dict[str, str]]:
    return asking(features(3, dtype=np.uint8 if name == "toy" else np.float32), call_id="an-id")


def random_bytes(rng: random.Random, name: str) -> tuple[bytes, dict[str, str]]:
    body = rng.randbytes(rng.randint(0, 300))
    encoding = rng.choice([*PACKED, "br"])
    head = {} if rng.random() < 0.3 else {"inference-header-content-length": str(rng.randint(-3, 400))}
    return PACKED.get(encoding, bytes)(body) if rng.random() < 0.5 else body, {**head, "content-encoding": encoding}


def random_json(rng: random.Random, name: str) -> tuple[bytes, dict[str, str]]:
    def value(depth: int) -> object:
        kind = rng.randrange(9 if depth else 6)
        if kind < 6:
            text = rng.choice(["", "feature", "scores", "UINT8", "FP32", "é\x00", "x" * 300])
            return rng.choice([None, rng.random() < 0.5, rng.randint(-9, 300), 10**30, rng.random(), text])
        if kind < 8:
            return {rng.choice(KEYS): value(depth - 1) for _ in range(rng.randint(0, 5))}
        return [value(depth - 1) for _ in range(rng.randint(0, 5))]

    feature = features(3, dtype=np.uint8 if name == "toy" else np.float32)
    head = head_of(feature)
    place, key = rng.choice([(head, rng.choice(KEYS)), (head["inputs"][0], rng.choice(KEYS)), (head, "inputs")])
    place[key] = value(3)
    text = json.dumps(head).encode()
    if rng.random() < 0.3:
        return text, {}
    return text + feature.tobytes(), {"inference-header-content-length": str(len(text))}


KEYS = [
    "id",
    "inputs",
    "outputs",
    "parameters",
    "name",
    "shape",
    "datatype",
    "data",
    "binary_data_size",
    "priority",
    "x",
]


def mutated_requests(rng: random.Random, name: str) -> tuple[bytes, dict[str, str]]:
    body, headers = asked_for(name)
    return mutated(rng, body), headers


def mutated_within_or_around_compression(rng: random.Random, name: str) -> tuple[bytes, dict[str, str]]:
    body, headers = asked_for(name)
    encoding = rng.choice(list(PACKED))
    pack = PACKED[encoding]
    body = pack(mutated(rng, body)) if rng.random() < 0.5 else mutated(rng, pack(body))
    return body, {**headers, "content-encoding": encoding}


async def answer(app, path: str, body: bytes, headers: dict[str, str]) -> Answer:
    """As `servers.ask`, for many: without a task and a timer for each."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent = []

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message):
        sent.append(message)

    fields = [(key.encode(), value.encode()) for key, value in headers.items()]
    await app({"type": "http", "method": "POST", "path": path, "headers": fields}, receive, send)
    start, end = sent
    return Answer(start["status"], {}, end["body"])


def resident_bytes() -> int:
    """Memory of this process. Counting each object, as tracemalloc does, would take ten times as long."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(each: Callable[[int], object]) -> None:
    """Calls `each` for each number with a coroutine in it, and sees that what it leaves behind does not grow."""

    async def all_of(numbers: range) -> None:
        for i in numbers:
            await each(i)
            await asyncio.sleep(0)  # the loop counts what was answered, and lets go of it

    async def work() -> None:
        await all_of(range(WARM))
        before = resident_bytes()
        await all_of(range(WARM, EACH))
        assert resident_bytes() - before < MOST_GROWN

    asyncio.run(work())


@pytest.mark.parametrize(
    "make",
    [random_bytes, random_json, mutated_requests, mutated_within_or_around_compression],
    ids=lambda one: one.__name__,
)
def test_bodies_are_refused_with_a_reason_or_right(place, make):
    bundles, app = place
    statuses, reasons = Counter(), set()

    async def each(i: int) -> None:
        name = ("toy", "real")[i % 2]
        body, headers = make(random.Random(i), name)
        found = await answer(app, infer_path(bundles[name]), body, headers)
        statuses[found.status] += 1
        if found.status == 200:
            return
        assert 400 <= found.status < 500, (i, found)
        assert found.error, i
        assert found.error.isprintable(), i
        assert len(found.error) < 300, i
        reasons.add(found.error[:20])

    run(each)
    assert statuses.total() == EACH
    assert statuses[400] > EACH / 3
    assert len(reasons) > 5
    assert app.service.held_bytes == 0


# gRPC


def message(i: int) -> bytes:
    feature = features(3, dtype=np.uint8 if i % 2 else np.float32)
    kinds = messages.ModelInferRequest
    tensor = kinds.InferInputTensor(name="feature", datatype="UINT8" if i % 2 else "FP32", shape=feature.shape)
    asked = kinds(model_name="toy" if i % 2 else "real", id="an-id", inputs=[tensor])
    if i % 3:
        asked.raw_input_contents.append(feature.tobytes())
    elif i % 2:
        tensor.contents.uint_contents.extend(feature.ravel().tolist())
    else:
        tensor.contents.fp32_contents.extend(feature.ravel().tolist())
    return asked.SerializeToString()


def made_up(i: int) -> bytes:
    rng = random.Random(i)
    return rng.randbytes(rng.randint(0, 300)) if i % 5 == 0 else mutated(rng, message(i))


class Ended(Exception):  # noqa: N818 - as grpc's own, which is no error either
    """The call was ended with a status."""


class Context:
    """What gRPC hands to a handler."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.told: tuple[grpc.StatusCode, str] | None = None

    def invocation_metadata(self):
        return ()

    async def read(self):
        return self._content

    async def abort(self, code, reason, trailers):
        self.told = code, reason
        raise Ended


EXPECTED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def judge(code: grpc.StatusCode, reason: str, i: int) -> None:
    assert code in EXPECTED, (i, code, reason)
    assert reason, i
    assert reason.isprintable(), i
    assert len(reason) < 300, i


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata"])
def test_messages_are_refused_with_a_reason_or_right(place, method):
    _, app = place
    handle = rpc._unary(app.service, rpc._HANDLERS[method], Turns(7, 7)).stream_unary
    codes = Counter()

    async def each(i: int) -> None:
        context = Context(made_up(i))
        try:
            found = await handle(None, context)
        except Ended:
            judge(*context.told, i)
            codes[context.told[0]] += 1
        else:
            kind = messages.ModelInferResponse if method == "ModelInfer" else messages.ModelMetadataResponse
            assert kind.FromString(found).ByteSize(), i
            codes[grpc.StatusCode.OK] += 1

    run(each)
    assert codes.total() == EACH
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > EACH / 5
    assert app.service.held_bytes == 0


def test_a_network_that_fails_is_told_as_internal(place, monkeypatch):
    _, app = place

    def fails(feature: np.ndarray) -> np.ndarray:
        raise RuntimeError("what it holds is for nobody")

    monkeypatch.setattr(app.service.repository.find("toy", None).batcher, "_network", fails)
    handle = rpc._unary(app.service, rpc._HANDLERS["ModelInfer"], Turns(7, 7)).stream_unary
    context = Context(message(1))
    with pytest.raises(Ended):
        asyncio.run(handle(None, context))
    assert context.told == (grpc.StatusCode.INTERNAL, "the network failed on this request")


def test_harmless_parameters_of_a_message_have_no_effect(place):
    _, app = place
    handle = rpc._unary(app.service, rpc._HANDLERS["ModelInfer"], Turns(7, 7)).stream_unary
    asked = messages.ModelInferRequest.FromString(message(1))
    for where in (asked.parameters, asked.inputs[0].parameters):
        for name in ("binary_data", "binary_data_output", "priority", "timeout"):
            where[name].int64_param = 7
    asked.parameters["sequence_id"].string_param = asked.parameters["mine"].string_param = "7"
    asked.parameters["sequence_start"].bool_param = True
    asked.parameters["triton_enable_empty_final_response"].bool_param = True
    found = asyncio.run(handle(None, Context(asked.SerializeToString())))
    without = asyncio.run(handle(None, Context(message(1))))
    assert found == without
    asked.parameters["triton_something"].bool_param = True
    context = Context(asked.SerializeToString())
    with pytest.raises(Ended):
        asyncio.run(handle(None, context))
    assert "'triton_something'" in context.told[1]


def test_messages_over_a_connection(place):
    _, app = place
    codes = Counter()

    async def work() -> None:
        server, port = rpc.create_rpc_server(app.service, "127.0.0.1:0", None)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for i in range(300):
                try:
                    await call(made_up(i), timeout=20)
                except grpc.aio.AioRpcError as error:
                    judge(error.code(), error.details(), i)
                    codes[error.code()] += 1
                else:
                    codes[grpc.StatusCode.OK] += 1
        await server.stop(0)

    asyncio.run(work())
    assert codes.total() == 300
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 60
