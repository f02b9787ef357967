"""The commands of the cloud: `louver serve`, and `louver token` for who may ask."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from louver.console import AsJson, needing
from louver.errors import ConfigError

if TYPE_CHECKING:
    from louver.cloud import Addresses, Listening, Started

__all__ = ["serve", "token"]

_CLOUD = ("google", "grpc", "httptools", "prometheus_client", "uvicorn", "uvloop")
_MB = 2**20
_Number = TypeVar("_Number", int, float)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

token = typer.Typer(
    name="token", help="Clients that may ask the cloud half: add, list, rotate, remove.", no_args_is_help=True
)
TokenFile = Annotated[Path, typer.Option("--file", help="The file of clients that `louver serve --tokens` reads.")]


class Engine(StrEnum):
    """Where the cloud half runs."""

    local = "local"
    ray = "ray"


def _cloud() -> AbstractContextManager[None]:
    return needing("cloud", _CLOUD)


def serve(
    paths: Annotated[list[Path], typer.Argument(help="Bundles, or folders of bundles.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of REST; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=-1, max=65535, help="Port of gRPC; -1 for none.")] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=-1, max=65535, help="Port of the metrics, on 127.0.0.1 always; -1 for none.")
    ] = 8002,
    tokens: Annotated[Path | None, typer.Option(help="File of clients; see `louver token`.")] = None,
    budgets: Annotated[
        Path | None,
        typer.Option(help="Where the images that clients have used are kept; beside the tokens by default."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain in PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key in PEM.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Only clients with a certificate signed by one of these (PEM).")
    ] = None,
    maker_key: Annotated[
        Path | None, typer.Option(help="Public key (PEM) by which every bundle must be signed.")
    ] = None,
    maker_identity: Annotated[
        str | None, typer.Option(help="Who must have signed every bundle, for keyless signatures.")
    ] = None,
    maker_issuer: Annotated[str | None, typer.Option(help="Address of who vouches for --maker-identity.")] = None,
    insecure_public: Annotated[
        bool, typer.Option("--insecure-public", help="Listen beyond this machine even without TLS or tokens.")
    ] = False,
    max_batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]N",
            help="Most images in one run of the network, 32 by default; with a NAME, of that model. Can be repeated.",
        ),
    ] = None,
    max_delay_ms: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MS",
            help="How long a batch waits for more, 0 by default, which takes what waits; with a NAME, that of this "
            "model. Can be repeated.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait, for each model.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one run; half the cores by default.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Most images in one request.")] = 256,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Largest body as received, or message of gRPC, MiB.")
    ] = 16.0,
    max_decoded_mb: Annotated[
        float, typer.Option(min=0.001, help="REST: largest body after decompression, MiB.")
    ] = 64.0,
    max_held_mb: Annotated[
        float, typer.Option(min=0.001, help="Bodies at a time, MiB; gRPC may take as much again.")
    ] = 512.0,
    body_s: Annotated[float, typer.Option(min=0.1, help="Seconds that a client may take to send a body.")] = 30.0,
    answer_s: Annotated[
        float, typer.Option(min=0.1, help="REST: seconds that a client may take to read an answer.")
    ] = 30.0,
    head_s: Annotated[
        float, typer.Option(min=0.1, help="REST: seconds for the head of a request; gRPC: for a handshake.")
    ] = 10.0,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Most connections at a time, of REST and of gRPC each.")
    ] = 1024,
    keep_s: Annotated[
        float, typer.Option(min=0, help="How long a version is answered after another has taken its place (SIGHUP).")
    ] = 600.0,
    drain_s: Annotated[
        float, typer.Option(min=0, help="After SIGTERM: how long to go on listening while not ready.")
    ] = 5.0,
    engine: Annotated[
        Engine, typer.Option(help="Where it runs: in this process, or in replicas that Ray Serve starts and ends.")
    ] = Engine.local,
    min_replicas: Annotated[int, typer.Option(min=1, help="With ray: fewest replicas.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="With ray: most replicas.")] = 4,
    target_requests: Annotated[
        float, typer.Option(min=0.1, help="With ray: requests under way in a replica that count as enough.")
    ] = 16.0,
    scale_up_s: Annotated[float, typer.Option(min=0, help="With ray: seconds of too much until one is added.")] = 5.0,
    scale_down_s: Annotated[
        float, typer.Option(min=0, help="With ray: seconds of too little until one is ended.")
    ] = 120.0,
    ray_address: Annotated[
        str | None, typer.Option(help="With ray: a cluster that runs already, HOST:PORT; one is started by default.")
    ] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="A span of OpenTelemetry for each request; where to, its environment says.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the cloud halves of bundles, by the Open Inference Protocol over REST and gRPC.

    SIGHUP reads the bundles again and loses no request; SIGTERM finishes what is in flight and exits with 0.
    """
    with _cloud():
        import uvloop

        from louver.cloud import Batching, Limits, Listening, Repository, Settings, Started, create_app
        from louver.cloud import serve as serve_app
        from louver.cloud.traces import traces_from_environment
        from louver.signing import Maker
    _log_lines()
    listening = Listening(
        host=host,
        port=port,
        grpc_port=grpc_port if grpc_port >= 0 else None,
        metrics_port=metrics_port if metrics_port >= 0 else None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        is_insecure_public=insecure_public,
        drain_s=drain_s,
        connections=max_connections,
        head_s=head_s,
    )
    listening.check(has_tokens=tokens is not None)
    limits = Limits(
        body_bytes=_bytes("--max-body-mb", max_body_mb),
        decoded_bytes=_bytes("--max-decoded-mb", max_decoded_mb),
        held_bytes=_bytes("--max-held-mb", max_held_mb),
        rows=max_rows,
        body_s=body_s,
        answer_s=answer_s,
    )
    rows_of = _by_model("--max-batch", max_batch or [], int, least=1, most=1_000_000)
    delay_ms_of = _by_model("--max-delay-ms", max_delay_ms or [], float, least=0, most=10_000)
    delay_s_of = {name: delay_ms / 1000 for name, delay_ms in delay_ms_of.items()}
    batching = Batching(
        max_rows=rows_of.pop("", Batching.max_rows),
        max_delay_s=delay_s_of.pop("", Batching.max_delay_s),
        queue=queue,
        workers=workers,
        max_rows_of=rows_of,
        max_delay_s_of=delay_s_of,
    )
    if threads is not None:
        batching = replace(batching, threads=threads)
    settings = Settings(limits=limits, tokens=tokens, budgets=budgets)
    maker = None
    if (maker_key, maker_identity, maker_issuer) != (None, None, None):
        maker = Maker(key=maker_key, identity=maker_identity, issuer=maker_issuer)
    if engine is Engine.ray:
        from louver.cloud.ray_engine import Scaling, serve_on_ray

        if traces:
            raise ConfigError("--traces is for the local engine; leave it out")
        scaling = Scaling(
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            target_requests=target_requests,
            up_s=scale_up_s,
            down_s=scale_down_s,
            address=ray_address,
        )
        serve_on_ray(
            paths,
            settings,
            batching,
            listening,
            scaling,
            keep_s=keep_s,
            maker=maker,
            started=lambda found: _tell(listening, found, as_json=as_json),
        )
        return
    spans = traces_from_environment() if traces else None
    repository = Repository(paths, batching=batching, keep_s=keep_s, maker=maker)
    app = create_app(repository, settings, traces=spans)

    def tell(found: Addresses) -> None:
        clients = app.service.clients
        models = tuple(one.model for one in repository.current)
        n_clients = len(clients.all) if clients is not None else None
        _tell(listening, Started(addresses=found, models=models, n_clients=n_clients), as_json=as_json)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_app(app, listening, started=tell))
    repository.close()


