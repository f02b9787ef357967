"""What `Edge` costs over what it stands on, and how light a fresh edge process is.

python benchmarks/edge.py [BUNDLE] [--rounds 7] [--requests 60]

BUNDLE is a folder; without one it is resnet18 up to layer2 at 224 pixels a side, with weights that were never trained,
which is as fast as one with weights that were.

One server in a process of its own answers every request alike with scores that it never computed, so that what is
measured is the client. In turns, request by request of the same picture and with the same bytes on the wire:
`Edge.infer`; onnxruntime and urllib3 by hand; onnxruntime and http.client by hand. Then a fresh process each round:
seconds from its start until it is ready, and its peak memory after it has answered. Last `louver run` on a JPEG of
1920×1080, with two policies: the peak memory of the command.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import urllib3
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from common import record
from louver.bundle import EDGE, Bundle, Serving, file_hash, read_bundle, write_manifest
from louver.edge import Edge
from louver.edge.half import draw

ASKED = {"overhead_percent": 10.0, "ready_s": 0.5, "peak_rss_mib": 110.0}

FRESH = """
import sys
from louver.edge import Edge
with Edge(sys.argv[1], server=sys.argv[2]) as edge:
    print("ready", flush=True)
    import numpy as np
    images = np.full((1, *edge.bundle.serving.image_shape), 0.5, np.float32)
    for _ in range(int(sys.argv[3])):
        edge.infer(images)
"""

COMMANDED = """
from contextlib import suppress
from louver import cli
with suppress(SystemExit):
    cli.main()
