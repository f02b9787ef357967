"""Studied splits made up for comparisons: nothing was trained or attacked, the files only have the right shape."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

N_IMAGES = {"decoder": 40, "likelihood": 16}
MEASURES = {"ssim": ("", "high", 0.12), "psnr": ("dB", "high", 12.1), "mse": ("", "low", 0.088)}


def facts(name: str, defense: str, accuracy: float, leaks: Mapping[str, float], **changed: Any) -> dict[str, Any]:
    """What a study would write: `leaks` is the mean SSIM of each attack, and other measures follow from it."""
    leakage = []
    for attack, ssim in leaks.items():
        for measure, (unit, leaks_when, floor) in MEASURES.items():
            mean = {"ssim": ssim, "psnr": 10 + 25 * ssim, "mse": 0.1 * (1 - ssim)}[measure]
            wide = {"ssim": 0.02, "psnr": 0.5, "mse": 0.002}[measure]
            worst = mean + (2 * wide if leaks_when == "high" else -2 * wide)
            leakage.append(
                {
                    "attack": attack,
                    "measure": measure,
                    "unit": unit,
                    "leaks_when": leaks_when,
                    "mean": mean,
                    "low": mean - wide,
                    "high": mean + wide,
                    "worst": worst,
                    "worst_low": worst - wide,
                    "worst_high": worst + wide,
                    "floor": floor,
                    "n_images": N_IMAGES.get(attack, 40),
                    "beats_floor": mean - wide > floor if leaks_when == "high" else mean + wide < floor,
                }
            )
    strongest = max(leaks.values())
    made: dict[str, Any] = {
        "format": 1,
        "name": name,
        "group": "CIFAR-10",
        "defense": defense,
        "knobs": {},
        "knob": None,
        "strength": None,
        "variant": "",
        "is_trained": True,
        "cut": "layer2",
        "edge_macs": 10_000_000,
        "edge_parameters": 50_000,
        "edge_weight_bytes": 200_000,
        "feature_bytes": 8192,
        "feature_shape": [32, 8, 8],
        "seed": 0,
        "task": "Classification(column='label', n_classes=10)",
        "task_title": "classification of 'label' into 10 classes",
        "utility": {"accuracy": {"mean": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02, "n": 1000}},
        "leakage": leakage,
        "information": {
            "mine": {
                "mean": 1 + 3 * strongest,
                "low": 0.9 + 3 * strongest,
                "high": 1.1 + 3 * strongest,
                "unit": "nats",
            },
            "entropy": {"mean": 900 * strongest, "unit": "bits"},
            "effective_volume": {"mean": 200 + 1000 * strongest, "unit": "elements that are not 0"},
            "effective_dimensions": {"mean": 30 * strongest, "unit": "directions"},
        },
        "probes": [
            {"column": "place", "on": on, "probe": probe, "accuracy": 0.3, "low": 0.27, "high": 0.33, "chance": 0.21}
            | {"uniform_chance": 0.2, "beats_chance": True, "n": 400}
            for on, probe in (("features", "linear"), ("features", "neighbor"), ("reconstructions (decoder)", "tail"))
        ],
        "completion": [],
        "rank_privacy": None,
        "seconds": {"harden": 61.0, "audit": 122.0, "all": 190.0},
    }
    return made | changed


def scene(count: int, side: int = 32, seed: int = 7) -> np.ndarray:
    """Disks and bars under a sky, uint8 (n, 3, side, side)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    made = []
    for _ in range(count):
        sky, disk, bar = rng.uniform(40, 255, (3, 3, 1, 1))
        picture = sky * (1 - 0.5 * y)
        inside = (x - rng.uniform(0.3, 0.7)) ** 2 + (y - rng.uniform(0.3, 0.7)) ** 2 < rng.uniform(0.03, 0.09)
        picture = np.where(inside, disk, picture)
        made.append(np.where(np.abs(x - rng.uniform(0.1, 0.9)) < 0.07, bar, picture))
    return np.clip(np.stack(made), 0, 255).astype(np.uint8)


def blurred(pictures: np.ndarray, times: int) -> np.ndarray:
    """Each pixel mixed with its four neighbors, so many times."""
    held = pictures.astype(np.float64)
    for _ in range(times):
        held = (held + sum(np.roll(held, shift, axis) for shift in (1, -1) for axis in (2, 3))) / 5
    return held.astype(np.uint8)


