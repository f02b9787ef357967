"""What was claimed of the four systems, answered yes or no from the recorded tables, in results/claims-SCALE.json.

python benchmarks/claims.py [--scale laptop]

Reads results/defenses-NAME-SCALE.json as `benchmarks/defenses.py` wrote them; of a table that is not there nothing is
said. Leakage is that of the strongest attack; one cell leaks less than another if their intervals do not meet.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from common import RESULTS, record

Cell = dict[str, Any]
BASELINES = ("none", "noise", "nopeek", "bottleneck", "dropout", "adversarial")


def table(name: str, scale: str) -> dict[str, Cell]:
    path = RESULTS / f"defenses-{name}-{scale}.json"
    return {one["name"]: one for one in json.loads(path.read_text())["cells"]} if path.is_file() else {}


def utility(cell: Cell) -> tuple[float, float, float]:
    first = next(iter(cell["utility"].values()))
    return first["mean"], first["low"], first["high"]


def leak(cell: Cell, measure: str) -> dict[str, Any]:
    """The row of the strongest attack by `measure`; the floor where that is no stronger: anyone can send it."""
    row: dict[str, Any] = max(
        (row for row in cell["leakage"] if row["measure"] == measure), key=lambda row: row["mean"]
    )
    return row | {key: max(row[key], row["floor"]) for key in ("mean", "low", "high", "worst")}


def error(cell: Cell) -> float:
    """Geometric mean over images of the squared error of the strongest attack, which is what mean PSNR says."""
    return float(10 ** (-leak(cell, "psnr")["mean"] / 10))


def line(cell: Cell) -> dict[str, Any]:
    ssim, (mean, low, high) = leak(cell, "ssim"), utility(cell)
    return {
        "utility": [mean, low, high],
        "ssim": [ssim["mean"], ssim["low"], ssim["high"], ssim["floor"]],
        "psnr": leak(cell, "psnr")["mean"],
        "edge_macs": cell["edge_macs"],
    }


def less(a: Cell, b: Cell) -> bool:
    """Whether `a` is shown to leak less than `b`: the intervals of SSIM do not meet."""
    return bool(leak(a, "ssim")["high"] < leak(b, "ssim")["low"])


def siftfunnel(cells: dict[str, Cell], base: str) -> list[dict[str, Any]]:
    """Fewer than 3 points lost, 30 % more error than the best baseline of no less accuracy, information halved."""
    found = []
    for name in (name for name in cells if name.startswith("siftfunnel")):
        cell = cells[name]
        rivals = [
            one
            for one in cells.values()
            if one["defense"] in BASELINES and one["cut"] == cell["cut"] and utility(one)[0] >= utility(cell)[0]
        ]
        best = max(rivals, key=error, default=None)
        halved = {
            what: cell["information"][what]["mean"] / cells[base]["information"][what]["mean"]
            for what in ("mine", "effective_volume")
        }
        lost = utility(cells[base])[0] - utility(cell)[0]
        more = error(cell) / error(best) - 1 if best else None
        found.append(
            {
                "cell": name,
                **line(cell),
                "points lost": round(100 * lost, 2),
                "best baseline": best and best["name"],
                "error against it": more and round(more, 3),
                "information left": {what: round(value, 3) for what, value in halved.items()},
                "answer": {
                    "fewer than 3 points lost": lost < 0.03,
                    "30 % more error": more is not None and more >= 0.3,
                    "information halved": all(value <= 0.5 for value in halved.values()),
                },
            }
        )
    return found


def patrol(cells: dict[str, Cell], shallower: str, deeper: str) -> dict[str, Any]:
    """Against both unprotected cuts, fewer than 3 points lost; and what each part contributes at beta = 1."""
    swept = {
        name: cell for name, cell in cells.items() if name.startswith("patrol-") and not name.startswith("patrol-no")
    }
    parts = {}
    for name in (name for name in cells if name.startswith("patrol-no-")):
        whole, without = cells["patrol-1"], cells[name]
        parts[name.removeprefix("patrol-no-")] = {
            **line(without),
            "leaks more without it": less(whole, without),
            "costs more without it": without["edge_macs"] > whole["edge_macs"],
        }
    return {
        "unprotected": {name: line(cells[name]) for name in (shallower, deeper)},
        "cells": {
            name: {
                **line(cell),
                "leaks less than the shallower cut at no more MACs": less(cell, cells[shallower])
                and cell["edge_macs"] <= cells[shallower]["edge_macs"],
                "leaks less than the deeper cut": less(cell, cells[deeper]),
                "points lost": round(100 * (utility(cells[deeper])[0] - utility(cell)[0]), 2),
                "answer": less(cell, cells[shallower])
                and less(cell, cells[deeper])
                and cell["edge_macs"] <= cells[shallower]["edge_macs"]
                and utility(cells[deeper])[0] - utility(cell)[0] < 0.03,
            }
            for name, cell in swept.items()
        },
        "parts": parts,
    }


def against(cells: dict[str, Cell], first: str, others: tuple[str, ...]) -> list[dict[str, Any]]:
    """`first` against each of `others` at equal strengths: points gained, change of the strongest attack in dB."""
    found = []
    for cell in (cell for name, cell in cells.items() if name.startswith(f"{first}-")):
        rivals = [
            one
            for name, one in cells.items()
            if name.rpartition("-")[0] in others and one["strength"] == cell["strength"]
        ]
        if not rivals:
            continue
        points = [100 * (utility(cell)[0] - utility(one)[0]) for one in rivals]
        decibels = [leak(cell, "psnr")["mean"] - leak(one, "psnr")["mean"] for one in rivals]
        found.append(
            {
                "strength": cell["strength"],
                "points": [round(value, 2) for value in points],
                "dB": [round(value, 2) for value in decibels],
                first: line(cell),
                "others": {one["name"]: line(one) for one in rivals},
                "answer": {
                    "more useful in every draw": min(points) > 0,
                    "leaks less in every draw": all(less(cell, one) for one in rivals),
                },
            }
        )
    return found


def identified(cell: Cell) -> dict[str, Any]:
    """The probe of identity that finds most."""
    return max(cell["probes"], key=lambda row: row["accuracy"])


def hidden(cell: Cell) -> dict[str, Any]:
    """Usefulness beside how well people hide: by rank among pictures, by rank among people, by the best probe."""
    probe = identified(cell)
    return {
        "strength": cell["strength"],
        "utility": list(utility(cell)),
        "rank privacy": cell["rank_privacy"] and [cell["rank_privacy"][key] for key in ("privacy", "low", "high")],
        "log-rank privacy": cell["log_rank_privacy"]
        and [cell["log_rank_privacy"][key] for key in ("privacy", "low", "high", "chance")],
        "identified": [probe["probe"], probe["accuracy"], probe["low"], probe["high"], probe["chance"]],
    }


def embeddings(cells: dict[str, Cell]) -> dict[str, Any]:
    """Advanced against noisy at equal noise, and whether privacy rises before usefulness falls.

    The shape holds where at some noise at least half of the way from clear to hidden (rank privacy, 0 to 0.5) is done
    and usefulness lies at most 3 points below that of the least noise.
    """
    swept = {
        kind: sorted((one for one in cells.values() if one["variant"] == kind), key=lambda one: one["strength"])
        for kind in ("advanced", "noisy")
    }
    pairs = []
    for one in swept["advanced"]:
        for other in (other for other in swept["noisy"] if other["strength"] == one["strength"]):
            points = 100 * (utility(one)[0] - utility(other)[0])
            pairs.append(
                {
                    "advanced": hidden(one),
                    "noisy": hidden(other),
                    "points": round(points, 2),
                    "answer": {
                        "no less useful": points >= 0,
                        "hides shown better": one["rank_privacy"]["low"] > other["rank_privacy"]["high"],
                        "hides shown worse": one["rank_privacy"]["high"] < other["rank_privacy"]["low"],
                    },
                }
            )
    curve = [hidden(one) for one in swept["advanced"]]
    best = utility(swept["advanced"][0])[0]
    return {
        "pairs": pairs,
        "curve": curve,
        "privacy rises before usefulness falls": any(
            one["rank privacy"][0] >= 0.25 and one["utility"][0] >= best - 0.03 for one in curve
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    scale = parser.parse_args().scale
    started = time.monotonic()
    cifar, choices, faces = (table(name, scale) for name in ("cifar10", "cifar10-choices", "faces"))
    figures: dict[str, Any] = {}
    if cifar:
        figures["SiftFunnel, CIFAR-10"] = siftfunnel(cifar, "none-layer2-tuned")
        figures["PATROL, CIFAR-10"] = patrol(cifar, "none-layer1", "none-layer2-tuned")
    if choices:
        random_draws = tuple(f"random{draw}" for draw in range(10))
        figures["Fisher against random channels, CIFAR-10"] = against(choices, "fisher", random_draws)
    if faces:
        figures["advanced against noisy embedding, faces"] = embeddings(faces)
    for name in ("vehicles", "streets"):
        cells = table(name, scale)
        if cells:
            figures[f"SiftFunnel, {name}"] = siftfunnel(cells, "none-stage3-tuned")
            figures[f"PATROL, {name}"] = patrol(cells, "none-stage2", "none-stage3-tuned")
    figures = {claim: found for claim, found in figures.items() if found}
    print(json.dumps(figures, indent=1))
    print(record(f"claims-{scale}", {"claims": figures}, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
