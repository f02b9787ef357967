"""A bundle in service between two processes of this machine: what is answered, how much is sent, how long it takes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from louver.bundle import Bundle
from louver.edge import Edge
from louver.errors import CloudAwayError
from louver.types import Images, Progress

__all__ = ["Service", "served", "try_service"]

_JPEG_QUALITY = 90
_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a bundle in service did with `n_images`, one request each.

    Bytes are for one image: the body as sent, the feature as float32, the picture as JPEG of quality 90. Times are in
    milliseconds: the edge half, and all from sending to the answer.
    """

    n_images: int
    accuracy: float | None
    sent_bytes: float
    float32_bytes: int
    jpeg_bytes: float
    edge_ms_median: float
    edge_ms_p99: float
    wire_ms_median: float
    wire_ms_p99: float


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server for the bundle in `folder`, a process of its own on free ports of this machine.

    Raises:
        CloudAwayError: it does not start; the message holds the end of what it said.
    """
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0", "--drain-s", "0")
    command = [sys.executable, "-m", "louver", "serve", str(folder), *ports, "--json"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise CloudAwayError(f"the server did not start: {log.read()[-2000:].decode(errors='replace').strip()}")
            yield str(json.loads(line)["rest"])
        finally:
            process.terminate()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def try_service(
    bundle: Bundle, images: Images, truth: NDArray[np.int64] | None, progress: Progress | None = None
) -> Service:
    """Serves `bundle`, sends it `images` one by one, and says what came of it; accuracy where there is a `truth`.

    Raises:
        CloudError: the server gave no answer.
    """
    answers, edge_ms, wire_ms, sizes = list[int](), list[float](), list[float](), list[int]()
    with served(bundle.folder) as address, Edge(bundle, server=address) as edge:
        edge.infer(images.floats(slice(0, 1)))  # connects, and runs both halves for the first time
        for i in range(len(images)):
            answer = edge.infer(images.floats(slice(i, i + 1)))
            assert answer.scores is not None
            answers.append(int(answer.scores[0].argmax()))
            edge_ms.append(answer.edge_ms)
            wire_ms.append(answer.wire_ms)
            sizes.append(answer.sent_bytes)
            if progress is not None:
                progress("in service", (i + 1) / len(images))
    return Service(
        n_images=len(images),
        accuracy=None if truth is None else float(np.mean(np.array(answers) == truth)),
        sent_bytes=float(np.mean(sizes)),
        float32_bytes=int(bundle.record["cost"]["float32_feature_bytes"]),
        jpeg_bytes=float(np.mean([_jpeg_bytes(one) for one in images.floats()])),
        edge_ms_median=float(np.median(edge_ms)),
        edge_ms_p99=float(np.percentile(edge_ms, 99)),
        wire_ms_median=float(np.median(wire_ms)),
        wire_ms_p99=float(np.percentile(wire_ms, 99)),
    )


def _jpeg_bytes(picture: NDArray[np.float32]) -> int:
    from PIL import Image

    pixels = (picture.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.tell()
