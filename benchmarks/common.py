"""What every benchmark records beside its figures: how to run it again, and on what it ran."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from louver.storage import write_bytes

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """The hardware and versions, without names or addresses."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "amx": str(bool(torch.cpu._is_amx_tile_supported())),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def strongest(cell: dict[str, Any], measure: str) -> dict[str, Any]:
    """A recorded cell's figures for the attack that leaks most by `measure`."""
    rows = [row for row in cell["leakage"] if row["measure"] == measure]
    found: dict[str, Any] = max(rows, key=lambda row: row["mean"])
    return found


def commit() -> str:
    """The commit that was measured, with a + if the tree held changes other than results."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "..", ":(exclude)results") else ""
    )


_MEASURED = commit()  # now: by the time that a long run ends, the tree may have moved on


def record(name: str, figures: dict[str, Any], *, seed: int, seconds: float) -> Path:
    """Writes benchmarks/results/NAME.json: the figures, with command, commit, seed and machine, and no path of it."""
    asked = ["PATH" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    content = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *asked]),
        "commit": _MEASURED,
        "seed": seed,
        "seconds": round(seconds, 1),
        "machine": machine(),
        **figures,
    }
    return write_bytes(RESULTS / f"{name}.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
