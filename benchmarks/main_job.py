"""The main job as a user runs it: `louver audit examples/cifar10-resnet20.toml`, its time and its findings.

python benchmarks/main_job.py            some 20 minutes on two cores
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import record
from louver.runs import load_audit

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10-resnet20.toml"


def figures(folder: Path, seconds: float) -> dict[str, Any]:
    """What the run in `folder` found: each attack at each cut, by the measures that people read, beside its floor."""
    found = load_audit(folder)
    return {
        "minutes": round(seconds / 60, 1),
        "accuracy": found.utility["accuracy"],
        "rows": [
            {
                "cut": row.cut,
                "attack": row.attack,
                "measure": row.measure,
                "mean": round(row.mean, 4),
                "interval": [round(row.low, 4), round(row.high, 4)],
                "worst_5_percent": round(row.worst, 4),
                "floor": round(row.floor, 4),
                "n_images": row.n_images,
                "seconds": round(row.seconds, 1),
            }
            for row in found.rows
            if row.measure in ("ssim", "psnr", "recognized", "reidentified")
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/main-job"))
    arguments = parser.parse_args()
    started = time.monotonic()
    command = [
        sys.executable,
        "-c",
        "from louver.cli import main; main()",
        "audit",
        str(EXAMPLE),
        "--out",
        str(arguments.out),
    ]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        sys.exit(code)
    seconds = time.monotonic() - started
    print(record("main_job", figures(arguments.out, seconds), seed=0, seconds=seconds))


if __name__ == "__main__":
    main()
