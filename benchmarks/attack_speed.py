"""How fast our attacks are, against the pattern of published code, side by side in one run.

The pattern, re-created here: the search takes one image at a time, through weights that take gradients, towards a
target that is not detached; the decoder recomputes the features of every batch in every epoch, in float32. Both sides
do the same arithmetic on the same network (ResNet-20 after layer1) with the same step sizes, and must end at the same
PSNR. Rounds alternate; ratios are of the same round.

    python benchmarks/attack_speed.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import record
from louver.attacks import Auxiliary, Decoder, Likelihood, View
from louver.attacks.decoder import _build, _loss, _Network, _Run, _starts
from louver.attacks.likelihood import total_variation
from louver.attacks.linear import feature_statistics
from louver.cut import Split, split
from louver.data import load_images
from louver.devices import has_fast_bfloat16
from louver.features import ImageRows, compute_features
from louver.measures import psnr
from louver.models import load_model

STEPS = 120
N_PATTERN, N_OURS = 3, 64
ROWS = 512


def known(halves: Split, start: int, count: int) -> Auxiliary:
    rows = ImageRows(load_images(f"cifar10/test[{start}:{start + count}]"))
    features = compute_features(
        halves.edge, rows, halves.cut.feature_shape, device=torch.device("cpu"), memory_bytes=2**31
    )
    return Auxiliary(images=rows, labels=None, features=features)


def pattern_search(edge: nn.Module, scale: Tensor, first: Tensor, truth: Tensor, attack: Likelihood) -> Tensor:
    """One image after the other; gradients for every weight; the target's graph kept and walked in every step."""
    edge = copy.deepcopy(edge).requires_grad_(True)
    guesses = []
    for image in truth:
        target = edge(image[None]) * scale
        x = first[None].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=attack.learning_rate, betas=(0.9, 0.99), eps=1e-12)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = attack.learning_rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            optimizer.zero_grad()
            loss = F.mse_loss(edge(x) * scale, target) + attack.tv[0] * total_variation(x).sum()
            loss.backward(retain_graph=True)
            optimizer.step()
            x.data.clamp_(0, 1)
        guesses.append(x.detach()[0])
    return torch.stack(guesses)


def pattern_decoder_steps(network: nn.Module, edge: nn.Module, rows: ImageRows, batch: int) -> float:
    """A pass of training that runs the edge, gradients and all, on every batch."""
    edge = copy.deepcopy(edge).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    order = np.random.default_rng(0).permutation(len(rows))
    steps = len(rows) // batch
    for i in range(steps):
        truth = rows.rows(np.sort(order[i * batch : (i + 1) * batch]))
        loss = _loss("mixed", network(edge(truth)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * batch


def timed(work: Callable[[], float]) -> float:
    """Units of work a second."""
    started = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    started = time.monotonic()
    model = load_model("cifar_resnet20", weights="resnet20_cifar10")
    halves = split(model, "layer1", torch.rand(2, 3, 32, 32))
    train_rows = ImageRows(load_images(f"cifar10/test[:{ROWS}]"))
    train, validation, test = known(halves, 0, ROWS), known(halves, 2000, 64), known(halves, 3000, N_OURS)
    assert train.features is not None
    assert test.features is not None
    view = View(
        image_shape=(3, 32, 32),
        feature_shape=halves.cut.feature_shape,
        cloud=halves.cloud,
        edge=halves.edge,
        train=train,
        validation=validation,
    )
    attack = Likelihood(steps=STEPS, starts=("mean",), tv=(0.01,), l2=(0.0,), tolerance=0.0)
    search = attack.prepare(view, seed=0)
    truth, features = test.images.rows(np.arange(N_OURS)), test.features.rows(np.arange(N_OURS))
    _, scale = feature_statistics(train)
    mean_image = search.state()["mean_image"]
    base, mean, feature_scale = _starts(train, validation, view.image_shape, "local")[0]
    attack_decoder = Decoder(restarts=1)

    def network() -> _Network:
        return _build(attack_decoder, view, base, mean, feature_scale, seed=0)

    def ours_pass(*, is_half: bool, is_channels_last: bool, is_compiled: bool = False) -> Callable[[], float]:
        run = _Run(
            attack_decoder,
            network(),
            train,
            validation,
            device=torch.device("cpu"),
            seed=0,
        )
        run._is_half = is_half
        if not is_channels_last:
            run._network.to(memory_format=torch.contiguous_format)
        if is_compiled:
            run._network.compile()
        run.epoch(0, most_steps=1)

        def one_pass() -> float:
            run.epoch(0)
            return len(train.images)

        return one_pass

    plain_network = network().to(memory_format=torch.contiguous_format)
    is_half = has_fast_bfloat16(torch.device("cpu"))
    ours_training = ours_pass(is_half=is_half, is_channels_last=True)
    outcome: dict[str, Tensor] = {}

    def run_pattern() -> float:
        outcome["pattern"] = pattern_search(halves.edge, scale, mean_image, truth[:N_PATTERN], attack)
        return N_PATTERN * STEPS

    def run_ours() -> float:
        outcome["ours"] = search(features)
        return N_OURS * STEPS

    rates: dict[str, list[float]] = {name: [] for name in ("search_pattern", "search", "decoder_pattern", "decoder")}
    for number in range(arguments.rounds):
        rates["search_pattern"].append(timed(run_pattern))
        rates["search"].append(timed(run_ours))
        rates["decoder_pattern"].append(
            timed(lambda: pattern_decoder_steps(plain_network, halves.edge, train_rows, attack_decoder.batch_size))
        )
        rates["decoder"].append(timed(ours_training))
        print(f"round {number + 1}:", {name: round(values[-1], 1) for name, values in rates.items()}, flush=True)
    final = {name: float(psnr(truth[:N_PATTERN], guess[:N_PATTERN]).mean()) for name, guess in outcome.items()}
    variants = {
        "float32": ours_pass(is_half=False, is_channels_last=False),
        "float32, channels last": ours_pass(is_half=False, is_channels_last=True),
        "bfloat16": ours_pass(is_half=True, is_channels_last=False),
        "bfloat16, channels last": ours_pass(is_half=True, is_channels_last=True),
        "bfloat16, channels last, compiled": ours_pass(is_half=True, is_channels_last=True, is_compiled=True),
    }
    measured = {name: [round(timed(work), 1) for _ in range(3)] for name, work in variants.items()}
    ratios = {
        kind: sorted(a / b for a, b in zip(rates[kind], rates[f"{kind}_pattern"], strict=True))
        for kind in ("search", "decoder")
    }
    figures = {
        "per_second": {name: [round(v, 1) for v in values] for name, values in rates.items()},
        "ratio": {
            kind: {
                "median": round(float(np.median(values)), 2),
                "min": round(values[0], 2),
                "max": round(values[-1], 2),
            }
            for kind, values in ratios.items()
        },
        "final_psnr_db": {name: round(value, 2) for name, value in final.items()},
        "is_same_psnr": abs(final["ours"] - final["pattern"]) <= 0.3,
        "decoder_variants_images_per_second": measured,
    }
    print(figures)
    print(record("attack_speed", figures, seed=0, seconds=time.monotonic() - started))


if __name__ == "__main__":
    main()
