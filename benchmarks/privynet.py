"""PrivyNet as it is meant: a network characterized once on public images, a choice within limits, and what came true.

python benchmarks/privynet.py [--max-psnr 16] [--max-macs 30000000]

The grid of local layers m and channels D is measured on images that neither the owner nor the attacker of the other
tables has. The most accurate choice within the limits is then trained and attacked as in `louver bench cifar10`, beside
the same cut as it came; and of both it is asked how well the task is learned from 5, 20 and 100 labelled features of
each class, without the cloud half.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from common import record
from defenses import compact
from louver.cut import split
from louver.data import load_images
from louver.defenses import Defense, NoDefense, PrivyNet
from louver.defenses.channels import characterize, select
from louver.hardening import Origin
from louver.models import load_model
from louver.study import study
from louver.tables import BENCHES

PUBLIC = "cifar10/test[2500:5500]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-psnr", type=float, default=16.0)
    parser.add_argument("--max-macs", type=int, default=30_000_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    public = load_images(PUBLIC)
    model = load_model("cifar_resnet20", weights="resnet20_cifar10")
    example = torch.from_numpy(public.floats(slice(0, 2)))
    found = characterize(
        model,
        example,
        public,
        torch.from_numpy(public.column("label")),
        cuts=["layer1", "layer2", "layer3"],
        widths=[4, 8, 16, 32],
    )
    took = time.monotonic() - started
    best = select(found, max_psnr=arguments.max_psnr, max_macs=arguments.max_macs)
    for choice in found.choices:
        print(dataclasses.asdict(choice))
    print("chosen:", best.cut, best.n_channels, flush=True)
    bench = BENCHES["cifar10"]("laptop", 0)
    judging = dataclasses.replace(bench.judging, completion_counts=(5, 20, 100))
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        characterization = found.save(Path(folder) / "resnet20.json")
        defenses: dict[str, Defense] = {
            "undefended": NoDefense(),
            "chosen": PrivyNet(n_channels=best.n_channels, characterization=characterization, secret_seed=0),
        }
        for name, defense in defenses.items():
            origin = Origin(
                model=bench.model, n_classes=10, image_shape=bench.roles.test.image_shape, cut=best.cut, defense=defense
            )
            cells[name] = study(
                split(model, best.cut, example),
                origin,
                bench.roles,
                bench.task,
                judging,
                config=bench.training if name == "chosen" else None,
                folder=Path(folder) / name,
                name=name,
                label=bench.label,
                progress=lambda what, fraction: print(f"{fraction:6.1%} {what}", flush=True),
            )
    figures = {
        "public images": PUBLIC,
        "limits": {"psnr": arguments.max_psnr, "macs": arguments.max_macs},
        "seconds to characterize": round(took, 1),
        "choices": [dataclasses.asdict(choice) for choice in found.choices],
        "chosen": dataclasses.asdict(best),
        "cells": [compact(facts) for facts in cells.values()],
    }
    print(record("privynet", figures, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
