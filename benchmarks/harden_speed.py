"""What each defense costs in training time, against plain fine-tuning of the same split, side by side in one run.

Each round times one epoch of every defense on the same images with the same options; ratios are to the plain epoch of
the same round. So it is for the whole of `harden` over four epochs, which adds surgery, what comes between training and
mending (a search for what to prune, components), and mending. Distance correlation is timed beside the two matrix
products that it cannot do without.

    python benchmarks/harden_speed.py [--rounds 5] [--whole-rounds 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common import record
from louver.cut import Split, split
from louver.data import load_images
from louver.defenses import (
    PATROL,
    AddedNoise,
    AdversarialTraining,
    Bottleneck,
    Defense,
    FeatureDropout,
    Hybrid,
    NoDefense,
    NoPeek,
    PrivyNet,
    SiftFunnel,
)
from louver.hardening import harden
from louver.measures.information import distance_correlation
from louver.models import load_model
from louver.tasks import Classification
from louver.training import Training, train

LIMITS = {"siftfunnel": 1.3, "nopeek": 1.2, "patrol": 3.0, "hybrid": 2.1}
ROWS = 1536


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def epoch_of(defense: Defense, halves: Split, images: Any, validation: Any) -> Callable[[], object]:
    task = Classification("label", 10)
    operated = defense.operate(halves, images, task.targets(images), seed=0)
    config = Training(epochs=1, batch_size=128, lr=1e-4)

    def run() -> object:
        pressure = defense.pressure(operated, is_mending=False, seed=0)
        return train(operated, task, images, validation, pressure, config=config, epochs=1, seed=0)

    return run


def whole_of(defense: Defense, halves: Split, images: Any, validation: Any) -> Callable[[], object]:
    config = Training(epochs=4, batch_size=128, lr=1e-4)
    return lambda: harden(halves, Classification("label", 10), images, validation, defense, config=config)


def ratios_of(runs: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of every run in every round, and their ratios to "none" of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
        print(f"round {number + 1}:", {name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    ratios = {name: sorted(a / b for a, b in zip(seconds[name], seconds["none"], strict=True)) for name in seconds}
    return (
        {name: [round(v, 2) for v in values] for name, values in seconds.items()},
        {
            name: {"median": round(float(np.median(v)), 2), "min": round(v[0], 2), "max": round(v[-1], 2)}
            for name, v in ratios.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole-rounds", type=int, default=3)
    arguments = parser.parse_args()
    started = time.monotonic()
    images, validation = load_images(f"cifar10/train[:{ROWS}]"), load_images("cifar10/train[45000:45064]")
    model = load_model("cifar_resnet20", weights="resnet20_cifar10")
    halves = split(model, "layer2", torch.rand(2, 3, 32, 32))
    defenses: dict[str, Defense] = {
        "none": NoDefense(),
        "nopeek": NoPeek(),
        "siftfunnel": SiftFunnel(channels=12),
        "patrol": PATROL(target_share=0.5),
        "hybrid": Hybrid(embedding="siamese"),
        "hybrid, advanced": Hybrid(),
        "privynet": PrivyNet(n_channels=8, secret_seed=0),
        "noise": AddedNoise(),
        "dropout": FeatureDropout(),
        "bottleneck": Bottleneck(),
        "adversarial": AdversarialTraining(),
    }
    epochs = {name: epoch_of(defense, halves, images, validation) for name, defense in defenses.items()}
    for run in epochs.values():
        run()
    seconds, ratios = ratios_of(epochs, arguments.rounds)
    wholes = {name: whole_of(defense, halves, images, validation) for name, defense in defenses.items()}
    whole_seconds, whole_ratios = ratios_of(wholes, arguments.whole_rounds)
    figures = {
        "seconds_per_epoch": seconds,
        "ratio_to_plain": ratios,
        "seconds_of_all": whole_seconds,
        "ratio_of_all_to_plain": whole_ratios,
        "limits": LIMITS,
        "is_within_limits": {name: ratios[name]["median"] <= limit for name, limit in LIMITS.items()},
        "distance_correlation_ms": correlation_times(),
    }
    print(figures)
    print(record("harden_speed", figures, seed=0, seconds=time.monotonic() - started))


def correlation_times() -> dict[str, float]:
    """Median milliseconds for batch 128 of 3×64×64 against 12×16×16, and of its two matrix products."""
    x, z = torch.rand(128, 3, 64, 64), torch.rand(128, 12, 16, 16)
    flat = x.flatten(1), z.flatten(1)

    def products() -> None:
        for rows in flat:
            rows @ rows.T

    def median(work: Callable[[], object]) -> float:
        return float(np.median([timed(work) for _ in range(60)][10:])) * 1e3

    whole, parts = median(lambda: distance_correlation(x, z)), median(products)
    return {"whole": round(whole, 3), "products": round(parts, 3), "more": round(whole - parts, 3), "limit": 2.0}


if __name__ == "__main__":
    main()