@token.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Name of the client, as logs and metrics show it.")],
    file: TokenFile,
    images_per_day: Annotated[int | None, typer.Option(min=1, help="Images from midnight to midnight, UTC.")] = None,
    images_total: Annotated[int | None, typer.Option(min=1, help="Images ever.")] = None,
    requests_per_s: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, on average.")] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token for a new client and print it, once: the file holds only its hash."""
    with _cloud():
        from louver.cloud.tokens import add_client

    made = add_client(
        file,
        name,
        images_per_day=images_per_day,
        images_total=images_total,
        requests_per_s=requests_per_s,
        burst=burst,
    )
    _tell_token(name, made, as_json=as_json)


@token.command("rotate")
def token_rotate(
    name: Annotated[str, typer.Argument(help="Name of the client.")],
    file: TokenFile,
    overlap: Annotated[
        str, typer.Option(help="How long the token before goes on: 90s, 30m, 12h, 7d; 0 ends it at once.")
    ] = "1d",
    as_json: AsJson = False,
) -> None:
    """Make a new token for a client, whose limits stay, and print it, once. The one before goes on for --overlap.

    One that is older, from a rotation before, ends at once: no client has more than two.
    """
    with _cloud():
        from louver.cloud.tokens import rotate_client

    _tell_token(name, rotate_client(file, name, overlap_s=_seconds("--overlap", overlap)), as_json=as_json)


