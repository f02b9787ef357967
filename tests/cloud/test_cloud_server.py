"""The server as a process: clients that we did not write, signals, TLS, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from bundles import FEATURE, N_SCORES, toy_bundle
from certificates import Authority, key_pair
from louver.cloud.server import _Signals
from louver.cloud.tokens import add_client, remove_client
from louver.signing import sign_bundle
from servers import PATIENCE_S, Running, asking, features, infer_path, running, truth

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server of two models, without tokens; nothing in a test may change it."""
    folder = tmp_path_factory.mktemp("server")
    toy_bundle(folder / "toy")
    toy_bundle(folder / "real", name="real", encoding="float32", seed=1)
    with running(folder / "log", folder, options=("--max-body-mb", "0.1", "--drain-s", "0")) as server:
        yield folder, server


def eventually(what, *, within_s: float = 60.0) -> None:
    """Waits until `what()` is so."""
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


# Clients that we did not write


@pytest.fixture(scope="module")
def rest(place):
    client = tritonclient.http.InferenceServerClient(place[1].told["rest"].removeprefix("http://"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def rpc(place):
    client = tritonclient.grpc.InferenceServerClient(place[1].told["grpc"])
    yield client
    client.close()


@pytest.mark.parametrize("protocol", ["rest", "rpc"])
def test_tritonclient_asks_for_health_and_metadata(place, protocol, request):
    client = request.getfixturevalue(protocol)
    toy = toy_bundle(place[0].parent / f"copy-{protocol}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert client.is_model_ready("toy", toy.id)
    assert not client.is_model_ready("toy", "0" * 32)
    assert not client.is_model_ready("tox")
    options = {} if protocol == "rest" else {"as_json": True}
    assert client.get_server_metadata(**options)["name"] == "louver"
    found = client.get_model_metadata("toy", toy.id, **options)
    assert found["versions"] == [toy.id]
    assert [int(size) for size in found["inputs"][0]["shape"]] == [-1, *FEATURE]
    assert [int(size) for size in found["outputs"][0]["shape"]] == [-1, N_SCORES]
    with pytest.raises(InferenceServerException, match=r"no such address|Method not found"):
        client.get_model_config("toy")
    with pytest.raises(InferenceServerException, match="no model 'tox' is served here; served: real, toy"):
        client.get_model_metadata("tox")


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("name", ["toy", "real"])
@pytest.mark.parametrize("is_binary", [True, False])
def test_tritonclient_infers_over_rest(place, rest, name, is_binary, compression):
    bundle = toy_bundle(place[0].parent / "copy", name=name, **({} if name == "toy" else REAL))
    feature = features(3, dtype=np.uint8 if name == "toy" else np.float32)
    tensor = tritonclient.http.InferInput("feature", feature.shape, "UINT8" if name == "toy" else "FP32")
    tensor.set_data_from_numpy(feature, binary_data=is_binary)
    for outputs in (None, [tritonclient.http.InferRequestedOutput("scores", binary_data=is_binary)]):
        found = rest.infer(
            name,
            [tensor],
            model_version=bundle.id,
            outputs=outputs,
            request_id="id 1",
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        np.testing.assert_allclose(found.as_numpy("scores"), truth(bundle, feature), rtol=1e-5, atol=1e-5)
        assert found.get_response()["id"] == "id 1"


REAL = {"encoding": "float32", "seed": 1}


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("name", ["toy", "real"])
def test_tritonclient_infers_over_grpc(place, rpc, name, compression):
    bundle = toy_bundle(place[0].parent / "copy", name=name, **({} if name == "toy" else REAL))
    feature = features(4, dtype=np.uint8 if name == "toy" else np.float32)
    tensor = tritonclient.grpc.InferInput("feature", feature.shape, "UINT8" if name == "toy" else "FP32")
    tensor.set_data_from_numpy(feature)
    outputs = [tritonclient.grpc.InferRequestedOutput("scores")]
    found = rpc.infer(name, [tensor], outputs=outputs, request_id="id 2", compression_algorithm=compression)
    np.testing.assert_allclose(found.as_numpy("scores"), truth(bundle, feature), rtol=1e-5, atol=1e-5)
    assert found.get_response().id == "id 2"
    assert found.get_response().model_version == bundle.id


def infer_message(feature: np.ndarray, **changes):
    """The message of tritonclient, whose field numbers are not ours."""
    kinds = tritonclient.grpc.service_pb2.ModelInferRequest
    tensor = kinds.InferInputTensor(name="feature", datatype="UINT8", shape=feature.shape)
    message = kinds(model_name="toy", inputs=[tensor])
    for key, value in changes.items():
        getattr(message, key).append(value) if key == "raw_input_contents" else setattr(message, key, value)
    return message


def call(server: Running, message, *, channel: grpc.Channel | None = None, token: str | None = None) -> object:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    method = "/inference.GRPCInferenceService/ModelInfer"
    content = message if isinstance(message, bytes) else message.SerializeToString()
    with channel or grpc.insecure_channel(server.told["grpc"]) as opened:
        found = opened.unary_unary(method)(content, metadata=metadata, timeout=PATIENCE_S)
    return tritonclient.grpc.service_pb2.ModelInferResponse.FromString(found)


def test_grpc_with_typed_contents_answers_in_kind(place):
    feature = features(2)
    message = infer_message(feature)
    message.inputs[0].contents.uint_contents.extend(feature.reshape(-1).tolist())
    found = call(place[1], message)
    scores = np.array(found.outputs[0].contents.fp32_contents).reshape(found.outputs[0].shape)
    bundle = toy_bundle(place[0].parent / "copy")
    np.testing.assert_allclose(scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)
    assert not found.raw_output_contents


FEW = features(2)


def wrong_message(case: str):
    message = infer_message(FEW, raw_input_contents=FEW.tobytes())
    match case:
        case "no message":
            return b"\xff\xff hello"
        case "a tensor short":
            del message.raw_input_contents[:]
            message.raw_input_contents.append(FEW.tobytes()[:-1])
        case "two raw tensors":
            message.raw_input_contents.append(b"")
        case "two inputs":
            message.inputs.append(message.inputs[0])
        case "no input":
            del message.inputs[:]
        case "another output":
            message.outputs.add(name="x")
        case "raw and typed":
            message.inputs[0].contents.uint_contents.append(1)
        case "another type":
            message.inputs[0].datatype = "FP32"
        case "typed otherwise":
            del message.raw_input_contents[:]
            message.inputs[0].contents.int_contents.extend([1] * FEW.size)
        case "typed past a byte":
            del message.raw_input_contents[:]
            message.inputs[0].contents.uint_contents.extend([256] * FEW.size)
        case "typed and short":
            del message.raw_input_contents[:]
            message.inputs[0].contents.uint_contents.extend([1])
        case "shared memory":
            message.inputs[0].parameters["shared_memory_region"].string_param = "x"
        case "a long id":
            message.id = "x" * 300
    return message


WRONG = {
    "no message": "no ModelInferRequest",
    "a tensor short": "expected 160 bytes",
    "two raw tensors": "expected one tensor",
    "two inputs": "nothing else",
    "no input": "nothing else",
    "another output": "hold scores",
    "raw and typed": "expected one tensor",
    "another type": "expected datatype UINT8",
    "typed otherwise": "uint_contents",
    "typed past a byte": "0 to 255",
    "typed and short": "as many numbers",
    "shared memory": "does not support",
    "a long id": "expected id",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_grpc_message_is_refused_with_the_reason(place, case):
    with pytest.raises(grpc.RpcError, match=WRONG[case]) as refused:
        call(place[1], wrong_message(case))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_grpc_bomb_is_refused(place):
    channel = grpc.insecure_channel(
        place[1].told["grpc"], options=[("grpc.max_send_message_length", -1)], compression=grpc.Compression.Gzip
    )
    with pytest.raises(grpc.RpcError, match="larger than max"):
        call(place[1], infer_message(FEW, raw_input_contents=bytes(2**23)), channel=channel)


def test_our_messages_have_the_numbers_of_tritonclient():
    from louver.cloud import inference_pb2 as ours

    theirs = tritonclient.grpc.service_pb2
    for name, mine in ours.DESCRIPTOR.message_types_by_name.items():
        other = getattr(theirs, name).DESCRIPTOR
        known = {field.name: (field.number, field.type) for field in other.fields}
        assert {field.name: (field.number, field.type) for field in mine.fields}.items() <= known.items(), name
    assert ours.DESCRIPTOR.package == "louver.inference"


# Over a real connection


CHUNKED = b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def send_raw(server: Running, content: bytes, *, within_s: float = PATIENCE_S) -> bytes:
    with socket.create_connection((server.host, server.port), timeout=within_s) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while part := connection.recv(2**16):
                found += part
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return found


@given(st.binary(min_size=1, max_size=200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_bytes_on_a_connection(place, content, is_after_a_head):
    head = b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
    found = send_raw(place[1], (head if is_after_a_head else b"") + content)
    if is_after_a_head:
        assert found.startswith(b"HTTP/1.1 400")
    assert not found or found.startswith(b"HTTP/1.1 4")
    assert place[1].ask("/v2/health/live").status == 200


def test_one_connection_holds_good_and_bad_requests(place):
    _, server = place
    connection = server.connect()
    body, headers = asking(features(2))
    for content, status in ((body, 200), (body[:-1], 400), (body, 200), (bytes(150_000), 413), (body, 200)):
        connection.request("POST", "/v2/models/toy/infer", content, headers)
        found = connection.getresponse()
        assert (found.status, bool(found.read())) == (status, True)
    connection.close()


def test_a_head_without_a_body_arrives(place):
    """HEAD is answered with a head alone; whoever expects 100 gets it before it sends."""
    _, server = place
    found = send_raw(server, b"HEAD /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 405")
    assert found.endswith(b"\r\n\r\n")
    body, headers = asking(features(2))
    head = b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n" % len(
        body
    )
    head += b"inference-header-content-length: %s\r\n\r\n" % headers["inference-header-content-length"].encode()
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head)
        assert connection.recv(2**16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def told_of(server: Running, *pieces: bytes) -> list[int]:
    """The statuses of the answers to what is sent in pieces on one connection, which the server then closes."""
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as connection:
        found = b""
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.1)  # a read of its own
        with contextlib.suppress(ConnectionResetError):  # it has not read all of it
            while part := connection.recv(2**16):
                found += part
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", found)]


FIELDS = b"x-a: b\r\n" * 900
LONG_HEADS = {
    "at once": (b"GET /v2 HTTP/1.1\r\nx-long: " + b"a" * 2**15 + b"\r\n\r\n",),
    "one field in pieces": (b"GET /v2 HTTP/1.1\r\nx-long: ", b"a" * 2**14, b"a" * 2**14, b"a" * 2**14),
    "many short fields": (b"GET /v2 HTTP/1.1\r\n" + FIELDS, b"x-b: c\r\n" * 30),
    "path": (b"GET /" + b"a" * 2**14, b"a" * 2**14, b"a" * 2**14),
    "behind the body": (CHUNKED + b"0\r\n" + FIELDS, b"x-b: c\r\n" * 30),
    "within the body": (CHUNKED + b"1;x=", b"a" * 2**14, b"a" * 2**14, b"a" * 2**14),
}


@pytest.mark.parametrize("case", LONG_HEADS)
def test_a_long_head_is_refused(place, case):
    assert told_of(place[1], *LONG_HEADS[case]) == [431]
    assert place[1].ask("/v2").status == 200


def test_heads_that_follow_one_another_are_counted_apart(place):
    body, headers = asking(features(2))
    told = {**headers, "content-length": str(len(body))}
    fields = "".join(f"{key}: {value}\r\n" for key, value in told.items()).encode()
    whole = b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\n" + FIELDS[: 8 * 800] + fields + b"\r\n" + body
    # In one read: three requests, and the start of one that is none. Those before it are answered first.
    assert told_of(place[1], whole * 3 + b"GET", b"\0") == [200, 200, 200, 400]


def test_requests_ahead_of_their_answers_are_bounded(place):
    found = told_of(place[1], b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 500)
    assert found == [200] * 65 + [429]
    assert told_of(place[1], b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 60 + b"\0") == [200] * 60 + [400]


def test_what_follows_a_body_takes_no_memory(place):
    server = place[1]
    fields = b"a:b\r\n" * 10_000

    def resident_mib() -> float:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    before = resident_mib()
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(CHUNKED + b"0\r\n")
        with contextlib.suppress(OSError):  # it is closed long before
            for _ in range(200):
                connection.sendall(fields)
        assert resident_mib() < before + 20


def test_metrics_are_on_a_port_of_their_own(place):
    _, server = place
    assert server.ask("/metrics").status == 404
    host, _, port = server.told["metrics"].removeprefix("http://").removesuffix("/metrics").rpartition(":")
    assert host == "127.0.0.1"
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
    connection.request("GET", "/metrics")
    found = connection.getresponse()
    assert found.status == 200
    assert b"louver_requests_total" in found.read()
    connection.close()


# Slow clients and too many


def test_slow_and_too_many_clients_are_ended(tmp_path):
    toy_bundle(tmp_path / "toy")
    options = ("--body-s", "0.5", "--head-s", "0.5", "--max-connections", "9", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        address = (server.host, server.port)

        def told(connection: socket.socket) -> bytes:
            connection.settimeout(10)
            try:
                return connection.recv(2**16)
            except ConnectionResetError:
                return b""

        # A head that never ends, one that never begins, and one that comes byte by byte.
        started = time.monotonic()
        with socket.create_connection(address) as a, socket.create_connection(address) as b:
            a.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nhost:")
            assert told(a) == told(b) == b""
        assert time.monotonic() - started < 5
        # A body that never ends.
        with socket.create_connection(address) as one:
            one.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
            found = told(one)
            assert found.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in found
        # A connection more than there may be.
        held = [socket.create_connection(address) for _ in range(9)]
        with socket.create_connection(address) as one:
            found = told(one)
        assert found.startswith(b"HTTP/1.1 503")
        assert json.loads(found.partition(b"\r\n\r\n")[2]) == {"error": "too many connections"}
        for connection in held:
            connection.close()
        eventually(lambda: server.ask("/v2").status == 200)


def test_a_client_that_does_not_read_holds_nothing(tmp_path):
    """Scores that are asked for again and again on one connection, and never taken."""
    bundle = toy_bundle(tmp_path / "toy")
    options = ("--answer-s", "0.5", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        body, headers = asking(features(256))
        fields = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        head = f"POST {infer_path(bundle)} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{fields}\r\n"
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((server.host, server.port))
            one.settimeout(0.5)
            ended = False
            for _ in range(2000):
                try:
                    one.sendall(head.encode() + body)
                except TimeoutError:
                    time.sleep(0.1)
                    ended = _is_ended(one)
                    break
                except (BrokenPipeError, ConnectionResetError):
                    ended = True
                    break
            eventually(lambda: ended or _is_ended(one))
        assert server.ask(infer_path(bundle), *asking(features(2))).status == 200


def _is_ended(connection: socket.socket) -> bool:
    try:
        connection.send(b"x")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


# Signals


def in_flight(server: Running, path: str, body: bytes, headers: dict[str, str], count: int, act) -> list[int]:
    """Sends `count` requests at once, calls `act` when all have been sent, and gives their statuses."""
    sent = threading.Barrier(count + 1, timeout=PATIENCE_S)

    def one(_: int) -> tuple[int, bytes]:
        connection = server.connect()
        connection.request("POST", path, body, headers)
        sent.wait()
        found = connection.getresponse()
        content = found.read()
        connection.close()
        return found.status, content

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one, i) for i in range(count)]
        sent.wait()
        act()
        return [future.result()[0] for future in futures]


def slow_bundle(folder: Path, *, seed: int = 0):
    """A network that takes some tens of milliseconds for an image."""
    import onnx
    from onnx import helper, numpy_helper

    from louver.bundle import CLOUD, file_hash, write_manifest

    bundle = toy_bundle(folder, seed=seed)
    model = onnx.load(folder / CLOUD)
    rng = np.random.default_rng(0)
    side = 80
    weight = (rng.normal(size=(side, side)) / side).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "slow"))
    nodes = list(model.graph.node)
    flat = next(node for node in nodes if node.op_type == "Flatten").output[0]
    last = flat
    made = []
    for i in range(3000):
        made.append(helper.make_node("MatMul", [last, "slow"], [f"slow_{i}"]))
        last = f"slow_{i}"
    final = nodes.pop()
    final.input[0] = last
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *made, final])
    (folder / CLOUD).write_bytes(model.SerializeToString())
    files = {**bundle.serving.files, CLOUD: file_hash(folder / CLOUD)}
    return write_manifest(folder, "toy", type(bundle.serving)(**{**vars(bundle.serving), "files": files}), {})


def test_sigterm_with_two_hundred_in_flight_loses_none(tmp_path):
    bundle = slow_bundle(tmp_path / "toy")
    options = ("--max-batch", "1", "--workers", "1", "--drain-s", "1")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:

        def end() -> None:
            # All have been written by their clients; wait until the server has read them too.
            eventually(lambda: waiting(server) > 100)
            server.process.send_signal(signal.SIGTERM)

        found = in_flight(server, infer_path(bundle), *asking(features(1)), 200, end)
        assert found == [200] * 200
        assert server.process.wait(PATIENCE_S) == 0
        assert server.lines("draining")[0]["waiting"] > 50  # it was not over before it began


def waiting(server: Running) -> float:
    host, _, port = server.told["metrics"].removeprefix("http://").removesuffix("/metrics").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("louver_waiting"))


