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
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from louver.cloud.ingress import find_haproxy
from louver.cloud.keeper import Keeper, Seen, read_contents
from louver.cloud.models import Model
from louver.cloud.ray_runtime import (
    APP,
    DEREGISTER_S,
    KEEPER,
    START_S,
    cluster,
    connected,
    environment,
    nodes,
    temporarily,
)
from louver.cloud.repository import Repository
from louver.cloud.server import Addresses, Listening, Started, free_port, serve_metrics
from louver.cloud.settings import Batching, Settings
from louver.cloud.tokens import read_clients
from louver.errors import CloudError, ConfigError, MissingExtraError
from louver.signing import Maker

__all__ = ["Scaling", "serve_on_ray"]

_log = logging.getLogger("louver.cloud")
_LOOK_S = 0.5
_MOST_ONGOING = 100_000
"""Ray's own bound on requests in a replica is out of the way: ours refuses earlier, and in the protocol's words."""


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
    maker: Maker | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, and then ends in order, as `serve` does. Must run in the main thread.

    With a `maker` bundles must be signed by it, which is seen to on this machine; replicas take them from here only.

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
    models, n_bytes = _checked(paths, batching, maker)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lr-")))
        port = free_port(listening.host, listening.port)
        haproxy = find_haproxy()
        told = environment(place, port, haproxy, listening)
        # Of a client that neither sends nor takes; a request that waits for its answer does not count.
        silent_s = math.ceil(max(settings.limits.body_s, settings.limits.answer_s))
        told["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = str(silent_s)
        stack.enter_context(temporarily(told))
        address = scaling.address
        if address is None:
            n_cpus = max(os.cpu_count() or 1, scaling.min_replicas * batching.workers * batching.threads)
            address = stack.enter_context(cluster(place, n_cpus=n_cpus, n_bytes=n_bytes))
        stack.enter_context(connected(address, told))
        keeper = _keep(paths, settings, keep_s, maker)
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


def _checked(paths: Sequence[Path], batching: Batching, maker: Maker | None) -> tuple[tuple[Model, ...], int]:
    """What is served, loaded once here so that a bundle that does not run is refused before anything is started."""
    repository = Repository(paths, batching=batching, maker=maker)
    repository.close()
    contents = {one.version: one for one in read_contents(paths, maker).values()}
    n_bytes = sum(len(one.cloud) + len(one.manifest) for one in contents.values())
    return tuple(one.model for one in repository.current), n_bytes


# Ray Serve


def _keep(paths: Sequence[Path], settings: Settings, keep_s: float, maker: Maker | None) -> Any:  # noqa: ANN401 - Ray's
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
    if maker is not None and maker.key is not None:
        maker = replace(maker, key=maker.key.resolve())
    kind = ray.remote(Keeper).options(name=KEEPER, num_cpus=0, max_concurrency=1000, scheduling_strategy=here)
    keeper = kind.remote([path.resolve() for path in paths], whole, keep_s=keep_s, maker=maker)
    try:
        ray.get(keeper.look.remote(), timeout=START_S)
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
        name=APP,
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
        serve.run(deployment.bind(keeper, settings.limits, batching, keep_s), name=APP, route_prefix="/")
        yield
    except (RayServeException, RuntimeError) as error:
        raise CloudError(f"Ray Serve did not start: {_reason(error)}") from error
    finally:
        serve.shutdown()


def _reason(error: Exception) -> str:
    """The last line of what a replica said while it started, or else of the error."""
    from ray import serve

    told = str(error)
    found = serve.status().applications.get(APP)
    for one in found.deployments.values() if found is not None else ():
        told = one.message or told
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:600]


def _inside(listening: Listening) -> str:
    """Where replicas listen for HAProxy: on loopback, unless some are on another machine.

    Raises:
        ConfigError: what would cross between machines is not encrypted, and nobody has allowed it.
    """
    if len({node["NodeManagerAddress"] for node in nodes()}) == 1:
        return "127.0.0.1"
    if not listening.is_insecure_public:
        raise ConfigError(
            "this cluster has several machines, between which features and tokens cross without TLS: say "
            "--insecure-public if their network is yours alone"
        )
    return "0.0.0.0"


def _grace_s(settings: Settings) -> float:
    return 2 * (settings.limits.body_s + settings.limits.answer_s) + DEREGISTER_S


# Until the end


async def _watch(keeper: Any, listening: Listening, started: Callable[[str | None], None]) -> None:  # noqa: ANN401
    from ray.exceptions import RayError

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
            try:
                looking.result()
            except RayError as error:
                raise CloudError(
                    f"the keeper has ended ({type(error).__name__}): start `louver serve` again"
                ) from error


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
            await _read_again(keeper)
        await asyncio.sleep(_LOOK_S)


async def _read_again(keeper: Any) -> None:  # noqa: ANN401 - Ray's
    from ray.exceptions import RayTaskError

    try:
        failures = await keeper.reload.remote()
    except RayTaskError as error:
        # It broke there, and the keeper lives; where the keeper is lost, Ray raises another of its errors.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        _log.error("bundles not read: what was served goes on", extra={"reason": reason})
        return
    for failure in failures:
        _log.error("bundle not loaded: what was served goes on", extra={"reason": failure})
    _, contents = await keeper.contents.remote()
    _log.info("bundles read", extra={"versions": [one.version for one in contents if not one.is_leaving]})


def _write(seen: Seen) -> None:
    for line in seen.lines:
        print(line, file=sys.stderr)
    sys.stderr.flush()
