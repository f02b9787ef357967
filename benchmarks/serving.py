"""What the server adds: to an echo of the same bytes at one client, and to bare onnxruntime under load.

One run, by turns. Every server has tokens, metrics and its log on, and two cores are shared by client and server, as
for the echo. `overhead`: p50 and p99 in ms of one client with one connection, ratios of the same round. The network is
one slice, so that what is left is the server and a call of onnxruntime; `run` is the echo with that call in it.
`throughput`: 32 clients, one image each, against the same session run in this process by as many threads, in batches
that those clients could fill; with `--triton` against a real Triton, too, whose wheel runs the graph by a Python model.

    python benchmarks/serving.py [--rounds 5] [--calls 400] [--seconds 5] [--bundle DIR] [--triton ENV]
                                 [--only overhead|throughput]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from common import record
from louver.bundle import CLOUD, Bundle, Serving, file_hash, read_bundle, write_manifest
from louver.cloud import Batching
from louver.cloud import inference_pb2 as messages
from louver.cloud.models import Model, load_model
from louver.cloud.tokens import add_client
from louver.triton import triton_name

SIZES = {"64 KiB": (64, 32, 32), "1 MiB": (256, 64, 64)}
CLIENTS = 32
WARM = 50
TURN = 20


def write_bundle(
    folder: Path, name: str, shape: tuple[int, ...], nodes: list[Any], constants: dict[str, Any]
) -> Bundle:
    """A bundle with a cloud half only, from uint8 to ten scores."""
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("feature", TensorProto.UINT8, ["n", *shape])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / CLOUD).write_bytes(model.SerializeToString())
    serving = Serving(
        cut="benchmark",
        image_shape=(3, 224, 224),
        encoding="uint8",
        feature_shape=shape,
        output_shape=(10,),
        files={CLOUD: file_hash(folder / CLOUD)},
    )
    return write_manifest(folder, name, serving, {})


def slice_bundle(folder: Path, name: str, shape: tuple[int, ...]) -> Bundle:
    """Next to no work: the first ten bytes as numbers."""
    nodes = [
        helper.make_node("Flatten", ["feature"], ["flat"]),
        helper.make_node("Slice", ["flat", "start", "end", "axis"], ["few"]),
        helper.make_node("Cast", ["few"], ["scores"], to=TensorProto.FLOAT),
    ]
    constants = {key: np.array([value], np.int64) for key, value in (("start", 0), ("end", 10), ("axis", 1))}
    return write_bundle(folder, name, shape, nodes, constants)


def tail_bundle(folder: Path) -> Bundle:
    """The convolutions of resnet18 behind layer2 at 224 pixels, with drawn weights."""
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {"scale": np.float32(1 / 64), "zero": np.uint8(0)}
    nodes = [helper.make_node("DequantizeLinear", ["feature", "scale", "zero"], ["x0"])]
    widths = [128, 256, 256, 256, 256, 512, 512, 512, 512]
    for i, (inner, outer) in enumerate(pairwise(widths)):
        step = 2 if inner != outer else 1
        constants[f"w{i}"] = (rng.normal(size=(outer, inner, 3, 3)) / np.sqrt(inner * 4.5)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"y{i}"], pads=[1] * 4, strides=[step] * 2))
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    constants["fc"] = (rng.normal(size=(512, 10)) / 23).astype(np.float32)
    nodes.append(helper.make_node("GlobalAveragePool", [f"x{len(widths) - 1}"], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "fc"], ["scores"]))
    onnx.checker.check_node(nodes[0])
    return write_bundle(folder, "tail", (128, 28, 28), nodes, constants)


# Servers


Networks = dict[int, Callable[[NDArray[Any]], NDArray[np.float32]]]
"""What runs, by the bytes of a feature."""


def run_one(networks: Networks, content: bytes) -> None:
    """The scores of the feature at the end of `content`, for nobody."""
    n_bytes = max(size for size in networks if size <= len(content))
    networks[n_bytes](np.frombuffer(content, np.uint8, n_bytes, len(content) - n_bytes))


async def echo(networks: Networks, scope: Any, receive: Any, send: Any) -> None:
    """The least that an ASGI application can do with a body; at /run, a run of the network too."""
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message["body"])
        more = message["more_body"]
    body = b"".join(chunks)
    if scope["path"] == "/run":
        run_one(networks, body)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def serve_echo(bundles: Sequence[Path]) -> None:
    """Both echoes, with the settings of our server, until this process is killed."""
    import uvicorn

    def network(model: Model) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        return lambda feature: model.run(feature.reshape(1, *model.feature_shape))

    models = [load_model(folder, threads=Batching().threads) for folder in bundles]
    networks = {model.feature_bytes: network(model) for model in models}

    async def same(content: bytes, context: Any) -> bytes:
        return content

    async def run(content: bytes, context: Any) -> bytes:
        run_one(networks, content)
        return content

    rpc = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    handlers = {"Same": grpc.unary_unary_rpc_method_handler(same), "Run": grpc.unary_unary_rpc_method_handler(run)}
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", handlers),))
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        partial(echo, networks), interface="asgi3", http="httptools", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=75,
    )  # fmt: skip
    print(
        json.dumps({"rest": f"http://127.0.0.1:{listener.getsockname()[1]}", "grpc": f"127.0.0.1:{port}"}), flush=True
    )
    await uvicorn.Server(config).serve([listener])


@contextmanager
def started(*command: str) -> Iterator[dict[str, Any]]:
    """A server in a process of its own, and where it says that it is."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