def test_draining_says_so_and_goes_on_answering(tmp_path):
    bundle = toy_bundle(tmp_path / "toy")
    with running(tmp_path / "log", tmp_path / "toy", options=("--drain-s", "30")) as server:
        assert server.ask("/v2/health/ready").status == 200
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.ask("/v2/health/ready").status == 503)
        assert server.ask("/v2/models/toy/ready").status == 503
        assert server.ask("/v2/health/live").status == 200
        found = server.ask(infer_path(bundle), *asking(features(3)))
        assert (found.status, found.headers["connection"]) == (200, "close")
        with grpc.insecure_channel(server.told["grpc"]) as channel:
            ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=PATIENCE_S)
        assert ready == b""  # false is the default of a field
        server.process.send_signal(signal.SIGTERM)  # a second time: at once
        assert server.process.wait(10) == 0


def test_sighup_swaps_under_load_and_no_request_fails(tmp_path):
    live = tmp_path / "live"
    made = [toy_bundle(tmp_path / f"v{seed}", seed=seed) for seed in range(3)]
    live.symlink_to(tmp_path / "v0")
    feature = features(2)
    body, headers = asking(feature)
    wanted = {bundle.id: truth(bundle, feature) for bundle in made}
    stop = threading.Event()
    old, current = set(), set()
    with running(tmp_path / "log", live, options=("--drain-s", "0")) as server:

        def ask_on(path: str, versions: set[str]) -> None:
            connection = server.connect()
            while not stop.is_set():
                connection.request("POST", path, body, headers)
                found = connection.getresponse()
                content = found.read()
                assert found.status == 200, content
                size = int(found.headers["inference-header-content-length"])
                version = json.loads(content[:size])["model_version"]
                scores = np.frombuffer(content[size:], "<f4").reshape(2, -1)
                np.testing.assert_allclose(scores, wanted[version], rtol=1e-4, atol=1e-4)
                versions.add(version)
            connection.close()

        with ThreadPoolExecutor(4) as pool:
            try:
                clients = [pool.submit(ask_on, infer_path(made[0]), old) for _ in range(2)]
                clients += [pool.submit(ask_on, "/v2/models/toy/infer", current) for _ in range(2)]
                eventually(lambda: old and current)
                for i in (1, 2):
                    beside = tmp_path / "beside"
                    beside.symlink_to(tmp_path / f"v{i}")
                    beside.rename(live)
                    server.process.send_signal(signal.SIGHUP)
                    eventually(lambda i=i: made[i].id in current)
                # A bundle that is damaged changes nothing.
                (tmp_path / "v2" / "cloud.onnx").write_bytes(b"damaged")
                server.process.send_signal(signal.SIGHUP)
                eventually(lambda: len(server.lines("bundles read")) == 3)
                time.sleep(0.1)
            finally:
                stop.set()
        for one in clients:
            one.result()
        assert old == {made[0].id}
        assert current == {bundle.id for bundle in made}
        (line,) = server.lines("bundle not loaded: what was served goes on")
        assert "not the file that was exported" in line["reason"]
        assert server.lines("bundles read")[2]["models"] == [f"toy/{made[2].id}"]


