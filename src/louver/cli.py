"""The command line: parse, call one function, print.

Exit codes: 0 done and every threshold holds; 1 a threshold is broken or not shown to hold; 2 bad input, with what to do
about it; 130 interrupted, with what was finished kept.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from louver import cli_cloud, cli_edge, cli_export
from louver.cli_export import print_service
from louver.console import AsJson, Device, Threads, device_named, lab, progress_shown, set_threads
from louver.errors import ConfigError, LouverError

if TYPE_CHECKING:
    from louver.comparison import Comparison
    from louver.types import Audit, Cut

__all__ = ["app", "main"]

app = typer.Typer(
    name="louver",
    help="Cut a vision network between device and cloud, and measure what the features give away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (cli_cloud.serve, cli_edge.run, cli_export.export, cli_export.sign, cli_export.verify):
    app.command()(command)
app.add_typer(cli_cloud.token)
_INTERRUPTED = 130
_LARGEST_SIDE = 4096
_DEMO_IMAGES = 200


def main() -> None:
    """Runs the command line and turns every refusal into one clear message."""
    errors = Console(stderr=True, soft_wrap=True)
    # Who runs it as a job ends it so. What was begun (other processes, a run in MLflow) is then ended in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Without standalone mode click returns the code of `typer.Exit` and raises the rest for us to word.
        code = app(standalone_mode=False)
    except LouverError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except TyperException as error:
        # Which click lies below typer is its own affair; what a usage error can say of itself is not.
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:  # without a command typer prints the help, and has no more to say
            errors.print(f"error: {message}", style="bold red", markup=False, highlight=False)
        code = 2
    except OSError as error:
        errors.print(f"error: {error.filename}: {error.strerror}", style="bold red", markup=False, highlight=False)
        code = 2
    if code == _INTERRUPTED:  # typer may have caught the interruption first, and left only its code
        errors.print("interrupted; what was finished is kept: run the same command with --resume", markup=False)
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def cuts(
    model: Annotated[
        str, typer.Argument(help="cifar_resnet20, torchvision:resnet18, timm:NAME, package.module:function")
    ],
    image: Annotated[
        str | None, typer.Option(help="Image shape, such as 3x32x32; by default that of the network.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    latency: Annotated[bool, typer.Option(help="Measure the time of both halves on this machine.")] = False,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """List every place where MODEL can be cut, and what each cut costs."""
    with lab():
        import torch

        from louver.cost import measure_latency, with_latency
        from louver.cut import cuts as find_cuts
        from louver.cut import split
        from louver.models import load_model
    set_threads(threads)
    shape = _image_shape(image) if image is not None else _natural_shape(model)
    with redirect_stdout(sys.stderr):
        network = load_model(
            model, n_classes=classes if classes is not None else _default_classes(model), image_shape=shape
        )
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    found = find_cuts(network, example)
    if latency:
        found = [with_latency(c, *measure_latency(split(network, c.name, example), example[:1])) for c in found]
    if as_json:
        import dataclasses

        print(json.dumps([dataclasses.asdict(cut) for cut in found], indent=1))
    else:
        Console().print(_cuts_table(model, shape, found))


@app.command()
def audit(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML), or a run folder to run again; none with --bundle.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Attack what the edge of this exported bundle sends, and note it in the bundle.")
    ] = None,
    at: Annotated[list[str] | None, typer.Option(help="Cut here instead of where the file says; repeatable.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Run this attack instead of the file's; repeatable.")] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option(help="Exit 1 if leakage is above this, such as ssim=0.3; replaces the file's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on in a run folder that exists; finished parts are kept.")] = False,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Attack the features of a split network and report what can be rebuilt from them."""
    with lab():
        from louver.config import read_experiment
        from louver.thresholds import parse_fail_above
    if bundle is not None:
        if file is not None or at or attack or fail_above:
            raise ConfigError("--bundle is audited by its own experiment: leave out FILE, --at, --attack, --fail-above")
        _audit_bundle(bundle, out, resume=resume, device=device, threads=threads, as_json=as_json)
    if file is None:
        raise ConfigError("expected an experiment file or --bundle FOLDER, got neither")
    rules = [str(parse_fail_above(text)) for text in fail_above or []]
    path = file / "config.toml" if file.is_dir() else file
    experiment = read_experiment(path, cuts=at, attacks=attack, thresholds=rules or None)
    folder = out or (file if file.is_dir() else Path("runs") / experiment.name)
    if (folder / "config.toml").exists() and not resume:
        raise ConfigError(f"{folder} holds a run already; go on with --resume, or choose another folder with --out")
    _show(_run(experiment, folder, device=device, threads=threads), folder, as_json=as_json)


