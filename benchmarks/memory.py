"""Peak memory of an audit whose features do not fit: 10,000 auxiliary images, 1 MiB of features each.

python benchmarks/memory.py         about 10 GiB of disk for a while; some minutes
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from common import record
from louver.attacks import Decoder, Likelihood
from louver.audit import Settings, audit
from louver.cut import split
from louver.data import assign_roles, streets

LIMIT_GIB = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 6)
    ).eval()
    test = streets(64, seed=1)
    nothing = test.take(slice(0, 0))
    auxiliary = streets(arguments.images, seed=2)
    halves = split(network, "1", torch.rand(2, 3, 64, 64))
    feature_mib = halves.cut.cost.feature_bytes / 2**20
    with tempfile.TemporaryDirectory() as folder:
        found = audit(
            [halves],
            assign_roles(train=nothing, validation=nothing, test=test, auxiliary=auxiliary),
            {"decoder": Decoder(epochs=1, restarts=1), "likelihood": Likelihood(steps=20, sweep_steps=10)},
            settings=Settings(measures=("psnr", "ssim"), test_images=64, mirror_auxiliary=False),
            folder=Path(folder),
            progress=lambda what, fraction: print(f"{fraction:6.1%} {what}", end="\r", flush=True),
        )
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {
        "auxiliary_images": arguments.images,
        "feature_mib_per_image": feature_mib,
        "features_gib": arguments.images * feature_mib / 1024,
        "peak_resident_gib": round(peak_gib, 2),
        "limit_gib": LIMIT_GIB,
        "is_within_limit": peak_gib < LIMIT_GIB,
        "psnr": {row.attack: round(row.mean, 2) for row in found.rows if row.measure == "psnr"},
    }
    print(figures)
    print(record("memory", figures, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
