"""An audit made up for the report: nothing was attacked, the numbers only have the right shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from louver.types import Audit, Check, Cost, Cut, HalfCost, Latency, Panel, Row, Threat, Verdict

# name, unit, leaks_when, value of a perfect attack, value of the floor
MEASURES = (
    ("mse", "", "low", 0.0004, 0.0612),
    ("psnr", "dB", "high", 33.9, 12.13),
    ("ssim", "", "high", 0.982, 0.1234),
    ("squeezenet_distance", "", "low", 0.031, 0.613),
    ("recognized", "share", "high", 0.964, 0.1),
    ("reidentified", "share", "high", 0.998, 0.001),
    ("ms_ssim", "", "high", 0.991, 0.21),
    ("house_rule", "ms", "low", 3.0e-6, 4.0),
)


FULL = Threat()


@dataclass(frozen=True)
class MakeAudit:
    cuts: Sequence[str] = ("conv1", "layer1", "layer2", "layer3")
    attacks: Sequence[str] = ("Decoder", "Likelihood", "Shadow")
    n_measures: int = 6
    verdict: Verdict | None = None
    name: str = "CIFAR-10, ResNet-20, no defense"
    threat: Threat = FULL
    has_latency: bool = True
    config: Mapping[str, object] | None = None


def _row(make: MakeAudit, place: int, number: int, measure: tuple[str, str, str, float, float]) -> Row:
    name, unit, leaks_when, best, floor = measure
    depth = place / max(1, len(make.cuts) - 1)
    gain = max(0.0, 1 - depth) ** (1 + 0.8 * number) * (1 - 0.12 * number)
    mean = floor + (best - floor) * gain
    width = abs(best - floor) * 0.02 * (1 + number)
    worst = mean + (best - mean) * 0.4

    def bounded(value: float) -> float:
        top = 1e9 if unit in {"dB", "ms"} else 1.0
        return min(max(value, 0.0), top)

    return Row(
        cut=make.cuts[place],
        attack=make.attacks[number],
        measure=name,
        unit=unit,
        leaks_when="high" if leaks_when == "high" else "low",
        n_images=1000 if number == 0 else 256,
        mean=mean,
        low=bounded(mean - width),
        high=bounded(mean + width),
        worst=worst,
        worst_low=bounded(worst - 2 * width),
        worst_high=bounded(worst + 2 * width),
        floor=floor,
        floor_low=floor * 0.97,
        floor_high=floor * 1.03,
        floor_worst=floor + (best - floor) * 0.1,
        beats_floor=gain > 0.02,
        seconds=[151.3, 407.9, 88.0][number % 3],
    )


def _half(share: float, *, has_latency: bool) -> HalfCost:
    latency = Latency(median_ms=0.4 + 3 * share, p10_ms=0.38 + 3 * share, p90_ms=0.6 + 3.4 * share, runs=50)
    return HalfCost(
        macs=int(40_550_000 * share),
        parameters=int(272_474 * share**2),
        weight_bytes=int(4 * 272_474 * share**2),
        peak_activation_bytes=int(131_072 * (1 - 0.6 * share)),
        latency=latency if has_latency else None,
    )


def build(make: MakeAudit) -> Audit:
    rows = [
        _row(make, place, number, measure)
        for place in range(len(make.cuts))
        for number in range(len(make.attacks))
        for measure in MEASURES[: make.n_measures]
    ]
    n = len(make.cuts)
    cuts = tuple(
        Cut(
            name=name,
            feature_shape=(16 * 2 ** min(3, 4 * i // n), 32 >> min(3, 4 * i // n), 32 >> min(3, 4 * i // n)),
            dtype="float32",
            cost=Cost(
                edge=_half((i + 1) / (n + 1), has_latency=make.has_latency),
                cloud=_half(1 - (i + 1) / (n + 1), has_latency=make.has_latency),
                feature_bytes=65_536 >> min(3, 4 * i // n),
            ),
            aliases=(f"{name}.2.relu",) if i == 1 else (),
        )
        for i, name in enumerate(make.cuts)
    )
    verdict = make.verdict or Verdict(
        passed=False,
        headline="SSIM of Decoder at conv1 is 0.98, above the threshold of 0.3; layer3 holds.",
        checks=(
            Check(rule="ssim<=0.3", status="broken", reason="Decoder at conv1 reaches 0.982 (0.965 to 0.999)."),
            Check(rule="worst ssim<=0.5 at layer3", status="not shown", reason="0.47, but the interval reaches 0.53."),
            Check(rule="psnr<=20 at layer3", status="holds", reason="No attack does better than 12.1 dB."),
        ),
        warnings=("Likelihood was scored on 256 pictures, Decoder on 1,000: their floors differ a little.",),
    )
    return Audit(
        name=make.name,
        threat=make.threat,
        cuts=cuts,
        findings=(),
        rows=tuple(rows),
        verdict=verdict,
        utility={"accuracy": 0.9263, "images": 10_000.0},
        config=make.config
        if make.config is not None
        else {
            "model": {"name": "cifar10_resnet20", "weights": "published"},
            "data": {"name": "cifar10", "auxiliary": 20000},
            "threat": {"grants": frozenset({"edge", "auxiliary", "query"})},
            "attack": [{"name": "Decoder", "width": 128, "restarts": 3}, {"name": "Likelihood", "steps": 2000}],
            "fail_above": {"ssim": 0.3},
        },
        environment={"command": "louver audit examples/cifar10-resnet20.toml", "louver": "0.1.0", "threads": "2"},
        seconds=1391.0,
    )


def pictures(k: int = 6, size: int = 32, channels: int = 3, seed: int = 7) -> np.ndarray:
    """Colored disks and bars on a sky: enough structure that blur is visible."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    made = []
    for _ in range(k):
        sky, disk, bar = rng.uniform(40, 255, (3, 3))
        picture = sky * (1 - 0.5 * y[..., None])
        center = rng.uniform(0.3, 0.7, 2)
        inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < rng.uniform(0.03, 0.09)
        picture = np.where(inside[..., None], disk, picture)
        picture = np.where((np.abs(x - rng.uniform(0.1, 0.9)) < 0.07)[..., None], bar, picture)
        made.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(made)[..., :channels]


def blurred(strip: np.ndarray, times: int) -> np.ndarray:
    held = strip.astype(np.float64)
    for _ in range(times):
        held = (held + np.roll(held, 1, 1) + np.roll(held, -1, 1) + np.roll(held, 1, 2) + np.roll(held, -1, 2)) / 5
    return held.astype(np.uint8)


def panels_for(audit: Audit, *, k: int = 6, size: int = 32, channels: int = 3) -> list[Panel]:
    attacks = list(dict.fromkeys(row.attack for row in audit.rows))
    panels = []
    for depth, cut in enumerate(audit.cuts):
        for seed, title in enumerate(("Typical pictures", "Pictures that leak most")):
            truth = pictures(k, size, channels, seed=7 + seed)
            panels.append(
                Panel(
                    cut=cut.name,
                    title=title,
                    truth=truth,
                    attacks={a: blurred(truth, 3 ** min(4, depth + i)) for i, a in enumerate(attacks)},
                    captions=tuple(f"test image {17 + 31 * i}, SSIM {0.97 - 0.2 * depth:.2f}" for i in range(k)),
                )
            )
    return panels


@pytest.fixture
def make_audit() -> Callable[..., Audit]:
    return lambda **knobs: build(MakeAudit(**knobs))


@pytest.fixture
def make_panels() -> Callable[..., list[Panel]]:
    return panels_for
