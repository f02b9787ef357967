"""Random and mutated bodies over REST, guided by coverage: no crash, no growth, always 4xx with a reason.

python benchmarks/fuzz.py [--minutes 60]

Needs atheris (pip install atheris). The body, its encoding and the length that its head claims are the fuzzer's; seeds
are true requests. A status of 500 or more, an answer without a reason, or one that never comes ends the run and is a
failure. Messages of gRPC are not asked here: tests/cloud/test_cloud_fuzz.py mutates those.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ENCODINGS = (b"identity", b"zstd", b"gzip", b"deflate", b"br", b"zstd, gzip")
MOST_GROWTH_MIB = 64


def seeds(folder: Path) -> None:
    """True requests of every encoding: one byte for the encoding, two for the length of the head, then the body."""
    import zstandard

    feature = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 5), np.uint8)
    tensor = {"name": "feature", "shape": [2, 4, 4, 5], "datatype": "UINT8"}
    binary = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": feature.nbytes}}]}).encode()
    whole = json.dumps({"inputs": [{**tensor, "data": feature.ravel().tolist()}]}).encode()
    for name, head, body in (("binary", len(binary), binary + feature.tobytes()), ("json", 0, whole)):
        packed = {0: body, 1: zstandard.compress(body), 2: zlib.compress(body, wbits=31), 3: zlib.compress(body)}
        for encoding, content in packed.items():
            (folder / f"{name}-{encoding}").write_bytes(bytes([encoding]) + head.to_bytes(2, "little") + content)


def fuzz(corpus: Path, seconds: int) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["louver.cloud"]):
        from louver.cloud import Repository, Settings, create_app
    sys.path.insert(0, str(ROOT / "tests"))
    from bundles import toy_bundle  # type: ignore[import-not-found]

    bundle = toy_bundle(Path(tempfile.mkdtemp()) / "bundle")
    loop = asyncio.new_event_loop()
    app = create_app(Repository([bundle.folder]), Settings())
    path = f"/v2/models/{bundle.name}/versions/{bundle.id}/infer"
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 0

    async def asked(body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await asyncio.wait_for(app(scope, receive, send), 10)
        return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:])

    def one(data: bytes) -> None:
        nonlocal count, start
        encoding, head = (
            ENCODINGS[data[0] % len(ENCODINGS)] if data else b"identity",
            int.from_bytes(data[1:3], "little"),
        )
        headers = [(b"content-encoding", encoding)]
        headers += [(b"inference-header-content-length", str(head).encode())] if head else []
        status, body = loop.run_until_complete(asked(data[3:], headers))
        assert status == 200 or (400 <= status < 500 and json.loads(body)["error"]), (status, body[:200])
        count += 1
        if count == 5000:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if count % 5000 == 0:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024
            print(f"grown {grown} MiB", file=sys.stderr, flush=True)
            assert grown <= MOST_GROWTH_MIB, f"memory grew by {grown} MiB"

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=20", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.corpus is not None:
        fuzz(arguments.corpus, round(60 * arguments.minutes))
        return
    from common import record

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as there:
        seeds(Path(there))
        command = [sys.executable, __file__, "--minutes", str(arguments.minutes), "--corpus", there]
        done = subprocess.run(command, capture_output=True, text=True, cwd=there, check=False)
        n_seeds = len(list(Path(there).iterdir()))
    found = re.findall(r"^Done (\d+) runs in \d+ second", done.stderr, re.MULTILINE)
    if done.returncode != 0 or not found:
        sys.exit(f"the fuzzer found something (code {done.returncode}):\n{done.stderr[-4000:]}")
    grown = [int(value) for value in re.findall(r"^grown (\d+) MiB", done.stderr, re.MULTILINE)]
    figures = {
        "bodies": int(found[-1]),
        "corpus": n_seeds,
        "crashes": 0,
        "MiB grown after the first 5,000": max(grown) if grown else None,
    }
    print(record("fuzz", figures, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