def write(folder: Path, made: Mapping[str, Any], *, images: np.ndarray | None = None, has_units: bool = True) -> Path:
    """A run folder of the split `made`; returns it."""
    folder.mkdir(parents=True)
    (folder / "facts.json").write_text(json.dumps(made))
    truth = scene(40) if images is None else images
    np.savez_compressed(folder / "truth.npz", images=truth, index=np.arange(len(truth)) * 3 + 5)
    for attack in dict.fromkeys(row["attack"] for row in made["leakage"]) if has_units else ():
        own = [row for row in made["leakage"] if row["attack"] == attack]
        unit = folder / "units" / re.sub(r"[^\w.-]", "_", made["cut"]) / attack
        unit.mkdir(parents=True)
        count = own[0]["n_images"]
        ssim = next(row["mean"] for row in own if row["measure"] == "ssim")
        pictures = blurred(truth[:count], round(40 * (1 - ssim) ** 2))
        np.savez_compressed(unit / "pictures.npz", images=pictures)
        # Images leak more, the later they come but for one half turn: the order is not that of their places.
        turn = np.roll(np.linspace(-1, 1, count), count // 2)
        values = {row["measure"]: (row["mean"] * (1 + 0.05 * turn)).tolist() for row in own}
        (unit / "unit.json").write_text(json.dumps({"key": "k", "seconds": 1.0, "values": values}))
    return folder


def sweep(
    root: Path,
    defense: str,
    knob: str,
    strengths: Sequence[float],
    accuracies: Sequence[float],
    leaks: Sequence[float],
    **changed: Any,
) -> None:
    """Run folders of one knob."""
    for strength, accuracy, leak in zip(strengths, accuracies, leaks, strict=True):
        name = f"{defense}-{changed.get('variant', '')}{strength:g}".replace(" ", "-")
        both = {"decoder": leak, "likelihood": leak - 0.05}
        write(root / name, facts(name, defense, accuracy, both, knob=knob, strength=strength, **changed))


def bench(root: Path) -> Path:
    """A whole table: three undefended cuts, eight defenses, an ablation; returns `root`."""
    for cut, macs, leak in (("layer1", 10_100_000, 0.93), ("layer2", 21_000_000, 0.78), ("layer3", 36_000_000, 0.41)):
        both = {"decoder": leak, "likelihood": leak - 0.04}
        changed = {"variant": cut, "cut": cut, "edge_macs": macs}
        write(root / f"none-{cut}", facts(f"none-{cut}", "none", 0.918, both, **changed))
    deep: dict[str, Any] = {"edge_macs": 21_000_000}
    sweep(root, "noise", "std", (0.5, 1, 2), (0.905, 0.842, 0.61), (0.63, 0.48, 0.31), **deep)
    sweep(root, "nopeek", "weight", (1, 4, 16), (0.915, 0.906, 0.872), (0.71, 0.6, 0.47), **deep)
    sweep(root, "patrol", "beta", (0.25, 1, 4), (0.911, 0.903, 0.86), (0.52, 0.36, 0.27), edge_macs=10_050_000)
    for part, leak in (("pruning", 0.44), ("Lipschitz term", 0.39), ("adversary", 0.58)):
        ablated = {"variant": f"without {part}", "edge_macs": 21_000_000 if part == "pruning" else 10_050_000}
        sweep(root, "patrol", "beta", (1,), (0.904,), (leak,), **ablated)
    sweep(root, "siftfunnel", "channels", (12, 6, 3), (0.908, 0.892, 0.855), (0.45, 0.33, 0.24), edge_macs=24_500_000)
    sweep(root, "privynet", "n_channels", (16, 8, 4), (0.88, 0.85, 0.79), (0.55, 0.46, 0.38), **deep)
    random = {"variant": "random channels", **deep}
    sweep(root, "privynet", "n_channels", (16, 8, 4), (0.873, 0.838, 0.77), (0.57, 0.49, 0.42), **random)
    sweep(root, "hybrid", "noise_std", (0.5, 1, 2), (0.897, 0.871, 0.802), (0.35, 0.29, 0.22), **deep)
    sweep(root, "bottleneck", "channels", (12, 6, 3), (0.914, 0.9, 0.86), (0.68, 0.55, 0.43), **deep)
    sweep(root, "dropout", "rate", (0.5, 0.8, 0.95), (0.911, 0.89, 0.8), (0.69, 0.59, 0.46), **deep)
    sweep(root, "adversarial", "weight", (1,), (0.899,), (0.5,), **deep)
    return root
