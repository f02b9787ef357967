"""The recorded comparisons: every cell of a table is one defended split, trained, attacked and kept.

`louver bench NAME --scale laptop|paper` runs one table. Every cell is a run folder of `louver.study`, finished cells
are not run again, and every cell is attacked anew with attacks that were fitted to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from louver.cut import split
from louver.defenses import NoDefense
from louver.defenses.channels import edge_digest
from louver.devices import n_cores
from louver.errors import ConfigError, LouverError, nearest
from louver.hardening import Origin, describe
from louver.storage import write_json
from louver.study import study, weakened
from louver.tables import BENCHES, Bench, Cell
from louver.types import Progress, Roles

__all__ = ["run_bench"]


def run_bench(
    name: str,
    *,
    scale: str,
    folder: Path,
    only: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The facts of every cell of table `name`, in order.

    `only` limits it to cells whose name holds one of its parts, separated by commas; a part that is the whole name of
    a cell means this cell alone. `jobs` cells run at a time, each in a process of its own with its share of the cores:
    small networks keep two cores busier with one cell each than with one cell on both.

    Raises:
        ConfigError: no such table or scale, no cell that holds `only`, or fewer than 1 job.
        LouverError: whatever a cell refuses; finished cells are kept.
    """
    if name not in BENCHES:
        raise ConfigError(f"no bench {name!r}; {nearest(name, sorted(BENCHES))}")
    if scale not in ("laptop", "paper"):
        raise ConfigError(f"no scale {scale!r}; legal: laptop, paper")
    tell = progress or (lambda what, fraction: None)
    bench = BENCHES[name]("laptop" if scale == "laptop" else "paper", seed)
    cells = _chosen(bench.cells, only)
    if jobs < 1:
        raise ConfigError(f"expected 1 job or more at a time, got {jobs}")
    model = bench.victim(folder, tell)
    weights = edge_digest(model)
    keys = {cell.name: _key(bench, cell, scale, weights) for cell in cells}
    if jobs > 1:
        open_ones = [cell for cell in cells if _finished(folder / cell.name, keys[cell.name]) is None]
        _run_together(open_ones, ["bench", name, "--scale", scale, "--seed", str(seed)], folder, device, jobs, tell)
    example = torch.from_numpy(bench.roles.test.floats(slice(0, 2)))
    facts = []
    for order, cell in enumerate(cells):
        path = folder / cell.name
        done = _finished(path, keys[cell.name])
        if done is None:

            def told(what: str, fraction: float, order: int = order, cell: Cell = cell) -> None:
                tell(f"{cell.name}: {what}", (order + fraction) / len(cells))

            origin = Origin(
                model=bench.model,
                n_classes=bench.n_outputs,
                image_shape=bench.roles.test.image_shape,
                cut=cell.cut,
                defense=cell.defense,
            )
            training = replace(bench.training, epochs=cell.epochs or bench.training.epochs)
            (path / "bench.json").unlink(missing_ok=True)
            done = study(
                split(model, cell.cut, example),
                origin,
                bench.roles,
                bench.task,
                bench.judging,
                config=training if cell.is_trained else None,
                folder=path,
                name=cell.name,
                group=bench.group,
                knob=cell.knob,
                strength=cell.strength,
                variant=cell.variant,
                label=bench.label,
                notes=weakened(bench.judging.attacks),
                seed=bench.seed,
                device=device,
                progress=told,
            )
            write_json(path / "bench.json", {"key": keys[cell.name]})
        facts.append(done)
    return facts


def _chosen(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    names = {cell.name for cell in cells}
    wanted = only.split(",") if only else [""]
    chosen = [
        cell for cell in cells if any(part == cell.name or (part not in names and part in cell.name) for part in wanted)
    ]
    if not chosen:
        raise ConfigError(f"no cell holds {only!r}; {nearest(only or '', sorted(names))}")
    return chosen


def _run_together(
    cells: Sequence[Cell],
    command: Sequence[str],
    folder: Path,
    device: torch.device | str,
    jobs: int,
    tell: Progress,
) -> None:
    """Runs each cell as `louver COMMAND --only CELL`; what it says is kept in the cell's `bench.log`.

    Raises:
        LouverError: a cell failed; the others that had begun are stopped, and what they finished is kept.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, n_cores() // jobs))}
    waiting, running = list(cells), dict[str, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                (folder / cell.name).mkdir(parents=True, exist_ok=True)
                options = ["--only", cell.name, "--out", str(folder), "--device", str(device), "--json"]
                with (folder / cell.name / "bench.log").open("wb") as log:
                    running[cell.name] = subprocess.Popen(
                        [sys.executable, "-m", "louver", *command, *options],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode != 0:
                    said = (folder / name / "bench.log").read_text(errors="replace").strip().splitlines()
                    raise LouverError(f"cell {name} failed: {' '.join(said[-3:]) or process.returncode}")
                tell(f"{name}: done", 1 - (len(waiting) + len(running)) / len(cells))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    try:
        if json.loads((path / "bench.json").read_text())["key"] != key:
            return None
        facts: dict[str, Any] = json.loads((path / "facts.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    return facts


def _key(bench: Bench, cell: Cell, scale: str, weights: str) -> str:
    """All that a cell's facts depend on, the program included, but for the images, whose names the table fixes."""
    digest = hashlib.sha256(_program() + weights.encode())
    parts = (
        *(scale, describe(cell.defense), replace(cell, defense=NoDefense()), bench.judging, bench.training),
        *(bench.task, bench.seed, metadata.version("louver"), *(len(images) for images in _all(bench.roles))),
    )
    digest.update("\n".join(map(repr, parts)).encode())
    return digest.hexdigest()


@cache
def _program() -> bytes:
    """A digest of this package's source: a cell that a weaker attack judged must not stand beside later ones."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _all(roles: Roles) -> tuple[Any, ...]:
    return roles.train, roles.validation, roles.test, roles.auxiliary
