"""The server past one machine: Ray with two raylets, replicas that come, go and are killed, and one keeper for all."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import importlib.util
import ipaddress
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bundles import toy_bundle
from certificates import Authority, key_pair
from louver.cloud import Repository, Settings, create_app
from louver.cloud.tokens import add_client, remove_client
from louver.signing import sign_bundle
from servers import Running, ask, asking, features, infer_path, truth

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: louver[cloud,ray]"),
    pytest.mark.timeout(300),
]

LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1",
}


@contextmanager
def ray_server(log: Path, *paths: Path, options: tuple[str, ...] = ()) -> Iterator[Running]:
    words = ("--port", "0", "--metrics-port", "0", "--threads", "1", "--workers", "1", "--json", "--engine", "ray")
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "louver", "serve", *map(str, paths), *words, *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **LOCAL},
        )
    try:
        server = Running(process, log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="lr-") as folder:
        command = [sys.executable, str(Path(__file__).parents[1] / "ray_cluster.py")]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **LOCAL, "RAY_TMPDIR": folder},
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield address
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A server of one replica that may become three, the tokens of its clients, and its bundle."""
    folder = tmp_path_factory.mktemp("ray")
    bundle = toy_bundle(folder / "first")
    private, public = key_pair(folder, "maker")
    sign_bundle(folder / "first", key=private)
    (folder / "served").mkdir()
    (folder / "served/toy").symlink_to(folder / "first")
    file = folder / "tokens.json"
    limits = {"free": {}, "gone": {}, "paid": {"images_total": 1000}, "poor": {"images_per_day": 7}}
    tokens = {name: add_client(file, name, **found) for name, found in limits.items()}
    tokens["slow"] = add_client(file, "slow", requests_per_s=0.01, burst=2)
    options = ("--ray-address", cluster, "--tokens", str(file), "--max-replicas", "3", "--target-requests", "1")
    options += ("--scale-up-s", "1", "--scale-down-s", "600", "--drain-s", "1", "--max-rows", "9")
    options += ("--maker-key", str(public))
    with ray_server(folder / "log", folder / "served", options=options) as server:
        yield folder, server, tokens, bundle


def metric(server: Running, name: str, **labels: str) -> float:
    text = urllib.request.urlopen(server.told["metrics"], timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(name)]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(one in line for one in wanted))


def busy(server: Running) -> set[str]:
    """Replicas that have answered."""
    text = urllib.request.urlopen(server.told["metrics"], timeout=10).read().decode()
    return set(re.findall(r'^louver_images_total\{.*replica="(\w+)"', text, re.MULTILINE))


def replicas() -> list[int]:
    told = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in told.splitlines() if "ray::ServeReplica:louver:louver" in line]


