"""All defenses on one set of images, as `louver bench NAME` runs them, recorded in results/defenses-NAME-SCALE.json.

python benchmarks/defenses.py faces [--scale laptop] [--only noisy,advanced]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from common import record
from louver.bench import run_bench
from louver.tables import BENCHES

KEPT = ("name", "defense", "variant", "knob", "strength", "cut", "edge_macs", "feature_bytes", "seconds")


def compact(facts: dict[str, Any]) -> dict[str, Any]:
    """What a table needs, rounded to what is known of it."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list) else value

    parts = ("utility", "leakage", "information", "probes", "completion")
    hidden = ("rank_privacy", "log_rank_privacy", "explained_variance")
    return {key: rounded(facts[key]) for key in (*KEPT, *parts, *hidden)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHES), default="streets")
    parser.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    parser.add_argument("--only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    facts = run_bench(
        arguments.name,
        scale=arguments.scale,
        folder=Path("runs") / "bench" / f"{arguments.name}-{arguments.scale}",
        only=arguments.only,
        seed=arguments.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        jobs=arguments.jobs,
        progress=lambda what, fraction: print(f"{fraction:6.1%} {what}", flush=True),
    )
    seconds = time.monotonic() - started
    figures = {"minutes": round(seconds / 60, 1), "cells": [compact(one) for one in facts]}
    print(record(f"defenses-{arguments.name}-{arguments.scale}", figures, seed=arguments.seed, seconds=seconds))


if __name__ == "__main__":
    main()
