"""Every byte that a device sends, read on the wire: the feature, and nothing else of the picture."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import zstandard
from PIL import Image

from bundles import IMAGE, toy_bundle
from clouds import Cloud, Tap, answer, reset_after, status
from louver.bundle import EDGE
from louver.edge import Edge, Settings

ALLOWED = {
    "accept-encoding", "authorization", "content-encoding", "content-length", "content-type", "host",
    "inference-header-content-length", "user-agent",
}  # fmt: skip


def picture() -> np.ndarray:
    """One picture whose bytes are its own: no two windows of it occur by chance elsewhere."""
    levels = np.random.default_rng(7).integers(0, 256, (1, *IMAGE), dtype=np.uint8)
    return levels.astype(np.float32) / np.float32(255)


def forms(image: np.ndarray) -> dict[str, bytes]:
    """The picture as it might slip out."""
    levels = np.rint(image[0] * 255).astype(np.uint8)
    upright = np.ascontiguousarray(levels.transpose(1, 2, 0))
    out = {
        "levels, channels first": levels.tobytes(),
        "levels, channels last": upright.tobytes(),
        "float32": image.astype("<f4").tobytes(),
        "float32, big": image.astype(">f4").tobytes(),
        "float16": image.astype("<f2").tobytes(),
        "float64": image.astype("<f8").tobytes(),
        "float32, channels last": image[0].transpose(1, 2, 0).astype("<f4").tobytes(),
    }
    for form in ("PNG", "JPEG", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.fromarray(upright).save(file, form)
        out[form] = file.getvalue()
    return out


def windows(content: bytes, size: int = 16) -> set[bytes]:
    return {content[i : i + size] for i in range(len(content) - size + 1)}


def everything_in(sent: bytes) -> list[bytes]:
    """What was sent and all that decodes from any place of it where a compressed stream could begin."""
    out = [bytes(sent)]
    for i in range(len(sent)):
        if sent[i : i + 4] == b"\x28\xb5\x2f\xfd":
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(sent[i:])) as reader:
                out.append(reader.read(2**20))
        for kind, wbits in ((b"\x1f\x8b", 31), (b"\x78", 15)):
            if sent.startswith(kind, i):
                try:
                    out.append(zlib.decompressobj(wbits).decompress(sent[i:]))
                except zlib.error:
                    continue
    return out


def requests_in(sent: bytes) -> list[tuple[str, dict[str, str], bytes]]:
    """(first line, headers, body) of each request; together they are every byte that was sent."""
    out = []
    while sent:
        head, _, rest = sent.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"])
        assert len(rest) >= length
        out.append((first, headers, rest[:length]))
        sent = rest[length:]
    return out


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
@pytest.mark.parametrize("encoding", ["uint8", "float32"])
def test_what_leaves_is_the_feature_and_nothing_else(
    tmp_path: Path, encoding: str, compression: str, is_padded: bool
) -> None:
    bundle = toy_bundle(tmp_path, encoding=encoding)
    image = picture()
    settings = Settings(compression=compression, is_padded=is_padded, backoff_s=0.01)
    with Cloud(bundle) as cloud, Tap(cloud.port) as tap:
        with Edge(bundle, server=tap.address, token="hush", settings=settings) as edge:
            cloud.script.extend([status(503), answer])
            edge.infer(image)
        sent = bytes(tap.sent)

    session = onnxruntime.InferenceSession(bundle.path(EDGE))
    (feature,) = session.run(["feature"], {"image": image})
    found = requests_in(sent)
    assert len(found) == 2
    for first, headers, body in found:
        assert first == f"POST /v2/models/toy/versions/{bundle.id}/infer HTTP/1.1"
        assert set(headers) <= ALLOWED
        assert headers["user-agent"] == "louver"
        if compression == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True) as reader:
                content = reader.read()
        else:
            content = gzip.decompress(body) if compression == "gzip" else body
        length = int(headers["inference-header-content-length"])
        header = json.loads(content[:length])
        assert re.fullmatch(r"[0-9a-f]{32}", header.pop("id"))
        assert header == {
            "inputs": [
                {
                    "name": "feature",
                    "shape": list(feature.shape),
                    "datatype": "UINT8" if encoding == "uint8" else "FP32",
                    "parameters": {"binary_data_size": feature.nbytes},
                }
            ],
            "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
        }
        assert content[length:] == feature.tobytes()

    seen = set().union(*(windows(one) for one in everything_in(sent)))
    for form, content in forms(image).items():
        own = {one for one in windows(content) if len(set(one)) > 4}
        assert own, form
        assert not own & seen, form


def test_the_search_finds_a_picture_that_does_leave() -> None:
    """Each form in each wrapping is found, so that finding none says something."""
    image = picture()
    for form, content in forms(image).items():
        own = {one for one in windows(content) if len(set(one)) > 4}
        for wrap in (bytes, gzip.compress, zlib.compress, zstandard.ZstdCompressor().compress):
            sent = b"POST / HTTP/1.1\r\n\r\n" + wrap(content) + b"tail"
            assert own & set().union(*(windows(one) for one in everything_in(sent))), (form, wrap)


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_what_fills_up_is_constant(tmp_path: Path, compression: str) -> None:
    bundle = toy_bundle(tmp_path)
    with Cloud(bundle) as cloud:
        with Edge(bundle, server=cloud.address, settings=Settings(compression=compression)) as edge:
            for image in (picture(), np.zeros((1, *IMAGE), np.float32)):
                edge.infer(image)
        bodies = [seen.body for seen in cloud.seen]
    assert len({len(body) for body in bodies}) == 1
    for body in bodies:
        if compression == "zstd":
            data = zstandard.ZstdDecompressor().decompressobj()
            data.decompress(body)
            padding = data.unused_data
            assert padding[:4] == b"\x50\x2a\x4d\x18"
            assert int.from_bytes(padding[4:8], "little") == len(padding) - 8
            assert set(padding[8:]) <= {0}
        else:
            comment, _, _ = body[10:].partition(b"\0")
            assert len(comment) > 50
            assert set(comment) == {ord(" ")}


def test_a_try_that_breaks_sends_the_same_bytes_again(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path, has_noise=True)
    with Cloud(bundle) as cloud, Tap(cloud.port) as tap:
        cloud.script.extend([reset_after(0), status(503), answer])
        with Edge(bundle, server=tap.address, settings=Settings(backoff_s=0.01)) as edge:
            assert edge.infer(picture()).tries == 3
        bodies = [body for _, _, body in requests_in(bytes(tap.sent))]
    # One noise a request: sent with fresh noise each try, the noise would average out.
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