def eventually(what: Callable[[], bool], *, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


class Load:
    """Clients that ask one after the other, each request with its own id and feature, and check what they get.

    Every other client opens a connection for each request.
    """

    def __init__(self, server: Running, bundle, token: str, *, clients: int = 8, retries: int = 0) -> None:
        self.server, self.bundle, self.token, self.retries = server, bundle, token, retries
        self.answered = 0
        self.retried: list[str] = []
        self.wrong: list[str] = []
        self.refused: list[int] = []
        self.is_over = threading.Event()
        self.known = [features(1, seed=seed) for seed in range(17)]
        self.truths = [truth(bundle, feature) for feature in self.known]
        self.threads = [threading.Thread(target=self._work, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Load:
        for one in self.threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for one in self.threads:
            one.join(60)

    def _work(self, client: int) -> None:
        connection = self.server.connect()
        count = 0
        while not self.is_over.is_set():
            which = (client + count) % len(self.known)
            body, headers = asking(self.known[which], call_id=f"{client}-{count}")
            if client % 2:
                connection.close()  # the next request opens another
            headers["authorization"] = f"Bearer {self.token}"
            count += 1
            for attempt in range(self.retries + 1):
                try:
                    connection.request("POST", infer_path(self.bundle), body, headers)
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    connection.close()
                    status, content, told = 0, b"", type(error).__name__
                else:
                    status, told = answer.status, f"{answer.status} {content[:200]!r}"
                if status == 200:
                    head = int(answer.headers["inference-header-content-length"])
                    scores = np.frombuffer(content[head:], "<f4")
                    is_right = np.allclose(scores, self.truths[which][0], atol=1e-5)
                    is_mine = json.loads(content[:head])["id"] == f"{client}-{count - 1}"
                    if is_right and is_mine:
                        self.answered += 1
                    else:
                        self.wrong.append(told)
                    break
                if status not in (0, 503) or attempt == self.retries:
                    (self.refused if status in (0, 503) else self.wrong).append(status if status in (0, 503) else told)
                    break
                self.retried.append(told)
                time.sleep(0.2)
        connection.close()


def test_answers_are_those_of_the_local_engine(place):
    folder, server, tokens, bundle = place
    repository = Repository([folder / "first"])
    app = create_app(repository, Settings())
    feature = features(5)
    body, headers = asking(feature, call_id="same")
    as_json = json.dumps({"inputs": [{"name": "feature", "shape": [5, 4, 4, 5], "datatype": "UINT8",
                                      "data": feature.ravel().tolist()}]}).encode()  # fmt: skip
    squeezed = {**headers, "content-encoding": "gzip"}
    name = f"/v2/models/{bundle.name}"
    for path, content, fields in (
        (infer_path(bundle), body, headers),
        (f"{name}/infer", body, headers),
        (infer_path(bundle), gzip.compress(body), squeezed),
        (infer_path(bundle), as_json, {}),
        (f"{name}/versions/{'0' * 32}/infer", body, headers),
        ("/v2/models/other/infer", body, headers),
        (infer_path(bundle), body[:-1], headers),
        (infer_path(bundle), body, {**headers, "content-encoding": "br"}),
        (f"{name}/versions/{'0' * 32}/ready", b"", {}),
        (name, b"", {}),
        ("/v2", b"", {}),
        ("/v2/health/ready", b"", {}),
        ("/nowhere", b"", {}),
    ):
        expected = asyncio.run(ask(app, path, content, fields))
        found = server.ask(path, content, fields, token=tokens["free"])
        assert (found.status, found.body) == (expected.status, expected.body), path
    repository.close()
    found = server.ask(infer_path(bundle), body, headers, token=tokens["free"])
    np.testing.assert_allclose(found.scores, truth(bundle, feature), atol=1e-5)
    missing = server.ask(f"{name}/versions/{'0' * 32}/infer", body, headers, token=tokens["free"])
    assert (missing.status, bundle.id in missing.error) == (404, True)


def test_nobody_gets_more_than_their_token_allows(place):
    _, server, tokens, bundle = place
    path = infer_path(bundle)
    assert server.ask(path, *asking(features(1))).status == 401
    assert server.ask(path, *asking(features(1)), token="x" * 43).status == 401
    assert server.ask("/v2").status == 401
    body, headers = asking(features(4), call_id="first")
    assert server.ask(path, body, headers, token=tokens["poor"]).status == 200
    assert server.ask(path, body, headers, token=tokens["poor"]).status == 200, "the same again is free"
    refused = server.ask(path, *asking(features(4), call_id="second"), token=tokens["poor"])
    assert (refused.status, "3 images left" in refused.error) == (403, True)
    assert metric(server, "louver_budget_left_images", client="poor") == 3
    statuses = [server.ask(path, *asking(features(1)), token=tokens["slow"]).status for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_a_removed_token_is_refused_within_seconds(place):
    folder, server, tokens, _ = place
    assert server.ask("/v2", token=tokens["gone"]).status == 200
    remove_client(folder / "tokens.json", "gone")
    eventually(lambda: server.ask("/v2", token=tokens["gone"]).status == 401, within_s=10)
    assert server.ask("/v2", token=tokens["free"]).status == 200


def test_one_becomes_three_under_load_and_no_request_is_lost(place):
    _, server, tokens, bundle = place
    assert metric(server, "louver_replicas") == 1
    with Load(server, bundle, tokens["free"]) as load:
        eventually(lambda: metric(server, "louver_replicas") == 3, within_s=90)
        assert len(replicas()) == 3
        answered = load.answered
        eventually(lambda: load.answered > answered + 200, within_s=30)
        eventually(lambda: len(busy(server)) == 3, within_s=30)  # each of them answers
    assert (load.wrong, load.refused) == ([], [])


def test_only_loopback_is_listened_on(place):
    """Of all processes that this cluster is made of; Ray's ports run code for whoever reaches them."""
    told = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line for line in told if any(name in line for name in ("ray", "haproxy", "gcs_server", "python"))]
    assert any("haproxy" in line for line in ours)
    assert any("ServeRepl" in line for line in ours)
    assert [line for line in ours if "127.0.0.1" not in line.split()[3]] == []


def test_a_killed_replica_costs_a_retry_and_no_wrong_answer(place):
    _, server, tokens, bundle = place
    with Load(server, bundle, tokens["paid"], clients=5, retries=60) as load:
        eventually(lambda: load.answered > 20, within_s=30)
        victim = replicas()[0]
        os.kill(victim, signal.SIGKILL)
        answered = load.answered
        eventually(lambda: load.answered > answered + 100, within_s=60)
    assert (load.wrong, load.refused) == ([], [])
    assert all(told.startswith(("503", "Remote", "Connection", "Bad", "Broken")) for told in load.retried), load.retried
    used = metric(server, "louver_budget_used_images", client="paid")
    assert used == load.answered, "what was sent again is charged once"
    eventually(lambda: len(set(replicas()) - {victim}) == 3, within_s=60)


def test_another_bundle_takes_over_and_the_old_one_is_still_answered(place):
    folder, server, tokens, bundle = place
    second = toy_bundle(folder / "second", seed=1)
    refused = "bundle not loaded: what was served goes on"
    (folder / "served/next").symlink_to(folder / "second")
    (folder / "served/next").replace(folder / "served/toy")
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(server.lines(refused)) == 1, within_s=10)
    assert "expected a signature" in server.lines(refused)[0]["reason"]
    sign_bundle(folder / "second", key=folder / "maker.pem")
    with Load(server, bundle, tokens["free"], clients=3) as load:
        server.process.send_signal(signal.SIGHUP)
        body, headers = asking(features(2))

        def is_everywhere() -> bool:
            found = [server.ask(infer_path(second), body, headers, token=tokens["free"]) for _ in range(9)]
            return {one.status for one in found} == {200}

        eventually(is_everywhere, within_s=30)
    assert (load.wrong, load.refused) == ([], [])
    found = server.ask(infer_path(second), body, headers, token=tokens["free"])
    np.testing.assert_allclose(found.scores, truth(second, features(2)), atol=1e-5)


def test_the_log_is_json_without_secrets(place):
    _, server, tokens, _ = place
    text = server.log.read_text()
    lines = server.lines("infer")
    assert {"replica", "client", "rows", "status", "ms"} <= lines[0].keys()
    assert len({line["replica"] for line in lines}) >= 3
    assert not any(token in text for token in tokens.values())
    assert "same" not in {str(value) for line in lines for value in line.values()}


def test_sigterm_drains(place):
    """Last, since the server is gone then."""
    folder, server, tokens, _ = place
    with Load(server, toy_bundle(folder / "second", seed=1), tokens["free"], clients=5) as load:
        eventually(lambda: load.answered > 20, within_s=30)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.ask("/v2/health/ready").status == 503, within_s=10)
        assert load.refused == [], "not ready, and still answering"
        eventually(lambda: len(load.refused) > 0, within_s=30)
    assert load.wrong == [], "a request was answered, or refused as one to send again"
    assert server.process.wait(60) == 0
    assert replicas() == []
    assert json.loads((folder / "tokens.json.budgets").read_text())["accounts"]["poor"]["total_images"] == 4


def test_whoever_has_lost_the_keeper_answers_nothing_and_is_replaced(place, cluster, tmp_path):
    """After `kill -9` of `louver serve` on a cluster that lives on, tokens and budgets have nobody who knows them."""
    _, first, _, _ = place
    assert first.process.poll() is not None, "the cluster is free"
    bundle = toy_bundle(tmp_path / "b")
    body, headers = asking(features(3))
    with ray_server(tmp_path / "log", tmp_path / "b", options=("--ray-address", cluster)) as server:
        assert server.ask(infer_path(bundle), body, headers).status == 200
        words = [sys.executable, "-m", "louver", "serve", str(tmp_path / "b"), "--port", "0", "--engine", "ray"]
        second = subprocess.run(
            [*words, "--ray-address", cluster],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, **LOCAL},
        )
        assert (second.returncode, "Ray Serve runs on this cluster already" in second.stderr) == (2, True)
        server.process.kill()
        server.process.wait(10)
        eventually(lambda: server.ask(infer_path(bundle), body, headers).status == 503, within_s=30)
    with ray_server(tmp_path / "log", tmp_path / "b", options=("--ray-address", cluster)) as server:
        assert server.ask(infer_path(bundle), body, headers).status == 200


