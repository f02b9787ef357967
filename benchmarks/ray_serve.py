"""Ray: images a second for each replica, for one, two and three of them, and requests lost while one becomes three.

One cluster of two raylets on this machine, with tokens, metrics and logs on; each replica runs one batch at a time on
one thread. On fewer cores than replicas, clients, HAProxy and Ray need, replicas share them:
compare the figures with the cores that are recorded beside them. Needs ray and torch in one environment.

    python benchmarks/ray_serve.py [--seconds 10] [--rounds 3] [--bundle DIR] [--dry]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common import record
from louver.bundle import Bundle, read_bundle
from louver.cloud.tokens import add_client
from serving import request_of, tail_bundle

CLUSTER = Path(__file__).parents[1] / "tests/ray_cluster.py"
REPLICAS = (1, 2, 3)
CLIENTS = 16
PATIENCE_S = 120.0


@contextmanager
def ray_cluster() -> Iterator[str]:
    """The address of two raylets that claim more processors than there may be, so that three replicas have a place."""
    with tempfile.TemporaryDirectory(prefix="lr-") as folder:
        process = subprocess.Popen(
            [sys.executable, str(CLUSTER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_TMPDIR": folder},
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("expected two raylets, got none: Ray gives up where it has to wait for a processor")
        yield address
        process.communicate()


@contextmanager
def served(address: str, bundle: Bundle, tokens: Path, *options: str) -> Iterator[dict[str, Any]]:
    """A service on the cluster, and where it says that it is; ended in order, since the next needs its place."""
    ports = ["--port", "0", "--metrics-port", "0", "--tokens", str(tokens), "--ray-address", address]
    batches = ["--workers", "1", "--threads", "1"]
    command = ["-m", "louver", "serve", str(bundle.folder), "--engine", "ray", "--json", *ports, *batches, *options]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def count_replicas(told: dict[str, Any]) -> int:
    text = urllib.request.urlopen(told["metrics"], timeout=10).read().decode()
    found = re.search(r"^louver_replicas (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


async def await_replicas(told: dict[str, Any], wanted: int) -> float:
    """Seconds until there are as many."""
    since = time.monotonic()
    while await asyncio.to_thread(count_replicas, told) < wanted:
        if time.monotonic() - since > PATIENCE_S:
            raise SystemExit(f"expected {wanted} replicas within {PATIENCE_S:g} s; give the machine more processors")
        await asyncio.sleep(0.2)
    return time.monotonic() - since


async def ask(told: dict[str, Any], bundle: Bundle, token: str, is_over: asyncio.Event) -> Counter[str]:
    """What became of each request of many clients, which ask one after the other until it is over.

    A connection is kept for as long as the server says: HAProxy gives way to another one when replicas come or go.
    """
    request = request_of(f"{bundle.name}/versions/{bundle.id}", bundle, token)
    host, _, port = told["rest"].removeprefix("http://").rpartition(":")
    found: Counter[str] = Counter()

    async def client() -> None:
        while not is_over.is_set():
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                is_kept = True
                while is_kept and not is_over.is_set():
                    writer.write(request)
                    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = answer.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    found[answer[9:12].decode()] += 1
                    is_kept = b"\r\nconnection: close\r\n" not in answer
                writer.close()
            except (OSError, asyncio.IncompleteReadError) as error:
                found[type(error).__name__] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


async def images_per_s(told: dict[str, Any], bundle: Bundle, token: str, seconds: float) -> float:
    """Images that were answered in a second."""
    is_over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, is_over.set)
    begun = time.monotonic()
    found = await ask(told, bundle, token, is_over)
    return found["200"] / (time.monotonic() - begun)


async def statuses_while_scaling(told: dict[str, Any], bundle: Bundle, token: str) -> tuple[Counter[str], float]:
    """What became of each request until some seconds after the last replica came, and how long it took to come."""
    is_over = asyncio.Event()
    asking = asyncio.create_task(ask(told, bundle, token, is_over))
    seconds = await await_replicas(told, REPLICAS[-1])
    await asyncio.sleep(5)
    is_over.set()
    return await asking, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--bundle", type=Path, help="whose cloud half is served; one like resnet18's by default")
    parser.add_argument("--dry", action="store_true", help="print the figures and record nothing")
    arguments = parser.parse_args()
    # As the tests do: loopback alone, and a secret that only our own processes inherit.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    begun = time.monotonic()
    figures: dict[str, Any] = {"clients": CLIENTS, "cores": os.cpu_count(), "images_per_s": {}}
    with ray_cluster() as address, tempfile.TemporaryDirectory() as place:
        tokens = Path(place) / "tokens.json"
        token = add_client(tokens, "benchmark")
        bundle = read_bundle(arguments.bundle) if arguments.bundle else tail_bundle(Path(place) / "tail")
        for count in REPLICAS:
            options = ("--min-replicas", str(count), "--max-replicas", str(count))
            with served(address, bundle, tokens, *options) as told:
                asyncio.run(await_replicas(told, count))
                asyncio.run(images_per_s(told, bundle, token, 1.0))
                rates = [
                    asyncio.run(images_per_s(told, bundle, token, arguments.seconds)) for _ in range(arguments.rounds)
                ]
            figures["images_per_s"][count] = {
                "all": round(median(rates), 1),
                "each": round(median(rates) / count, 1),
                "rounds": [round(rate, 1) for rate in rates],
            }
            print(count, json.dumps(figures["images_per_s"][count]), flush=True)
        scaling = ("--max-replicas", str(REPLICAS[-1]), "--target-requests", "2", "--scale-up-s", "1")
        with served(address, bundle, tokens, *scaling) as told:
            statuses, seconds = asyncio.run(statuses_while_scaling(told, bundle, token))
        figures["scaling"] = {
            "answered": statuses["200"],
            "lost": statuses.total() - statuses["200"],
            "statuses": dict(statuses),
            "seconds_to_three": round(seconds, 1),
        }
        print(json.dumps(figures["scaling"]))
    if not arguments.dry:
        record("ray_serve", {"rounds": arguments.rounds, **figures}, seed=0, seconds=time.monotonic() - begun)


if __name__ == "__main__":
    main()
