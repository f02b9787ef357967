"""What every command of the command line shares: options, progress, devices, and what to say of a missing extra."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from louver.errors import ConfigError, MissingExtraError

__all__ = ["AsJson", "Device", "Threads", "device_named", "lab", "needing", "progress_shown", "set_threads"]

_LAB = (
    *("jaxtyping", "jinja2", "lightning_fabric", "PIL", "pyarrow", "pydantic", "pytorch_metric_learning"),
    *("safetensors", "timm", "tomli_w", "torch", "torch_pruning", "torchvision"),
)

_LOG_EVERY_S = 15.0

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")]


@contextmanager
def needing(extra: str, packages: Collection[str]) -> Iterator[None]:
    """Turns the absence of one of an extra's packages into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        raise MissingExtraError(f"this command needs {error.name}: pip install 'louver[{extra}]'") from error


def lab() -> AbstractContextManager[None]:
    """`needing` what the laboratory stands on."""
    return needing("lab", _LAB)


@contextmanager
def progress_shown() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error, which leaves standard output to results; in a log, a line now and then."""
    console = Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        last = -_LOG_EVERY_S

        def log(what: str, fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _LOG_EVERY_S:
                last = time.monotonic()
                console.print(f"{fraction:4.0%} {what}", markup=False, highlight=False)

        yield log
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def device_named(name: str) -> str:
    """The device that --device means.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    if name.startswith("meta"):
        raise ConfigError("--device meta computes nothing; use auto, cpu or a device of this machine")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu or a device of this machine"
        ) from error
    return name


def set_threads(threads: int | None) -> None:
    """Bounds torch's threads, where a bound was asked for."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