def test_a_cluster_of_its_own_speaks_tls_and_leaves_nothing_behind_even_when_killed(tmp_path):
    toy_bundle(tmp_path / "b")
    authority = Authority(tmp_path / "ca", "authority")
    certificate, key = authority.issue("server", names=(x509.IPAddress(ipaddress.ip_address("127.0.0.1")),))
    options = ("--tls-cert", str(certificate), "--tls-key", str(key), "--client-ca", str(authority.ca))
    stranger = ssl.create_default_context(cafile=authority.ca)
    device = ssl.create_default_context(cafile=authority.ca)
    device.load_cert_chain(*authority.issue("device", usage=ExtendedKeyUsageOID.CLIENT_AUTH))

    def left() -> list[str]:
        told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
        return [line for line in told if "ray::" in line or "raylet" in line or "haproxy -db" in line]

    eventually(lambda: left() == [] or "louver" not in "".join(left()), within_s=10)
    before = len(left())
    with ray_server(tmp_path / "log", tmp_path / "b", options=options) as server:
        assert server.told["rest"].startswith("https://")
        assert server.ask("/v2/models/toy/infer", *asking(features(3)), tls=device).status == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            server.ask("/v2/health/ready", tls=stranger)
        with pytest.raises((OSError, http.client.HTTPException)):
            server.ask("/v2/health/ready")
        assert len(left()) > before
        server.process.kill()
        server.process.wait(10)
        eventually(lambda: len(left()) <= before, within_s=60)
