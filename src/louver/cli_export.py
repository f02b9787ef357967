"""Commands that make bundles and vouch for them: parse, call one function, print."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from louver.console import AsJson, Device, Threads, device_named, lab, progress_shown, set_threads
from louver.errors import ConfigError

__all__ = ["export", "print_service", "sign", "verify"]


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished audit or hardening.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle, which must not be in use.")],
    cut: Annotated[str | None, typer.Option(help="Of a run at several cuts, the one to export.")] = None,
    name: Annotated[str | None, typer.Option(help="Name that it is served under; that of the run by default.")] = None,
    encoding: Annotated[str, typer.Option(help="How features are sent: uint8, uint4 or float32.")] = "uint8",
    edge_weights: Annotated[
        str, typer.Option(help="float32, or int8 for an edge that computes in 8 bits.")
    ] = "float32",
    head: Annotated[
        bool, typer.Option("--head", help="Add a small network that answers on the device while the cloud is away.")
    ] = False,
    executorch: Annotated[
        bool, typer.Option("--executorch", help="Also write the edge as an ExecuTorch program, edge.pte.")
    ] = False,
    triton: Annotated[
        Path | None, typer.Option(help="Also add the cloud half to this model repository of Triton.")
    ] = None,
    min_agreement: Annotated[
        float,
        typer.Option(help="Share of test images that must be answered as the split answers them, or mean cosine."),
    ] = 0.995,
    calibration_images: Annotated[int, typer.Option(help="Auxiliary images to find scales on.")] = 512,
    audited: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Attack what the exported edge sends, for the manifest.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of calibration and head.")] = 0,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write both halves of a run's split as ONNX graphs that device and server run, and audit what will be sent."""
    with lab():
        from louver.exporting import ExportOptions, export_run
        from louver.storage import refusals
        from louver.triton import write_triton
    set_threads(threads)
    options = ExportOptions(
        # Both are checked there.
        encoding=encoding,  # type: ignore[arg-type]
        edge_weights=edge_weights,  # type: ignore[arg-type]
        has_head=head,
        has_executorch=executorch,
        calibration_images=calibration_images,
        min_agreement=min_agreement,
        seed=seed,
    )
    chosen = device_named(device)
    if triton is not None:
        with refusals(triton, then="name another folder"):  # found out before the work and not after it
            triton.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=triton).close()
    with progress_shown() as tell, redirect_stdout(sys.stderr):
        bundle = export_run(
            run, out, name=name, cut=cut, options=options, has_audit=audited, device=chosen, progress=tell
        )
    if triton is not None:
        model = write_triton(bundle, triton)
        print(f"Triton model: {model}", file=sys.stderr)
    _print_bundle(bundle, as_json=as_json)


def sign(
    bundle: Annotated[Path, typer.Argument(help="Folder of an exported bundle.")],
    key: Annotated[
        Path | None, typer.Option(help="Private key (PEM, elliptic curve); without one the signature is keyless.")
    ] = None,
    password_file: Annotated[Path | None, typer.Option(help="File that holds the password of the key.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds an OpenID Connect token, for keyless signing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign BUNDLE, so that devices and servers can tell that no byte was changed since."""
    from louver.signing import sign_bundle

    password = None if password_file is None else _text(password_file, "--password-file").rstrip("\r\n")
    token = None if token_file is None else _text(token_file, "--token-file").strip()
    path = sign_bundle(bundle, key=key, password=password, identity_token=token)
    print(json.dumps({"signature": str(path)}) if as_json else path)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of a signed bundle.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM) of the maker.")] = None,
    identity: Annotated[str | None, typer.Option(help="Who must have signed, for a keyless signature.")] = None,
    issuer: Annotated[str | None, typer.Option(help="Address of who vouches for the identity.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that BUNDLE is signed by its maker and that no byte was changed since."""
    from louver.signing import Maker, verify_bundle

    found = verify_bundle(bundle, Maker(key=key, identity=identity, issuer=issuer))
    if as_json:
        print(json.dumps({"name": found.name, "id": found.id, "verified": True}))
    else:
        print(f"bundle {found.name}, id {found.id}: signed, and unchanged")


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        # Without its cause, which holds the secret.
        raise ConfigError(f"{option}: expected text in UTF-8 in {path}, got other bytes; name another file") from None


def print_service(bundle: Any, service: Any) -> None:  # noqa: ANN401 - louver.bundle.Bundle, louver.loopback.Service
    """What a bundle did in service, beside what it gives away."""
    _print_bundle(bundle, as_json=False)
    split = bundle.record["utility"].get("split", {}).get("accuracy")
    compared = bundle.record["equivalence"]["images"]
    lines = [f"in service on this machine, {service.n_images} test images, one request each:"]
    if service.accuracy is not None:
        lines.append(
            f"  accuracy {service.accuracy:.3f}"
            + ("" if split is None else f" (the split in torch, on all {compared} that were compared: {split:.3f})")
        )
    lines += [
        f"  sent {service.sent_bytes:,.0f} bytes an image; the feature as float32 has {service.float32_bytes:,}, "
        f"the picture as JPEG of quality 90 {service.jpeg_bytes:,.0f}",
        f"  edge half {service.edge_ms_median:.2f} ms (99 % within {service.edge_ms_p99:.2f}), from sending to answer "
        f"{service.wire_ms_median:.2f} ms ({service.wire_ms_p99:.2f})",
    ]
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line, markup=False)


def _print_bundle(bundle: Any, *, as_json: bool) -> None:  # noqa: ANN401 - louver.bundle.Bundle
    """What was exported, for a person or a program."""
    record = bundle.record
    if as_json:
        print(json.dumps({"name": bundle.name, "id": bundle.id, "folder": str(bundle.folder), "record": record}))
        return
    same, cost = record["equivalence"], record["cost"]
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"bundle {bundle.name}, id {bundle.id}, in {bundle.folder}", markup=False)
    console.print(
        f"{same['measure']} beside the split, on {same['images']} test images: {same['agreement']:.2%}; features off "
        f"by {same['relative_feature_error']:.2g} of their size",
        markup=False,
    )
    console.print(
        f"sent for an image: {cost['float32_feature_bytes']:,} bytes as float32, {cost['feature_bytes']:,} as "
        f"{bundle.serving.encoding}, {same['compressed_bytes']:,.0f} compressed",
        markup=False,
    )
    findings = [row for row in record["findings"] if row["attack"] != "mean_image"]
    for row in findings:
        console.print(
            f"leaks by {row['attack']}: {row['measure']} {row['mean']:.3g} (floor {row['floor']:.3g})", markup=False
        )
    if not findings:
        console.print(f"not audited: louver audit --bundle {bundle.folder}", markup=False)
    console.print(f"card: {bundle.folder / 'CARD.md'}", markup=False)
