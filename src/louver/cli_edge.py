"""`louver run`: the edge half of a bundle on pictures, its features to a server, the answers on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from louver.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from louver.edge import Answer, Delivery, Edge, Policy

__all__ = ["run"]

_INTERRUPTED = 130
_MOST_TOKEN_BYTES = 2**13
_TOKEN_VARIABLE = "LOUVER_TOKEN"
_printing = Lock()
"""What had waited is printed by a thread of its own."""


def run(
    bundle: Annotated[Path, typer.Argument(help="Folder of an exported bundle.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="Pictures, folders of them, .npy or .npz files, camera or camera:N.")
    ] = None,
    server: Annotated[str, typer.Option(help="Address of the cloud half, such as https://cloud.example:8443.")] = "",
    token_file: Annotated[
        Path | None, typer.Option(help=f"File that holds the token; else the variable {_TOKEN_VARIABLE}.")
    ] = None,
    policy: Annotated[str, typer.Option(help="While the cloud is away: fail, queue or local.")] = "fail",
    queue: Annotated[
        Path | None, typer.Option(help="Folder where features wait, encrypted, with --policy queue.")
    ] = None,
    queue_key: Annotated[Path | None, typer.Option(help="Its key file; QUEUE.key by default, made if missing.")] = None,
    discard: Annotated[
        list[str] | None, typer.Option(help="Give up the request of this id that waits in the queue. Can be repeated.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="The only authorities to trust (PEM), not the system's.")] = None,
    cert: Annotated[Path | None, typer.Option(help="This device's certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key of --cert (PEM).")] = None,
    maker_key: Annotated[Path | None, typer.Option(help="Public key (PEM) by which the bundle must be signed.")] = None,
    maker_identity: Annotated[
        str | None, typer.Option(help="Who must have signed the bundle, for a keyless signature.")
    ] = None,
    maker_issuer: Annotated[str | None, typer.Option(help="Address of who vouches for --maker-identity.")] = None,
    triton: Annotated[bool, typer.Option("--triton", help="The server is Triton.")] = False,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Send over plain HTTP to another machine; anyone may read along.")
    ] = False,
    connect_timeout: Annotated[float, typer.Option(help="Seconds to reach the server.")] = 5.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each piece of an answer.")] = 10.0,
    deadline: Annotated[float, typer.Option(help="Seconds for a request with all its tries.")] = 30.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a request.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the edge half.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a picture, and nothing else.")] = False,
) -> None:
    """Run the edge half of BUNDLE on pictures and send their features to a server; prints what it answers."""
    from louver.edge import Edge, Settings

    if not server:
        raise ConfigError("--server: expected the address of a server, got none; name it, or start `louver serve`")
    if not sources and policy != "queue":
        raise ConfigError("expected pictures to run on, got none; name files, a folder, or camera")
    if (queue is not None or queue_key is not None or discard) and policy != "queue":
        raise ConfigError(
            f"--queue, --queue-key and --discard: expected --policy queue with it, got {policy}; give both or neither"
        )
    settings = Settings(
        threads=threads,
        connect_timeout_s=connect_timeout,
        read_timeout_s=timeout,
        deadline_s=deadline,
        ca=ca,
        cert=cert,
        key=key,
        maker_key=maker_key,
        maker_identity=maker_identity,
        maker_issuer=maker_issuer,
        is_triton=triton,
        compression="gzip" if triton else "zstd",
        allow_plain_http=allow_plain_http,
        queue_folder=queue,
        queue_key=queue_key,
    )
    opened = Edge(bundle, server=server, token=_token(token_file), policy=cast("Policy", policy), settings=settings)
    with opened as edge:
        try:
            _give_up(edge, discard or [])
            _work(edge, sources or [], batch=batch, as_json=as_json)
        except KeyboardInterrupt:
            edge.close()  # first: what is under way may still have to be kept
            # `main` would speak of --resume, which this command has no use for.
            _tell(f"interrupted; {edge.n_waiting} requests wait in {queue}" if queue else "interrupted")
            raise SystemExit(_INTERRUPTED) from None


def _work(edge: Edge, sources: list[str], *, batch: int, as_json: bool) -> None:
    from louver.edge.sources import images_from

    names: deque[list[str]] = deque()

    def batches() -> Iterator[NDArray[np.float32]]:
        import numpy as np

        chunk: list[tuple[str, NDArray[np.float32]]] = []
        for name, image in images_from(sources, edge.bundle.serving.image_shape):
            chunk.append((_printable(name), image))
            if len(chunk) == batch:
                names.append([name for name, _ in chunk])
                yield np.stack([image for _, image in chunk])
                chunk = []
        if chunk:
            names.append([name for name, _ in chunk])
            yield np.stack([image for _, image in chunk])

    _flush(edge, as_json=as_json)
    if sources and edge.policy == "queue":  # of which a camera may be one, that does not end
        edge.send_in_background(lambda late: _print_late(late, as_json=as_json))
    with closing(edge.infer_many(batches())) as answers:
        for answer in answers:
            _print_answer(names.popleft(), answer, as_json=as_json)
    _flush(edge, as_json=as_json)
    if edge.n_waiting:
        _tell(f"note: {edge.n_waiting} requests wait for the cloud; run the same command without pictures to send them")


def _give_up(edge: Edge, request_ids: list[str]) -> None:
    for request_id in request_ids:
        if edge.discard(request_id):
            _tell(f"note: gave up request {request_id}: its feature is deleted, and no answer will come")
        else:  # no error: the same command line may be run again
            _tell(f"note: no request {request_id} waits in the queue; nothing was given up for it")


def _flush(edge: Edge, *, as_json: bool) -> None:
    if not edge.n_waiting:
        return
    done = edge.flush(lambda late: _print_late(late, as_json=as_json))
    for path in done.damaged:
        _tell(f"note: {path} is damaged and was set aside")


def _print_answer(names: list[str], answer: Answer, *, as_json: bool) -> None:
    for i, name in enumerate(names):
        found = _found(answer, i)
        if as_json:
            shared = {
                "source": answer.source,
                "is_degraded": answer.is_degraded,
                "request": answer.request_id,
                "edge_ms": round(answer.edge_ms, 3),
                "wire_ms": round(answer.wire_ms, 3),
                "sent_bytes": answer.sent_bytes,
                "n_images": len(names),
            }
            _print(json.dumps({"image": name, **found, **shared}))
            continue
        what = f"waits as {answer.request_id}" if answer.scores is None else _words(found)
        mark = " (degraded)" if answer.is_degraded else ""
        of = f" for {len(names)} images" if len(names) > 1 else ""
        times = f"edge {answer.edge_ms:.1f} ms, wire {answer.wire_ms:.1f} ms, {answer.sent_bytes} B sent{of}"
        _print(f"{name}: {what}{mark}; {times}")


def _print_late(late: Delivery, *, as_json: bool) -> None:
    for i in range(len(late.scores)):
        found = _found(late, i)
        if as_json:
            _print(json.dumps({"request": late.request_id, "index": i, **found, "source": "cloud"}))
        else:
            _print(f"{late.request_id}[{i}]: {_words(found)}; had waited")


def _found(answer: Answer | Delivery, i: int) -> dict[str, Any]:
    if answer.scores is None:
        return {"label": None, "score": None, "scores": None}
    scores = answer.scores[i]
    label = answer.labels[i] if answer.labels else None
    return {"label": label, "score": float(scores.max()) if label else None, "scores": scores.tolist()}


def _words(found: dict[str, Any]) -> str:
    if found["label"] is not None:
        return f"{found['label']} {found['score']:.3f}"
    import numpy as np

    shape = "×".join(map(str, np.shape(found["scores"])))
    return f"{shape} scores"


def _printable(name: str) -> str:
    """A file's name with escapes for what is no UTF-8, which neither a strict output nor a reader of JSON takes."""
    return name.encode(errors="backslashreplace").decode()


def _print(line: str) -> None:
    # Line by line: who reads along must not wait for a full buffer, and what was delivered must be out.
    with _printing:
        print(line, flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _token(path: Path | None) -> str | Callable[[], str] | None:
    """The token in a file or the environment; on the command line every user of the machine could see it."""
    return (os.environ.get(_TOKEN_VARIABLE) or None) if path is None else partial(_read_token, path)


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--token-file: cannot read {path}: {error.strerror}; name another") from error
    return content.decode("ascii", errors="replace").strip()