# Clients


def body_of(bundle: Bundle, rows: int = 1) -> tuple[bytes, int]:
    """The body of a request, and the length of its JSON."""
    shape = [rows, *bundle.serving.feature_shape]
    rng = np.random.default_rng(0)
    tensor = rng.integers(0, 256, shape, np.uint8).tobytes()
    head = json.dumps(
        {
            "id": "0" * 32,
            "inputs": [
                {
                    "name": "feature",
                    "shape": shape,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
        }
    ).encode()
    return head + tensor, len(head)


def request_of(model: str, bundle: Bundle, token: str) -> bytes:
    """All of a request of HTTP for `model` (NAME/versions/VERSION), as a client of asyncio's streams writes it."""
    body, head = body_of(bundle)
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {token}\r\ninference-header-content-length: {head}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def rest_call(address: str, path: str, body: bytes, headers: dict[str, str]) -> Callable[[], None]:
    """One POST on a connection that is kept."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> None:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content[:200]

    return call


def rpc_call(address: str, method: str, content: bytes, token: str) -> Callable[[], None]:
    """One unary call on a channel that is kept."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    stub = grpc.insecure_channel(address, options=options).unary_unary(method)
    metadata = (("authorization", f"Bearer {token}"),)

    def call() -> None:
        stub(content, metadata=metadata)

    return call


def times(call: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


def rate_of_clients(address: str, model: str, bundle: Bundle, token: str, seconds: float) -> float:
    """Answers a second to 32 clients of `model` (NAME/versions/VERSION), a connection each, from one loop here."""
    request = request_of(model, bundle, token)
    host, _, port = address.removeprefix("http://").rpartition(":")
    count = 0

    async def client(until: float) -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < until:
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            await reader.readexactly(int(answer.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))
            count += 1
        writer.close()

    async def main() -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(until) for _ in range(CLIENTS)))

    start = time.monotonic()
    asyncio.run(main())
    return count / (time.monotonic() - start)


def rate_in_process(model: Model, batching: Batching, seconds: float) -> float:
    """Images a second of the session alone, by as many threads as the server has workers."""
    rows = max(1, CLIENTS // batching.workers)
    feature = np.random.default_rng(0).integers(0, 256, (rows, *model.feature_shape), np.uint8)
    counts = [0] * batching.workers
    start = time.monotonic()

    def work(i: int) -> None:
        while time.monotonic() - start < seconds:
            model.run(feature)
            counts[i] += rows

    threads = [threading.Thread(target=work, args=(i,)) for i in range(batching.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start)


def overhead(ours: dict[str, Any], bare: dict[str, Any], bundle: Bundle, token: str) -> dict[str, Callable[[], None]]:
    """The calls that are compared."""
    body, head = body_of(bundle)
    headers = {"authorization": f"Bearer {token}", "inference-header-content-length": str(head)}
    path = f"/v2/models/{bundle.name}/versions/{bundle.id}/infer"
    tensor = messages.ModelInferRequest.InferInputTensor(
        name="feature", datatype="UINT8", shape=[1, *bundle.serving.feature_shape]
    )
    message = messages.ModelInferRequest(
        model_name=bundle.name,
        model_version=bundle.id,
        id="0" * 32,
        inputs=[tensor],
        raw_input_contents=[body[head:]],
    ).SerializeToString()
    return {
        "rest": rest_call(ours["rest"], path, body, headers),
        "rest echo": rest_call(bare["rest"], path, body, headers),
        "rest run": rest_call(bare["rest"], "/run", body, headers),
        "grpc": rpc_call(ours["grpc"], "/inference.GRPCInferenceService/ModelInfer", message, token),
        "grpc echo": rpc_call(bare["grpc"], "/Echo/Same", message, token),
        "grpc run": rpc_call(bare["grpc"], "/Echo/Run", message, token),
    }


def measure_overhead(calls: dict[str, Callable[[], None]], rounds: int, count: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for name in calls:
        times(calls[name], WARM)
    for _ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        # In turns: what else this machine does then slows all of them alike.
        for _ in range(-(-count // TURN)):
            for name, call in calls.items():
                taken[name] += times(call, TURN)
        for name, values in taken.items():
            found[name].append((float(np.percentile(values, 50)), float(np.percentile(values, 99))))
    figures: dict[str, Any] = {
        name: {
            "p50_ms": round(median(p50 for p50, _ in values), 3),
            "p99_ms": round(median(p99 for _, p99 in values), 3),
        }
        for name, values in found.items()
    }
    for name in ("rest", "grpc"):
        for other, told in (("echo", f"{name} ratio of p50"), ("run", f"{name} ratio of p50 to run")):
            pairs = zip(found[name], found[f"{name} {other}"], strict=True)
            ratios = sorted(ours / bare for (ours, _), (bare, _) in pairs)
            figures[told] = [round(value, 2) for value in (ratios[0], median(ratios), ratios[-1])]
    return figures


def spread(ours: list[float], theirs: list[float]) -> list[float]:
    """Least, median and largest ratio over the rounds."""
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return [round(value, 3) for value in (ratios[0], median(ratios), ratios[-1])]


def measure_throughput(
    ours: dict[str, Any], loaded: Bundle, token: str, rounds: int, seconds: float, triton: str | None
) -> dict[str, Any]:
    batching = Batching()
    model = load_model(loaded.folder, threads=batching.threads)
    served, alone, others = [], [], []
    for _ in range(rounds):
        alone.append(rate_in_process(model, batching, seconds))
        served.append(rate_of_clients(ours["rest"], f"{loaded.name}/versions/{loaded.id}", loaded, token, seconds))
        if triton is not None:
            others.append(rate_of_clients(triton, f"{triton_name(loaded)}/versions/1", loaded, token, seconds))
    figures = {
        "clients": CLIENTS,
        "workers": batching.workers,
        "threads": batching.threads,
        "served_per_s": round(median(served), 1),
        "in_process_per_s": round(median(alone), 1),
        "ratio": spread(served, alone),
    }
    if others:
        figures |= {"triton_per_s": round(median(others), 1), "to_triton": spread(served, others)}
    return figures


@contextmanager
def triton_beside(environment: Path | None, bundle: Bundle, folder: Path) -> Iterator[str | None]:
    """The address of a real Triton with the cloud half of `bundle`, where there is one."""
    if environment is None:
        yield None
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tritons import triton_running  # type: ignore[import-not-found]

    folder.mkdir()
    with triton_running(environment, bundle, folder) as (port, _):
        yield f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="calls of each kind in a round")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of throughput")
    parser.add_argument(
        "--bundle", type=Path, help="whose cloud half is put under load; one like resnet18's by default"
    )
    parser.add_argument(
        "--triton", type=Path, metavar="ENV", help="an environment with nvidia-pytriton: its Triton, beside ours"
    )
    parser.add_argument("--only", choices=("overhead", "throughput"), help="one of the two, printed and not recorded")
    parser.add_argument("--dry", action="store_true", help="print the figures and record nothing")
    parser.add_argument("--echo", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_echo(arguments.echo))
        return
    begun = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        token = add_client(folder / "tokens.json", "benchmark")
        small = {size: slice_bundle(folder / "b" / size, size.replace(" ", "-"), SIZES[size]) for size in SIZES}
        loaded = read_bundle(arguments.bundle) if arguments.bundle else tail_bundle(folder / "b" / "tail")
        paths = [str(folder / "b"), *([str(arguments.bundle)] if arguments.bundle else [])]
        ports = ["--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        tokens = ["--tokens", str(folder / "tokens.json")]
        ours = stack.enter_context(started("-m", "louver", "serve", *paths, *ports, *tokens, "--json"))
        bare = stack.enter_context(started(__file__, "--echo", *(str(bundle.folder) for bundle in small.values())))
        figures: dict[str, Any] = {}
        if arguments.only != "throughput":
            figures["overhead"] = {}
            for size, bundle in small.items():
                calls = overhead(ours, bare, bundle, token)
                figures["overhead"][size] = measure_overhead(calls, arguments.rounds, arguments.calls)
                print(size, json.dumps(figures["overhead"][size]))
        if arguments.only != "overhead":
            triton = stack.enter_context(triton_beside(arguments.triton, loaded, folder / "triton"))
            figures["throughput"] = measure_throughput(ours, loaded, token, arguments.rounds, arguments.seconds, triton)
            print(json.dumps(figures["throughput"]))
    if not (arguments.dry or arguments.only):
        record("serving", {"rounds": arguments.rounds, **figures}, seed=0, seconds=time.monotonic() - begun)


if __name__ == "__main__":
    main()