def test_sighup_without_the_makers_key_leaves_what_was_served(tmp_path):
    private, public = key_pair(tmp_path, "maker")
    content = public.read_bytes()
    first = toy_bundle(tmp_path / "toy")
    sign_bundle(tmp_path / "toy", key=private)
    refused = "bundle not loaded: what was served goes on"
    options = ("--maker-key", str(public), "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        for i, wrong in enumerate((None, b"no key"), 1):
            public.unlink() if wrong is None else public.write_bytes(wrong)
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda count=i: len(server.lines("bundles read")) == count, within_s=20)
            assert str(public) in server.lines(refused)[-1]["reason"]
            assert server.ask(infer_path(first), *asking(features(2))).status == 200
        public.write_bytes(content)
        second = toy_bundle(tmp_path / "toy", seed=1)
        sign_bundle(tmp_path / "toy", key=private)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.ask(infer_path(second), *asking(features(2))).status == 200, within_s=20)
        assert len(server.lines(refused)) == 2


def test_a_reload_that_ends_by_what_nobody_thought_of_says_so_and_the_next_works(caplog):
    def reload() -> list[str]:
        if not caplog.records:
            raise RuntimeError("unheard of")
        return []

    service = SimpleNamespace(repository=SimpleNamespace(reload=reload, current=[], leaving=[]))

    async def work() -> None:
        signals = _Signals(service, None)
        for words in ("ended by an error", "bundles read"):
            signals._read_again()
            while words not in caplog.messages:
                await asyncio.sleep(0.01)

    caplog.set_level("INFO", "louver.cloud")
    asyncio.run(asyncio.wait_for(work(), 10))
    assert caplog.records[0].what == "reading bundles"


