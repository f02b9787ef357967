"""Are our attacks as strong as published ones? The network, cuts and figures of a published study, with our attacks.

Reference: He, Zhang, Lee, "Model inversion attacks against collaborative inference" (ACSAC 2019): a CIFAR-10 network of
six convolutions, cut after conv11, ReLU22 and ReLU32; white-box search (rMLE) and a decoder trained on images of the
same distribution. Their figures are over 10 images; ours are over 1,000 test images that no attack has seen.

    python benchmarks/strength.py            about an hour on two cores; stops and resumes
    python benchmarks/strength.py --quick    minutes; shows that it runs, and proves nothing
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from common import record
from louver.attacks import Attack, Decoder, Likelihood
from louver.audit import Settings, audit
from louver.cut import split
from louver.data import drop_overlap, load_images
from louver.tasks import Classification
from louver.training import Training, fit

PUBLISHED = {
    ("likelihood", "conv11"): (37.6, 0.996),
    ("likelihood", "relu22"): (19.5, 0.694),
    ("likelihood", "relu32"): (13.4, 0.163),
    ("decoder", "conv11"): (49.0, 0.999),
    ("decoder", "relu22"): (19.4, 0.680),
    ("decoder", "relu32"): (14.0, 0.220),
}
"""(PSNR in dB, SSIM) by attack and cut."""


class SixConvolutions(nn.Module):
    """Pairs of 3 × 3 convolutions with 64, 128 and 128 channels, pooled after each pair, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for stage, width in enumerate((64, 128, 128), 1):
            for number in (1, 2):
                self.add_module(f"conv{stage}{number}", nn.Conv2d(channels, width, 3, padding=1))
                self.add_module(f"relu{stage}{number}", nn.ReLU())
                channels = width
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(128 * 4 * 4, 512)
        self.relu_fc1 = nn.ReLU()
        self.fc2 = nn.Linear(512, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias if layer.bias is not None else torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.473) / 0.251
        for layer in self.children():
            x = layer(x)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/strength"))
    arguments = parser.parse_args()
    started = time.monotonic()
    n_train, n_auxiliary, n_test = (1000, 600, 32) if arguments.quick else (30000, 15000, 1000)
    train = load_images("cifar10/train")
    known = load_images("cifar10/test")
    roles, dropped = drop_overlap(
        train=train.take(slice(0, n_train)),
        validation=train.take(slice(45000, 45000 + n_train // 15)),
        auxiliary=train.take(slice(30000, 30000 + n_auxiliary)),
        test=known.take(slice(0, max(n_test, 2000))),
    )
    task = Classification("label", 10)
    torch.manual_seed(arguments.seed)
    network = SixConvolutions()
    folder = arguments.folder / ("quick" if arguments.quick else "full")
    epochs = 1 if arguments.quick else 6
    attacks: dict[str, Attack] = {
        "decoder": Decoder(epochs=1, restarts=1) if arguments.quick else Decoder(epochs=6),
        "likelihood": Likelihood(steps=20, sweep_steps=20)
        if arguments.quick
        else Likelihood(steps=200, sweep_steps=100),
    }
    with Progress(console=Console(stderr=True)) as bar:
        line = bar.add_task("training", total=1.0)

        def tell(what: str, fraction: float) -> None:
            bar.update(line, description=what, completed=fraction)

        training = Training(epochs=epochs, batch_size=128, lr=1e-3, flip=True, shift=3)
        victim = fit(
            network,
            task,
            roles.train,
            roles.validation,
            config=training,
            seed=arguments.seed,
            checkpoint=folder / "training.safetensors",
            progress=tell,
        )
        example = torch.from_numpy(roles.test.floats(slice(0, 2)))
        found = audit(
            [split(victim, at, example) for at in ("conv11", "relu22", "relu32")],
            roles,
            attacks,
            task=task,
            label="label",
            settings=Settings(measures=("psnr", "ssim"), test_images=n_test, mirror_auxiliary=False),
            seed=arguments.seed,
            name="strength",
            folder=folder,
            progress=tell,
        )
    rows = {(r.attack, r.cut, r.measure): r for r in found.rows}
    table = []
    for (attack, cut), published in PUBLISHED.items():
        ours = [rows[attack, cut, measure] for measure in ("psnr", "ssim")]
        table.append(
            {
                "attack": attack,
                "cut": cut,
                "published_psnr": published[0],
                "published_ssim": published[1],
                "psnr": round(ours[0].mean, 3),
                "psnr_interval": [round(ours[0].low, 3), round(ours[0].high, 3)],
                "ssim": round(ours[1].mean, 4),
                "ssim_interval": [round(ours[1].low, 4), round(ours[1].high, 4)],
                "floor_psnr": round(ours[0].floor, 3),
                "floor_ssim": round(ours[1].floor, 4),
                "n_images": ours[0].n_images,
                "seconds": round(ours[0].seconds, 1),
                "is_at_least_published": bool(ours[0].mean >= published[0] and ours[1].mean >= published[1]),
            }
        )
        print(table[-1])
    figures = {
        "victim_accuracy": found.utility["accuracy"],
        "training_images": len(roles.train),
        "auxiliary_images": len(roles.auxiliary),
        "dropped_as_overlap": dropped,
        "attacks": {name: str(attack) for name, attack in attacks.items()},
        "table": table,
        "is_all_at_least_published": all(line["is_at_least_published"] for line in table),
    }
    print(f"accuracy of the victim: {found.utility['accuracy']:.4f}")
    if not arguments.quick:
        print(record("strength", figures, seed=arguments.seed, seconds=time.monotonic() - started))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