"""

# Not getrusage: its peak is inherited from the process that started this one.
PEAK = """
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(int(peak) / 1024)
"""


def resnet18_half(folder: Path) -> Bundle:
    """resnet18 up to layer2 with normalization folded away, as a bundle without a cloud half."""
    rng = np.random.default_rng(0)
    nodes = []
    constants: dict[str, Any] = {"scale": np.float32(1 / 32), "zero": np.uint8(0)}

    def conv(x: str, name: str, c_in: int, c_out: int, side: int, stride: int) -> str:
        weight = rng.normal(size=(c_out, c_in, side, side), scale=(2 / (c_in * side * side)) ** 0.5)
        constants[f"{name}.weight"] = weight.astype(np.float32)
        constants[f"{name}.bias"] = np.zeros(c_out, np.float32)
        inputs, pads = [x, f"{name}.weight", f"{name}.bias"], [side // 2] * 4
        nodes.append(helper.make_node("Conv", inputs, [name], strides=[stride, stride], pads=pads))
        return name

    def relu(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"]))
        return f"{x}.relu"

    def block(x: str, name: str, c_in: int, c_out: int, stride: int) -> str:
        y = conv(relu(conv(x, f"{name}.1", c_in, c_out, 3, stride)), f"{name}.2", c_out, c_out, 3, 1)
        by = x if c_in == c_out else conv(x, f"{name}.by", c_in, c_out, 1, stride)
        nodes.append(helper.make_node("Add", [y, by], [name]))
        return relu(name)

    x = relu(conv("image", "stem", 3, 64, 7, 2))
    nodes.append(helper.make_node("MaxPool", [x], ["pool"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
    x = block(block("pool", "layer1.0", 64, 64, 1), "layer1.1", 64, 64, 1)
    x = block(block(x, "layer2.0", 64, 128, 2), "layer2.1", 128, 128, 1)
    nodes.append(helper.make_node("QuantizeLinear", [x, "scale", "zero"], ["feature"]))
    image, feature = (3, 224, 224), (128, 28, 28)
    graph = helper.make_graph(
        nodes,
        "edge",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *image])],
        [helper.make_tensor_value_info("feature", TensorProto.UINT8, ["n", *feature])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / EDGE).write_bytes(model.SerializeToString())
    serving = Serving(
        cut="layer2",
        image_shape=image,
        encoding="uint8",
        feature_shape=feature,
        output_shape=(1000,),
        files={EDGE: file_hash(folder / EDGE)},
    )
    return write_manifest(folder, "resnet18", serving, {})


def serve(n_scores: int, shape: list[int], tell: Connection) -> None:
    """Answers every POST with the same scores, as fast as Python can, until its parent ends it."""
    size = {"binary_data_size": 4 * n_scores}
    output = {"name": "scores", "shape": [1, *shape], "datatype": "FP32", "parameters": size}
    text = json.dumps({"outputs": [output]}).encode()
    content = text + np.arange(n_scores, dtype="<f4").tobytes()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nInference-Header-Content-Length: {len(text)}\r\n\r\n"
    answer = head.encode() + content

    def talk(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                n_bytes = 0
                while line.strip():
                    if line.lower().startswith(b"content-length:"):
                        n_bytes = int(line.split(b":")[1])
                    line = lines.readline()
                lines.read(n_bytes)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        tell.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=talk, args=(connection,), daemon=True).start()


def clients(bundle: Bundle, edge: Edge, port: int) -> dict[str, Callable[[], None]]:
    """What is compared; each sends the feature of one picture and reads its scores."""
    serving = bundle.serving
    image = np.random.default_rng(0).random((1, *serving.image_shape), np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle.path(EDGE), options)
    prepared = edge._prepare(image).request  # the same bytes for all
    path = f"/v2/models/{bundle.name}/versions/{bundle.id}/infer"
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Encoding": "zstd",
        "Inference-Header-Content-Length": str(prepared.header_length),
        "Accept-Encoding": "identity",
    }
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port)
    line = http.client.HTTPConnection("127.0.0.1", port)

    def compute() -> None:
        session.run(["feature"], {"image": image, **draw(serving.noise, 1)})

    def by_urllib3() -> None:
        compute()
        assert len(pool.urlopen("POST", path, body=prepared.body, headers=headers).data) > 0

    def by_http_client() -> None:
        compute()
        line.request("POST", path, prepared.body, headers)
        assert len(line.getresponse().read()) > 0

    return {"edge": lambda: _infer(edge, image), "urllib3": by_urllib3, "http.client": by_http_client}


def _infer(edge: Edge, image: np.ndarray) -> None:
    assert edge.infer(image).source == "cloud"


def in_turns(ways: dict[str, Callable[[], None]], *, rounds: int, requests: int) -> dict[str, list[list[float]]]:
    """Milliseconds of each request, round by round; the ways take turns, so that a busy moment hits them all."""
    out: dict[str, list[list[float]]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(5):
            way()
    for k in range(rounds):
        times: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)[k % len(ways) :] + list(ways)[: k % len(ways)]
        for _ in range(requests):
            for name in names:
                started = time.perf_counter()
                ways[name]()
                times[name].append(1e3 * (time.perf_counter() - started))
        for name, values in times.items():
            out[name].append(values)
    return out


def fresh(folder: Path, server: str, requests: int) -> tuple[float, float]:
    """(seconds until ready, peak MiB) of a process that starts, gets ready and answers."""
    started = time.perf_counter()
    command = [sys.executable, "-c", FRESH + PEAK, str(folder), server, str(requests)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        ready_s = time.perf_counter() - started
        peak = float(process.stdout.read())
    assert process.returncode == 0
    return ready_s, peak


def commanded(folder: Path, server: str, picture: Path, *options: str) -> float:
    """Peak MiB of `louver run` on one picture."""
    words = ["run", str(folder), str(picture), "--server", server, *options]
    done = subprocess.run([sys.executable, "-c", COMMANDED + PEAK, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_command(bundle: Bundle, server: str, rounds: int) -> dict[str, list[float]]:
    """By policy, the peak of each round."""
    found: dict[str, list[float]] = {"fail": [], "queue": []}
    with tempfile.TemporaryDirectory() as folder:
        picture, queue = Path(folder) / "picture.jpg", Path(folder) / "queue"
        pixels = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
        Image.fromarray(pixels).save(picture)
        for _ in range(rounds):
            found["fail"].append(round(commanded(bundle.folder, server, picture), 1))
            options = ("--policy", "queue", "--queue", str(queue))
            found["queue"].append(round(commanded(bundle.folder, server, picture, *options), 1))
    return found


def summary(times: list[list[float]]) -> dict[str, Any]:
    """Median and p99 of each round, and the medians of these."""
    medians = [float(np.median(one)) for one in times]
    tails = [float(np.quantile(one, 0.99)) for one in times]
    return {
        "p50_ms": round(float(np.median(medians)), 3),
        "p99_ms": round(float(np.median(tails)), 3),
        "p50_ms_by_round": [round(one, 3) for one in medians],
        "p99_ms_by_round": [round(one, 3) for one in tails],
    }


def measure(bundle: Bundle, port: int, *, rounds: int, requests: int) -> dict[str, Any]:
    server = f"http://127.0.0.1:{port}"
    with Edge(bundle, server=server) as edge:
        times = in_turns(clients(bundle, edge, port), rounds=rounds, requests=requests)
        image = np.full((1, *bundle.serving.image_shape), 0.5, np.float32)
        sent = edge.infer(image).sent_bytes
    processes = [fresh(bundle.folder, server, 20) for _ in range(rounds)]
    found = {name: summary(one) for name, one in times.items()}
    overhead = {}
    for name in ("urllib3", "http.client"):
        ratios = [np.median(ours) / np.median(bare) for ours, bare in zip(times["edge"], times[name], strict=True)]
        overhead[name] = round(100 * (float(np.median(ratios)) - 1), 2)
    return {
        "bundle": {"name": bundle.name, "image_shape": list(bundle.serving.image_shape), "sent_bytes": sent},
        "rounds": rounds,
        "requests_a_round": requests,
        "times": found,
        "overhead_percent": overhead,
        "ready_s": [round(one, 3) for one, _ in processes],
        "peak_rss_mib": [round(one, 1) for _, one in processes],
        "command_peak_rss_mib": measure_command(bundle, server, rounds),
        "asked": ASKED,
        "is_met": {
            "overhead": max(overhead.values()) <= ASKED["overhead_percent"],
            "ready": float(np.median([one for one, _ in processes])) <= ASKED["ready_s"],
            "peak_rss": max(one for _, one in processes) <= ASKED["peak_rss_mib"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--dry", action="store_true", help="print, and record nothing")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bundle = read_bundle(arguments.bundle, needs=(EDGE,)) if arguments.bundle else resnet18_half(Path(folder))
        figures = against_a_server(bundle, rounds=arguments.rounds, requests=arguments.requests)
    print(json.dumps(figures, indent=1))
    if not arguments.dry:
        print(record("edge", figures, seed=0, seconds=time.monotonic() - begun))


def against_a_server(bundle: Bundle, *, rounds: int, requests: int) -> dict[str, Any]:
    shape = list(bundle.serving.output_shape)
    ours, theirs = multiprocessing.Pipe()
    # Spawned: a forked server would carry this process's torch and its threads.
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(math.prod(shape), shape, theirs), daemon=True
    )
    process.start()
    try:
        return measure(bundle, ours.recv(), rounds=rounds, requests=requests)
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