def test_kill_9_in_a_batch_damages_nothing(tmp_path):
    bundle = slow_bundle(tmp_path / "toy")
    file = tmp_path / "tokens.json"
    token = add_client(file, "a", images_total=1000)
    body, headers = asking(features(1))
    headers["authorization"] = f"Bearer {token}"
    options = ("--tokens", str(file), "--max-batch", "4", "--workers", "1", "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:

        def kill() -> None:
            eventually(lambda: waiting(server) > 5)
            server.process.kill()

        with pytest.raises((ConnectionError, http.client.HTTPException)):
            in_flight(server, infer_path(bundle), body, headers, 60, kill)
        server.process.wait(PATIENCE_S)
    with running(tmp_path / "log2", tmp_path / "toy", options=options) as server:
        assert server.ask(infer_path(bundle), body, headers).status == 200
    used = json.loads((tmp_path / "tokens.json.budgets").read_text())["accounts"]["a"]["total_images"]
    assert 6 <= used <= 61 + 2 * 10


# Certificates


HERE, ELSEWHERE = ((x509.IPAddress(ipaddress.ip_address(host)),) for host in ("127.0.0.1", "127.0.0.9"))
PAST = (-9, -1)


def trusting(authority: Authority, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    found = ssl.create_default_context(cafile=authority.ca)
    if client is not None:
        found.load_cert_chain(*client)
    return found


def secure(server: Running, authority: Authority, client: tuple[Path, Path] | None = None) -> grpc.Channel:
    chain, key = (client[0].read_bytes(), client[1].read_bytes()) if client else (None, None)
    return grpc.secure_channel(server.told["grpc"], grpc.ssl_channel_credentials(authority.ca.read_bytes(), key, chain))


def test_tls_tokens_and_client_certificates(tmp_path):
    bundle = toy_bundle(tmp_path / "toy")
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    cert, key = ours.issue("server", names=HERE)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    good, stranger = ours.issue("device", usage=usage), theirs.issue("device", usage=usage)
    late = ours.issue("late", usage=usage, days=PAST)
    file = tmp_path / "tokens.json"
    token = add_client(file, "device")
    options = (
        *("--tls-cert", str(cert), "--tls-key", str(key), "--client-ca", str(ours.ca)),
        *("--tokens", str(file), "--drain-s", "0"),
    )
    feature = features(3)
    body, headers = asking(feature)
    message = infer_message(feature, raw_input_contents=feature.tobytes())
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        assert server.told["rest"].startswith("https://")
        found = server.ask(infer_path(bundle), body, headers, token=token, tls=trusting(ours, good))
        np.testing.assert_allclose(found.scores, truth(bundle, feature), rtol=1e-5, atol=1e-5)
        assert call(server, message, channel=secure(server, ours, good), token=token).model_name == "toy"
        # A certificate is no token.
        assert server.ask(infer_path(bundle), body, headers, tls=trusting(ours, good)).status == 401
        with pytest.raises(grpc.RpcError) as refused:
            call(server, message, channel=secure(server, ours, good))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        # A token is no certificate: without one, with a stranger's, with an expired one.
        for client in (None, stranger, late):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
                server.ask("/v2/health/live", tls=trusting(ours, client))
            with pytest.raises(grpc.RpcError) as refused:
                call(server, message, channel=secure(server, ours, client), token=token)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        # A client that trusts another authority does not talk to this server.
        with pytest.raises(ssl.SSLCertVerificationError):
            server.ask("/v2/health/live", tls=trusting(theirs, good))
        # Plain HTTP on the port of TLS.
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            server.ask("/v2/health/live")
        remove_client(file, "device")
        eventually(lambda: server.ask("/v2", token=token, tls=trusting(ours, good)).status == 401)


@pytest.mark.parametrize("wrong", ["expired", "another host"])
def test_a_client_sees_a_wrong_server_certificate(tmp_path, wrong):
    toy_bundle(tmp_path / "toy")
    ours = Authority(tmp_path / "ours", "ours")
    cert, key = ours.issue("server", **({"names": HERE, "days": PAST} if wrong == "expired" else {"names": ELSEWHERE}))
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--drain-s", "0")
    with running(tmp_path / "log", tmp_path / "toy", options=options) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            server.ask("/v2/health/live", tls=trusting(ours))
        relaxed = trusting(ours)
        relaxed.check_hostname, relaxed.verify_mode = False, ssl.CERT_NONE
        assert server.ask("/v2/health/live", tls=relaxed).status == 200


# Commands of the document


def test_curl(place, tmp_path):
    """The commands of docs/serving.md, on this server."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    _, server = place
    document = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    commands = [
        line.replace("http://127.0.0.1:8000", server.told["rest"]).replace(
            "http://127.0.0.1:8002/metrics", server.told["metrics"]
        )
        for line in document.replace("\\\n", " ").splitlines()
        if line.startswith("curl ")
    ]
    assert len(commands) >= 5
    feature = features(1)
    head = json.dumps({"inputs": [{**asking_head(feature)}], "outputs": BYTES}).encode()
    (tmp_path / "body.bin").write_bytes(head + feature.tobytes())
    numbers = {**asking_head(feature), "parameters": {}, "data": feature.reshape(-1).tolist()}
    (tmp_path / "body.json").write_text(json.dumps({"inputs": [numbers]}))
    for command in commands:
        done = subprocess.run(
            command.replace("HEADBYTES", str(len(head))).replace("$TOKEN", "none"),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "scores.bin").stat().st_size > 4 * N_SCORES


BYTES = [{"name": "scores", "parameters": {"binary_data": True}}]


def asking_head(feature: np.ndarray) -> dict:
    return {
        "name": "feature",
        "shape": list(feature.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": feature.nbytes},
    }
