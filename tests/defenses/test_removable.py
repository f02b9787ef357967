"""Worlds in which a private factor can be removed: every defense takes it from the probes and leaves the task.

Red says what the task asks, another light what is private; neither tells of the other. Undefended features show both to
the probes, so that chance afterwards is the defense's doing. What a defense can remove differs, and so do the worlds:
noise drowns what is said in one place, a choice of channels drops what is said in channels of its own, and penalties on
the image put out what shows most of it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from louver import Split, Training, harden
from louver.cut import split as cut_at
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
from louver.probes import LinearProbe, NeighborProbe, ProbeResult, probe
from louver.stochastic import drawing_from
from louver.tasks import Classification
from louver.types import Images

SIDE = 12
CPU = torch.device("cpu")

World = Literal["spot", "faint", "loud"]


def world(kind: World, n: int, *, seed: int) -> Images:
    """Pictures (3, 12, 12): all of red is bright or dim, each picture a little differently.

    The private light is a single blue pixel ("spot"), a little of all of blue ("faint"), or all of blue and green, as
    bright as red ("loud").
    """
    rng = np.random.default_rng(seed)
    wanted, private = rng.integers(0, 2, n), rng.integers(0, 2, n)
    pixels = np.full((n, 3, SIDE, SIDE), 0.5) + 0.01 * rng.standard_normal((n, 3, SIDE, SIDE))
    pixels[:, 0] += (0.3 * (2 * wanted - 1) + 0.1 * rng.standard_normal(n))[:, None, None]
    sign = (2 * private - 1)[:, None, None]
    if kind == "spot":
        pixels[:, 2, 4:5, 4:5] += 0.2 * sign
    elif kind == "faint":
        pixels[:, 2] += 0.05 * sign
    else:
        pixels[:, 1] += 0.3 * sign
        pixels[:, 2] += 0.3 * sign
    labels = {"wanted": wanted.astype(np.int64), "private": private.astype(np.int64)}
    return Images(pixels=(np.clip(pixels, 0, 1) * 255).round().astype(np.uint8), labels=labels, name=f"{kind} lights")


def wide() -> nn.Module:
    """Eight channels at the cut "1": one color each, red in the first half."""
    first = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        nn.init.zeros_(first.weight)
        for channel in range(8):
            sign = 1.0 if channel % 2 else -1.0
            first.weight[channel, 0 if channel < 4 else 2] = sign
            first.bias[channel] = 0.5 - 0.5 * sign
    with drawing_from(0, CPU):
        rest = (nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 36, 2))
    return nn.Sequential(first, nn.ReLU(), *rest).eval()


def narrow() -> nn.Module:
    """One channel at the cut "2": red at half strength on the private light, told apart by a cloud that can."""
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1)
    with torch.no_grad():
        for layer in (first, second):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for channel in range(8):
            first.weight[channel, (0, 1, 2, 2)[channel % 4]] = 1.0
        second.weight[0] = torch.tensor([0.25, 0.25, 0.25, 0.0] * 2).view(8, 1, 1)
    with drawing_from(1, CPU):
        cloud = (nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 2))
    return nn.Sequential(first, nn.ReLU(), second, *cloud).eval()


def hardened(defense: Defense, network: nn.Module, at: str, kind: World) -> Split:
    training = Training(epochs=8, batch_size=50, lr=3e-3, warmup=0.1, precision="float32")
    halves = cut_at(network, at, torch.rand(2, 3, SIDE, SIDE))
    task = Classification("wanted", 2)
    training_images, validation = world(kind, 1000, seed=4), world(kind, 200, seed=6)
    return harden(halves, task, training_images, validation, defense, config=training, seed=0)


def probed(halves: Split, kind: World) -> list[ProbeResult]:
    roles = {
        "train": world(kind, 600, seed=1),
        "validation": world(kind, 120, seed=2),
        "test": world(kind, 300, seed=3),
    }
    with torch.no_grad(), drawing_from(5, CPU):
        features = {role: halves.edge(torch.from_numpy(images.floats())) for role, images in roles.items()}
    labels = {role: images.column("private") for role, images in roles.items()}
    return probe([LinearProbe(), NeighborProbe()], features, labels, seed=0)


def accuracy(halves: Split, kind: World) -> float:
    test = world(kind, 300, seed=3)
    with torch.no_grad(), drawing_from(7, CPU):
        answers = halves(torch.from_numpy(test.floats())).argmax(1).numpy()
    return float((answers == test.column("wanted")).mean())


@pytest.mark.parametrize(
    ("network", "at", "kind", "least"),
    [(wide, "1", "spot", 0.97), (wide, "1", "faint", 0.97), (narrow, "2", "loud", 0.6)],
)
def test_undefended_features_tell(network, at, kind, least) -> None:
    """Plain training alone dims the loud light, which is in the way of the task; it does not put it out."""
    halves = hardened(NoDefense(), network(), at, kind)
    assert accuracy(halves, kind) > 0.97
    assert max(found.low for found in probed(halves, kind) if found.beats_chance) > least - 0.05


CASES = {
    "noise": (AddedNoise(std=8.0), wide, "1", "spot"),
    "dropout": (FeatureDropout(rate=0.98), wide, "1", "spot"),
    "bottleneck": (Bottleneck(channels=1), wide, "1", "faint"),
    "siftfunnel": (SiftFunnel(channels=1, beta=0.5, gamma=0.5), wide, "1", "faint"),
    "privynet": (PrivyNet(n_channels=2, drop_leaky=0.0, secret_seed=0), wide, "1", "faint"),
    "hybrid": (Hybrid(components=1, noise_std=0.1, noise_scale="relative"), wide, "1", "faint"),
    "nopeek": (NoPeek(weight=4.0), narrow, "2", "loud"),
    "adversarial": (AdversarialTraining(weight=1.0, measure="relative", hinge=None), narrow, "2", "loud"),
    "patrol": (
        PATROL(target_share=0.6, beta=1.0, adversary_share=1.0, mending_share=0.5),
        narrow,
        "2",
        "loud",
    ),
}


@pytest.mark.parametrize(("defense", "network", "at", "kind"), CASES.values(), ids=CASES)
def test_the_private_light_goes_out_and_the_other_stays(defense, network, at, kind) -> None:
    halves = hardened(defense, network(), at, kind)
    found = probed(halves, kind)
    assert accuracy(halves, kind) > 0.9
    assert not any(one.beats_chance for one in found), [(one.probe, one.accuracy, one.luck) for one in found]
