"""A real Triton server on loopback, from an environment that holds the wheel nvidia-pytriton.

Its binary knows models in Python alone, so the ONNX graph is run by a few lines of that.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from louver.bundle import Bundle
from louver.triton import write_triton

MODEL = """
import pathlib, numpy, onnxruntime
import triton_python_backend_utils as backend

class TritonPythonModel:
    def initialize(self, args):
        path = pathlib.Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path))

    def execute(self, requests):
        features = [backend.get_input_tensor_by_name(one, "feature").as_numpy() for one in requests]
        scores = self.session.run(None, {"feature": numpy.concatenate(features)})[0]
        ends = numpy.cumsum([len(one) for one in features])[:-1]
        parts = numpy.split(scores, ends)
        return [backend.InferenceResponse([backend.Tensor("scores", part)]) for part in parts]
"""


@contextmanager
def triton_running(environment: Path, bundle: Bundle, folder: Path) -> Iterator[tuple[int, int]]:
    """Ports of a Triton server with the bundle's cloud half: (REST, gRPC). Its files and its log go to `folder`."""
    model = write_triton(bundle, folder / "models")
    config = model / "config.pbtxt"
    text = config.read_text().replace('backend: "onnxruntime"', 'backend: "python"')
    config.write_text(text)
    (model / "1" / "model.py").write_text(MODEL)
    (packages,) = environment.glob("lib/python3*/site-packages")
    home = packages / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / packages.parent.name.removeprefix("python") / "triton_python_backend_stub"
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends)
    shutil.copy(stub, backends / "python")
    ports = [_free_port() for _ in range(3)]
    command = [str(home / "bin" / "tritonserver"), "--model-repository", str(folder / "models")]
    command += ["--backend-directory", str(backends), "--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"]
    command += [f"--{what}-port={port}" for what, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    variables = os.environ | {
        "PYTHONPATH": str(packages),
        "PATH": f"{environment}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://127.0.0.1:{ports[0]}/v2/health/ready", process, folder / "log")
        yield ports[0], ports[1]
    finally:
        process.terminate()
        process.wait(20)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(address, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-2000:])
