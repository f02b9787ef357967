"""A recorded table of defenses as Markdown, as docs/measured-defenses.md shows it.

python benchmarks/table.py cifar10 [--scale laptop]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from common import RESULTS, strongest

Cell = dict[str, Any]


def markdown(name: str, scale: str = "laptop") -> str:
    """The table of results/defenses-NAME-SCALE.json."""
    record = json.loads((RESULTS / f"defenses-{name}-{scale}.json").read_text())
    cells: list[Cell] = record["cells"]
    heads = ["cell", *cells[0]["utility"], "SSIM (worst 5 %, floor)", "PSNR, dB"]
    has_completion = any(one["completion"] for one in cells)
    has_probes, has_ranks = any(one["probes"] for one in cells), any(one.get("log_rank_privacy") for one in cells)
    heads += ["private label read best (chance)"] if has_probes else []
    heads += ["rank privacy", "log-rank privacy"] if has_ranks else []
    heads += ["learned from few labels (chance)"] if has_completion else []
    heads += ["MINE, nats", "effective volume", "edge MACs", "bytes"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for one in cells:
        row = [one["name"], *(interval(figure) for figure in one["utility"].values()), *leak(one)]
        row += [probe(one)] if has_probes else []
        row += [interval(hidden(one, key)) for key in ("rank_privacy", "log_rank_privacy")] if has_ranks else []
        row += [", ".join(learned(found) for found in one["completion"])] if has_completion else []
        mine, volume = (one["information"][key]["mean"] for key in ("mine", "effective_volume"))
        row += [f"{mine:.2f}", f"{volume:,.0f}", f"{one['edge_macs'] / 1e6:.1f} M", f"{one['feature_bytes']:,}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def interval(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def leak(cell: Cell) -> tuple[str, str]:
    """SSIM and PSNR, each of the attack that is strongest by it."""
    ssim, psnr = strongest(cell, "ssim"), strongest(cell, "psnr")
    return f"{interval(ssim)} {ssim['attack']} ({ssim['worst']:.3f}, {ssim['floor']:.2f})", f"{psnr['mean']:.1f}"


def probe(cell: Cell) -> str:
    """The label and probe that got farthest above chance."""
    if not cell["probes"]:
        return ""
    best = max(cell["probes"], key=lambda row: (row["accuracy"] - row["chance"]) / max(1e-9, 1 - row["chance"]))
    return f"{best['column']} {interval({**best, 'mean': best['accuracy']})} by {best['probe']} ({best['chance']:.3f})"


def learned(found: dict[str, Any]) -> str:
    figure = interval({**found, "mean": found["accuracy"]})
    return f"{figure} of {found['count']} a class ({found['chance']:.2f})"


def hidden(cell: Cell, key: str) -> dict[str, Any] | None:
    found = cell.get(key)
    return None if found is None else {**found, "mean": found["privacy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    arguments = parser.parse_args()
    print(markdown(arguments.name, arguments.scale), end="")


if __name__ == "__main__":
    main()