@app.command()
def harden(
    file: Annotated[Path, typer.Argument(help="Experiment file (TOML) with [defense] and [hardening].")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on in a run folder that exists; finished parts are kept.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Write metrics of training there for TensorBoard.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="Send metrics of training to this MLflow address.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many GPUs, or processes on a CPU, share each batch.")] = 1,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a split so that its features give away less, attack what comes out, and report."""
    with lab():
        from louver.config import read_experiment
        from louver.logs import logging_to
    experiment = read_experiment(file / "config.toml" if file.is_dir() else file)
    if experiment.defense is None:
        raise ConfigError(f"{file}: expected a [defense] and a [hardening] table, got none; `louver audit` needs none")
    folder = out or (file if file.is_dir() else Path("runs") / experiment.name)
    if (folder / "config.toml").exists() and not resume:
        raise ConfigError(f"{folder} holds a run already; go on with --resume, or choose another folder with --out")
    with logging_to(experiment.name, lines=folder / "metrics.jsonl", tensorboard=tensorboard, mlflow=mlflow) as log:
        found = _run(experiment, folder, device=device, threads=threads, devices=devices, log=log)
    # Outside of the log: a broken threshold ends the program with an error code, and the run is no failed one.
    _show(found, folder, as_json=as_json)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="cifar10, cifar10-choices, cifar10-longer, faces, streets or vehicles.")],
    scale: Annotated[str, typer.Option(help="laptop, or paper for a GPU.")] = "laptop",
    out: Annotated[Path | None, typer.Option(help="Folder of the table; runs/bench/NAME-SCALE by default.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only cells whose name holds one of these, separated by commas.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and attacks.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; on two cores, 2 is faster than 1.")] = 1,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train, attack and compare all defenses on one set of images; finished cells are kept."""
    with lab():
        from louver.bench import run_bench
    set_threads(threads)
    chosen = device_named(device)
    folder = out or Path("runs") / "bench" / f"{name}-{scale}"
    with progress_shown() as tell, redirect_stdout(sys.stderr):
        facts = run_bench(
            name, scale=scale, folder=folder, only=only, seed=seed, device=chosen, jobs=jobs, progress=tell
        )
    if as_json:
        print(json.dumps(facts))
        return
    Console().print(_bench_table(facts))
    print(f"compare: louver compare {folder}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Run the whole job on a generated world: train, cut, attack, report, export, and serve. Needs no data."""
    with lab():
        from louver.config import read_experiment
        from louver.data import load_images
        from louver.experiment import run_experiment
        from louver.exporting import export_run
        from louver.loopback import try_service
        from louver.runs import to_json
        from louver.types import share_of
    with as_file(files("louver") / "demo.toml") as path:
        experiment = read_experiment(path)
        config = out / "config.toml"
        is_own = config.is_file() and read_experiment(config).name == experiment.name
        if out.is_dir() and any(out.iterdir()) and not is_own:
            raise ConfigError(f"{out} holds something else than a demo; choose another folder with --out")
    set_threads(threads)
    chosen = device_named(device)
    folder, cut = out / "bundle", experiment.audit.cuts[-1]
    with progress_shown() as tell, redirect_stdout(sys.stderr):
        found = run_experiment(experiment, out, device=chosen, progress=share_of(tell, 0.0, 0.7))
        # That of an earlier demo may be of another version; what its audit has finished is kept beside the run.
        shutil.rmtree(folder, ignore_errors=True)
        exporting = share_of(tell, 0.7, 0.95)
        bundle = export_run(out, folder, cut=cut, device=chosen, progress=lambda w, f: exporting(f"export: {w}", f))
        assert experiment.data.label is not None
        test = load_images(experiment.data.test).take(slice(0, _DEMO_IMAGES))
        service = try_service(bundle, test, test.column(experiment.data.label), share_of(tell, 0.95, 1.0))
    if as_json:
        _draw(found, out)
        print(json.dumps({**to_json(found), "bundle": bundle.id, "service": asdict(service)}))
        return
    _print_audit(found, _draw(found, out))
    print_service(bundle, service)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder of a finished audit.")],
    out: Annotated[Path | None, typer.Option(help="File to write; report.html in the folder by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the report of a finished run again."""
    with lab():
        from louver.report import write_report
        from louver.runs import load_audit, panels, to_json
    found = load_audit(folder)
    path = write_report(found, panels(folder, found), out or folder / "report.html")
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        print(path)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders of studied splits, or folders that hold them.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("comparison.html"),
    utility: Annotated[str | None, typer.Option(help="Figure of utility, such as accuracy or mAP.")] = None,
    leakage: Annotated[str, typer.Option(help="Measure of leakage, such as ssim or psnr.")] = "ssim",
    attack: Annotated[
        str, typer.Option(help="Judge every split by this attack, or each by the one that is strongest there.")
    ] = "strongest",
    as_json: AsJson = False,
) -> None:
    """Set defenses side by side: utility against leakage at equal edge cost, as one page."""
    with lab():
        from louver.comparison import compare as compare_folders
        from louver.comparison import to_json
        from louver.ordering import ordered
        from louver.report.comparison import write_comparison
        from louver.report.comparison_words import headline
        from louver.strips import pictures
    found = ordered(compare_folders(folders, utility=utility, measure=leakage, attack=attack))
    path = write_comparison(found, pictures(found), out)
    if as_json:
        print(json.dumps(to_json(found)))
        return
    Console().print(_comparison_table(found))
    print(headline(found))
    for folder in found.unfinished:
        print(f"note: {folder} is left out: its study has not ended")
    print(f"page: {path}")


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="cifar10/test[:100], streets/7[:48], a folder or a file.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet (PNG) here.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Bring pictures of a folder to this side.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a set of images holds, and draw a contact sheet of it."""
    with lab():
        from louver.data import contact_sheet, load_images
    images = load_images(name, size=size)
    found: dict[str, Any] = {
        "name": images.name,
        "images": len(images),
        "shape": list(images.image_shape),
        "labels": {
            column: {"values": len(set(values.tolist())), "classes": list(images.classes.get(column, ()))}
            for column, values in sorted(images.labels.items())
        },
    }
    if sheet is not None:
        found["sheet"] = str(contact_sheet(images, sheet))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    shape = "×".join(map(str, found["shape"]))
    print(f"{found['name']}: {found['images']} images of {shape}")
    for column, what in found["labels"].items():
        known = ", ".join(what["classes"][:12]) + (", …" if len(what["classes"]) > 12 else "")
        print(f"  {column}: {what['values']} values" + (f" ({known})" if known else ""))
    if sheet is not None:
        print(found["sheet"])


def _audit_bundle(
    folder: Path, out: Path | None, *, resume: bool, device: str, threads: int | None, as_json: bool
) -> NoReturn:
    with lab():
        from louver.bundle import read_bundle
        from louver.exporting import audit_bundle
    set_threads(threads)
    chosen = device_named(device)
    where = out or Path("runs") / f"{read_bundle(folder).name}-bundle"
    if where.exists() and not resume:
        raise ConfigError(f"{where} is in use; go on with --resume, or choose another folder with --out")
    with progress_shown() as tell, redirect_stdout(sys.stderr):
        found = audit_bundle(folder, where, device=chosen, progress=tell)
    _show(found, where, as_json=as_json)


def _run(
    experiment: Any,  # noqa: ANN401 - louver.config.Experiment, which needs the lab to import
    folder: Path,
    *,
    device: str,
    threads: int | None,
    devices: int = 1,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Audit:
    with lab():
        from louver.experiment import run_experiment
    set_threads(threads)
    chosen = device_named(device)
    # A user's network may print; standard output is for results.
    with progress_shown() as tell, redirect_stdout(sys.stderr):
        return run_experiment(experiment, folder, device=chosen, devices=devices, progress=tell, log=log)


def _show(found: Audit, folder: Path, *, as_json: bool) -> NoReturn:
    """Writes the report, prints what was found, and ends with the code that the verdict asks for."""
    from louver.runs import to_json

    path = _draw(found, folder)
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        _print_audit(found, path)
    raise typer.Exit(0 if found.verdict.passed else 1)


def _draw(found: Audit, folder: Path) -> Path:
    from louver.report import write_report
    from louver.runs import panels

    return write_report(found, panels(folder, found), folder / "report.html")


def _print_audit(found: Audit, path: Path) -> None:
    console = Console()
    console.print(_findings_table(found))
    for warning in found.verdict.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False)
    if found.verdict.checks:  # else the headline says that nothing was judged
        console.print(_verdict_table(found))
    console.print(found.verdict.headline, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


def _image_shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--image {text}: expected channels x height x width, such as 3x32x32")
    channels, height, width = map(int, parts)
    if max(channels, height, width) > _LARGEST_SIDE:
        raise ConfigError(f"--image {text}: expected sides of at most {_LARGEST_SIDE}")
    return channels, height, width


def _natural_shape(model: str) -> tuple[int, int, int]:
    if model.startswith("cifar_"):
        return 3, 32, 32
    return (3, 64, 64) if model == "street_net" else (3, 224, 224)


def _default_classes(model: str) -> int | None:
    return 6 if model == "street_net" else None


def _amount(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"


def _cuts_table(model: str, shape: tuple[int, int, int], found: list[Cut]) -> Table:
    table = Table(title=f"{len(found)} cuts of {model} at {'×'.join(map(str, shape))}", title_justify="left")
    headings = ["cut", "feature", "sent", "edge MACs", "cloud MACs", "edge weights", "edge peak memory"]
    has_latency = any(cut.cost.edge.latency for cut in found)
    for i, heading in enumerate(headings + (["edge ms", "cloud ms"] if has_latency else [])):
        table.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    for cut in found:
        cost = cut.cost
        cells = [
            cut.name,
            "×".join(map(str, cut.feature_shape)),
            _amount(cost.feature_bytes, "B"),
            _amount(cost.edge.macs, ""),
            _amount(cost.cloud.macs, ""),
            _amount(cost.edge.weight_bytes, "B"),
            _amount(cost.edge.peak_activation_bytes, "B"),
        ]
        if has_latency:
            cells += [f"{half.latency.median_ms:.2f}" if half.latency else "" for half in (cost.edge, cost.cloud)]
        table.add_row(*cells)
    return table


def _findings_table(found: Audit) -> Table:
    """The main measures on 80 columns; intervals and all else are in the report."""
    table = Table(title="What the attacks rebuilt: mean (floor)", title_justify="left")
    measures = [m for m in ("ssim", "psnr", "recognized") if any(r.measure == m for r in found.rows)]
    measures = measures or list(dict.fromkeys(r.measure for r in found.rows))[:3]
    for heading in ("cut", "attack", "images", *measures):
        table.add_column(heading, justify="left" if heading in ("cut", "attack") else "right", overflow="fold")
    by_place = {(row.cut, row.attack, row.measure): row for row in found.rows}
    floor = found.rows[0].attack
    for cut, attack_name in dict.fromkeys((r.cut, r.attack) for r in found.rows if r.attack != floor):
        rows = [by_place[cut, attack_name, measure] for measure in measures]
        table.add_row(cut, attack_name, str(rows[0].n_images), *(f"{r.mean:.3g} ({r.floor:.3g})" for r in rows))
    return table


def _bench_table(facts: list[dict[str, Any]]) -> Table:
    """One line a cell: what it is good for, and what the strongest attack rebuilt."""
    table = Table(title=f"{facts[0]['group']}: utility against leakage", title_justify="left")
    for heading in ("cell", "utility", "ssim (floor)", "psnr", "edge MACs", "sent"):
        table.add_column(heading, justify="left" if heading == "cell" else "right", overflow="fold")
    for fact in facts:
        name, figure = next(iter(fact["utility"].items()))
        strongest = {
            measure: max((row for row in fact["leakage"] if row["measure"] == measure), key=lambda row: row["mean"])
            for measure in ("ssim", "psnr")
        }
        ssim, psnr = strongest["ssim"], strongest["psnr"]
        table.add_row(
            fact["name"],
            f"{name} {figure['mean']:.3f} ± {(figure['high'] - figure['low']) / 2:.3f}",
            f"{ssim['mean']:.3f} ({ssim['floor']:.3f})",
            f"{psnr['mean']:.1f}",
            _amount(fact["edge_macs"], ""),
            _amount(fact["feature_bytes"], "B"),
        )
    return table


def _comparison_table(found: Comparison) -> Table:
    """One line a split, on 80 columns; intervals and all else are on the page."""
    table = Table(title=f"{found.utility} against {found.measure} of {found.attack}", title_justify="left")
    for heading in ("split", found.utility, f"{found.measure} (floor)", "edge MACs", "sent", "front", "leaks"):
        table.add_column(heading, justify="left" if heading == "split" else "right", overflow="fold")
    for one in found.entries:
        sides = {"better": "less", "worse": "more", "not told apart": "not shown", None: ""}
        table.add_row(
            one.label,
            f"{one.utility.mean:.3f}",
            f"{one.leak.mean:.3g} ({one.leak.floor:.3g})",
            _amount(one.facts.edge_macs, ""),
            _amount(one.facts.feature_bytes, "B"),
            "yes" if one.is_on_front else "",
            sides[one.private],
        )
    return table


def _verdict_table(found: Audit) -> Table:
    table = Table(title="Verdict: " + ("passed" if found.verdict.passed else "NOT passed"), title_justify="left")
    for heading in ("threshold", "status", "reason"):
        table.add_column(heading, overflow="fold")
    for check in found.verdict.checks:
        table.add_row(check.rule, check.status, check.reason)
    return table