@token.command("remove")
def token_remove(
    name: Annotated[str, typer.Argument(help="Name of the client.")], file: TokenFile, as_json: AsJson = False
) -> None:
    """Take a client out of the file: a running server refuses its tokens within seconds."""
    with _cloud():
        from louver.cloud.tokens import remove_client

    remove_client(file, name)
    if as_json:
        print(json.dumps({"name": name, "removed": True}))


@token.command("list")
def token_list(file: TokenFile, as_json: AsJson = False) -> None:
    """List the clients in the file, with their limits, and until when a token that was replaced is still valid."""
    with _cloud():
        from louver.cloud.tokens import read_clients

    limits = ("requests_per_s", "burst", "images_per_day", "images_total")
    found = []
    for client in read_clients(file):
        n_valid = sum(time.time() < until for _, until in client.hashes)
        old_until = client.old_until if n_valid > 1 else None
        found.append({"name": client.name, **{key: getattr(client, key) for key in limits}, "old_until": old_until})
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table()
    for heading in ("client", "requests a second", "burst", "images a day", "images ever"):
        table.add_column(heading, justify="left" if heading == "client" else "right", overflow="fold")
    table.add_column("old token until", no_wrap=True)
    for one in found:
        table.add_row(*("" if value is None else str(value) for value in one.values()))
    Console().print(table)


def _bytes(option: str, mib: float) -> int:
    if not math.isfinite(mib):
        raise ConfigError(f"{option}: expected a number of MiB, got {mib}")
    return int(mib * _MB)


def _tell_token(name: str, made: str, *, as_json: bool) -> None:
    print(json.dumps({"name": name, "token": made}) if as_json else made)


def _seconds(option: str, text: str) -> int:
    """A time such as 12h, in seconds.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch("([0-9]{1,9})([smhd])", text)
    if found is None and text != "0":
        raise ConfigError(f"{option}: expected 0, or a whole number with s, m, h or d, such as 12h, got {text!r}")
    return int(found[1]) * _UNITS_S[found[2]] if found is not None else 0


def _by_model(
    option: str, values: Sequence[str], kind: Callable[[str], _Number], *, least: int, most: int
) -> dict[str, _Number]:
    """What an option gives each model, by its name, and all others, by an empty one.

    Raises:
        ConfigError: a value that is neither NUMBER nor NAME=NUMBER, or two for one name.
    """
    found: dict[str, _Number] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most or (equals and not name):
            what = f"{'whole numbers' if kind is int else 'numbers'} from {least} to {most:,}"
            raise ConfigError(f"{option}: expected NUMBER or NAME=NUMBER, {what}, got {value!r}")
        if name in found:
            raise ConfigError(f"{option}: expected one value for {name or 'all models'}, got {value!r} too")
        found[name] = number
    return found


def _log_lines() -> None:
    """Lines of JSON on standard error; those of uvicorn only where something is wrong."""
    from louver.cloud.logs import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("louver.cloud").setLevel(logging.INFO)


def _tell(listening: Listening, started: Started, *, as_json: bool) -> None:
    """Where the server is, what it serves, and what protects it."""
    found, models = started.addresses, started.models
    if as_json:
        content = {
            "rest": found.rest,
            "grpc": found.grpc,
            "metrics": found.metrics,
            "models": [{"name": one.name, "version": one.version} for one in models],
        }
        print(json.dumps(content), flush=True)
        return
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    for what, value in (("REST", found.rest), ("gRPC", found.grpc), ("metrics", found.metrics)):
        table.add_row(what, value or "none")
    for one in models:
        shape = "×".join(map(str, one.feature_shape))
        table.add_row("model", f"{one.name}, version {one.version}: {one.datatype} {shape}")
    has_tls = listening.tls_cert is not None
    certificates = ", clients by certificate" if listening.client_ca is not None else ""
    table.add_row("TLS", ("yes" if has_tls else "no") + certificates)
    table.add_row("tokens", f"{started.n_clients} clients" if started.n_clients is not None else "none")
    console.print(table)
    if started.n_clients is None:
        who = "this machine" if listening.is_loopback else "anywhere"
        console.print(
            f"warning: whoever reaches this from {who} may ask without limit; --tokens FILE asks who they are",
            markup=False,
            highlight=False,
        )
    if not listening.is_loopback and not has_tls:
        console.print("warning: without TLS, features and tokens cross the network in the clear", markup=False)
    sys.stdout.flush()
