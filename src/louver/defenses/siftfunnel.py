"""SiftFunnel: few channels, sifted by attention, trained to correlate little with the image and with one another."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor, nn

from louver.cut import Split
from louver.defenses.base import Batch, Defense, Pressure
from louver.defenses.funnel import Funnel, Widening, fitted, sampled_features, start_at_best
from louver.defenses.penalties import channel_correlation, image_correlation, mean_magnitude
from louver.errors import ConfigError, DataError
from louver.models import Normalized
from louver.stochastic import drawing_from
from louver.types import Images

__all__ = ["SiftFunnel", "SiftShape", "sift_cnn", "sift_resnet18", "sift_vgg16"]


@dataclass(frozen=True, kw_only=True)
class SiftFunnel(Defense):
    """A funnel to `channels` channels at the end of the edge, a widening at the start of the cloud, and a loss of four.

    Per batch: α·KL(q‖p) + β·dCor(x, z) + sparsity·mean|z| + γ·P(z). q puts 1 - `smoothing` on the true class and
    spreads the rest over the others; dCor is the squared distance correlation of images and features; P(z) the mean
    squared correlation of two channels. KL differs from the task's smoothed cross-entropy by a constant, so the task's
    own loss is used, whatever it is; a task that is no classification makes of `smoothing` what it will.

    Any cut of any convolutional network will do. Funnel and widening start close to the best reconstruction of the
    undefended features from so few channels, so that a trained network goes on from near where it was. `pool` divides
    the sides of what is sent.

    Raises:
        ConfigError: a knob outside its range; (from `operate`) a cut with no channel dimension for a funnel, more
            channels than the cut has, or pooling of more positions than there are.
        DataError: (from training) a batch too small for a correlation.

    Source: SiftFunnel (arXiv 2501.00824), loss, default weights and order of layers as in its code. We differ: the
    diagonal is left out of P(z); all attention acts; the start at principal axes is ours, and so are the optimizer
    and its rate, which are those of the training. One of its checkpoints was trained with other weights (channels
    aside: smoothing 0.35, α 4.5, β 0.4, γ 0.1).
    """

    channels: int = 8
    alpha: float = 5.0
    beta: float = 2.0
    gamma: float = 2.0
    smoothing: float = 0.25
    sparsity: float = 0.03
    pool: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "pool"):
            if getattr(self, name) < 1:
                raise ConfigError(f"SiftFunnel: expected {name} of 1 or more, got {getattr(self, name)}")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"SiftFunnel: expected alpha above 0, got {self.alpha}; it weighs the task")
        for name in ("beta", "gamma", "sparsity"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"SiftFunnel: expected {name} of 0 or more, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 0.5:
            raise ConfigError(f"SiftFunnel: expected smoothing from 0 to below 0.5, got {self.smoothing}")

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """`split` with funnel and widening, started from the features of up to 1024 of `images`."""
        self._checked(split)
        halves = copy.deepcopy(split)
        features = sampled_features(halves.edge, images, split.cut.feature_shape, seed=seed)
        is_signed = float(features.min()) < 0
        with drawing_from(seed):
            funnel, widening = self._parts(split, is_signed=is_signed)
        start_at_best(funnel.to(features.device), widening.to(features.device), features)
        return fitted(halves, funnel, widening, images)

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """The four terms; the same after `finish` as before."""
        return _Sift(self, _usual_smoothing(self.smoothing, split))

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """Funnel and widening, not yet started."""
        halves = copy.deepcopy(split)
        funnel, widening = self._parts(split, is_signed="cloud.0.signed" in state)
        _, height, width = self._checked(split)
        sent = (self.channels, -(-height // self.pool), -(-width // self.pool))
        edge, cloud = nn.Sequential(halves.edge, funnel).eval(), nn.Sequential(widening, halves.cloud).eval()
        return Split(edge, cloud, replace(split.cut, feature_shape=sent, aliases=()))

    def _parts(self, split: Split, *, is_signed: bool) -> tuple[Funnel, Widening]:
        channels, height, width = self._checked(split)
        funnel = Funnel(channels, self.channels, pool=self.pool)
        return funnel, Widening(self.channels, channels, (height, width), is_signed=is_signed)

    def _checked(self, split: Split) -> tuple[int, int, int]:
        shape = split.cut.feature_shape
        if len(shape) != 3:
            raise ConfigError(
                f"cut {split.cut.name!r}: a cut with no channel dimension for a funnel: expected features of shape "
                f"(c, h, w), got {shape}; cut after a convolution or its activation"
            )
        channels, height, width = shape
        if self.channels > channels:
            raise ConfigError(
                f"SiftFunnel: expected channels of at most {channels}, which is what cut {split.cut.name!r} has, "
                f"got {self.channels}"
            )
        if self.pool > min(height, width):
            raise ConfigError(f"SiftFunnel: expected pool of at most {min(height, width)}, got {self.pool}")
        return channels, height, width


class _Sift(Pressure):
    def __init__(self, knobs: SiftFunnel, label_smoothing: float) -> None:
        super().__init__()
        self.knobs = knobs
        self.task_weight = knobs.alpha
        self.label_smoothing = label_smoothing

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """Weighted distance correlation, channel correlation and magnitude."""
        knobs, z = self.knobs, batch.features
        if len(z) < 2:
            raise DataError(f"SiftFunnel: a batch of {len(z)} has no correlation; raise batch_size")
        found: dict[str, Tensor] = {}
        if knobs.beta:
            found["distance correlation"] = knobs.beta * image_correlation(batch.images, z)
        if knobs.sparsity:
            found["sparsity"] = knobs.sparsity * mean_magnitude(z)
        if knobs.gamma:
            found["channel correlation"] = knobs.gamma * channel_correlation(z)
        return found


@torch.no_grad()
def _usual_smoothing(smoothing: float, split: Split) -> float:
    """What the usual smoothing must be to leave 1 - s on the true class, to which it gives a share of s as well."""
    cloud = copy.deepcopy(split.cloud).eval()
    device = next((parameter.device for parameter in cloud.parameters()), torch.device("cpu"))
    outputs = cloud(torch.zeros(2, *split.cut.feature_shape, device=device))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return smoothing
    classes = outputs.shape[1]
    return smoothing * classes / (classes - 1)


@dataclass(frozen=True, kw_only=True)
class SiftShape:
    """A network for 64×64 images in [0,1], where to cut it, and the knobs that make `SiftFunnel` send `sent`."""

    model: nn.Module
    cut: str
    channels: int
    pool: int
    sent: tuple[int, int, int]


def sift_cnn(n_classes: int, *, seed: int = 0) -> SiftShape:
    """A plain CNN of four stages that sends 12×16×16.

    Source: SiftFunnel (arXiv 2501.00824), size sent; ours: the network, whose layers we do not know.
    """
    with drawing_from(seed):
        widths = (3, 32, 64, 128, 256)
        stages = [_stage(a, b) for a, b in itertools.pairwise(widths)]
        network = nn.Sequential(
            OrderedDict(
                [(f"stage{i + 1}", stage) for i, stage in enumerate(stages)]
                + [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(256, n_classes))]
            )
        )
    return SiftShape(model=_ready(network), cut="stage2", channels=12, pool=1, sent=(12, 16, 16))


def sift_resnet18(n_classes: int, *, seed: int = 0) -> SiftShape:
    """The torchvision ResNet-18 without its first max-pooling, cut after layer1, that sends 6×32×32.

    Source: SiftFunnel (arXiv 2501.00824), size sent; we differ: the funnel stands between layer1 and layer2 and no
    stage is left out, where its code discards one.
    """
    with drawing_from(seed):
        network = torchvision.models.resnet18(num_classes=n_classes)
        network.maxpool = nn.Identity()
    return SiftShape(model=_ready(network), cut="layer1", channels=6, pool=1, sent=(6, 32, 32))


def sift_vgg16(n_classes: int, *, seed: int = 0) -> SiftShape:
    """The torchvision VGG-16 with batch normalisation, cut after its second max-pooling, that sends 4×16×16.

    Source: SiftFunnel (arXiv 2501.00824), size sent; ours: the place of the cut, and one linear layer instead of the
    classifier's three, which at 64×64 hold nine tenths of all weights.
    """
    with drawing_from(seed):
        network = torchvision.models.vgg16_bn(num_classes=n_classes)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(nn.Linear(512, n_classes))
    return SiftShape(model=_ready(network), cut="features.13", channels=4, pool=1, sent=(4, 16, 16))


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _ready(network: nn.Module) -> nn.Module:
    return Normalized(network, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).eval()
