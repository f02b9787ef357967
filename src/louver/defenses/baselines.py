"""The defenses that a new one must beat: none, noise, dropout, NoPeek, an adversary alone, a bottleneck alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from louver.cut import Split
from louver.defenses.adversary import LaterAdversary
from louver.defenses.base import Batch, Defense, Pressure
from louver.defenses.funnel import fitted, principal_axes, sampled_features
from louver.defenses.penalties import image_correlation
from louver.errors import ConfigError
from louver.stochastic import Noise, RandomMask
from louver.types import Images

__all__ = ["AddedNoise", "AdversarialTraining", "Bottleneck", "FeatureDropout", "NoDefense", "NoPeek"]


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Plain fine-tuning: what every other defense is compared to."""


@dataclass(frozen=True, kw_only=True)
class AddedNoise(Defense):
    """Noise on every element that is sent, drawn anew for each image, in training and in use.

    `std` is a multiple of the standard deviation of the features over all images, channels and positions together.
    It is measured on the training images at the start and followed while the edge learns, so that the edge cannot
    drown the noise by sending larger numbers.

    Raises:
        ConfigError: a knob outside its range.

    Source: the usual baseline; ours: the scale, and that it is followed.
    """

    std: float = 0.5
    kind: Literal["gaussian", "laplace"] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ConfigError(f"AddedNoise: expected std of 0 or more, got {self.std}")
        if self.kind not in ("gaussian", "laplace"):
            raise ConfigError(f"AddedNoise: unknown kind {self.kind!r}; legal: gaussian, laplace")

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """`split` with noise at the end of the edge."""
        halves = copy.deepcopy(split)
        features = sampled_features(halves.edge, images, split.cut.feature_shape, seed=seed)
        noise = Noise(self.std * float(features.std(correction=0)), self.kind).to(features.device)
        return fitted(halves, noise, None, images)

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """Keeps the noise at its share of the features."""
        return _FollowingNoise(self.std)

    def finish(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """`split` with the scale of its noise measured once more, on training images."""
        split = copy.deepcopy(split)
        assert isinstance(split.edge, nn.Sequential)
        features = sampled_features(split.edge[:-1].eval(), images, split.cut.feature_shape, seed=seed)
        noise = split.edge[-1]
        assert isinstance(noise, Noise)
        noise.std.fill_(self.std * float(features.std(correction=0)))
        return split

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """Noise of a scale yet to be loaded."""
        halves = copy.deepcopy(split)
        return Split(nn.Sequential(halves.edge, Noise(0.0, self.kind)).eval(), halves.cloud, halves.cut)


class _FollowingNoise(Pressure):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    @torch.no_grad()
    def before(self, split: Split, batch: Batch) -> None:
        """Moves the noise a tenth of the way to its share of this batch's features, from which it is subtracted."""
        noises = [layer for layer in split.edge.modules() if isinstance(layer, Noise)]
        noise = noises[-1].std
        clean = (batch.features.float().var(correction=0) - noise.square()).clamp_min(0).sqrt()
        noise.lerp_(self.share * clean.to(noise.dtype), 0.1)


@dataclass(frozen=True, kw_only=True)
class FeatureDropout(Defense):
    """A share `rate` of what is sent is zero, drawn anew for each image, in training and in use.

    Raises:
        ConfigError: a `rate` outside [0, 1).
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"FeatureDropout: expected a rate from 0 to below 1, got {self.rate}")

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """`split` with a random mask at the end of the edge."""
        return fitted(copy.deepcopy(split), RandomMask(self.rate), None, images)

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """The same without measuring."""
        halves = copy.deepcopy(split)
        return Split(nn.Sequential(halves.edge, RandomMask(self.rate)).eval(), halves.cloud, halves.cut)


@dataclass(frozen=True, kw_only=True)
class NoPeek(Defense):
    """Adds `weight` times the squared distance correlation of images and features to the task's loss.

    Raises:
        ConfigError: a negative `weight`.
        DataError: (from training) a batch too small for a correlation.

    Source: Vepakomma et al., "NoPeek: Information leakage reduction to share activations in distributed deep
    learning" (ICDMW 2020), cross-entropy plus weighted distance correlation; ours: the coefficient is squared.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"NoPeek: expected a weight of 0 or more, got {self.weight}")

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """The one term."""
        return _Peek(self.weight)


class _Peek(Pressure):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """Weighted distance correlation."""
        if not self.weight:
            return {}
        return {"distance correlation": self.weight * image_correlation(batch.images, batch.features)}


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """An inverter trains along; the edge pays `weight` for every unit by which it succeeds beyond `hinge`.

    Success is SSIM ("ssim") or the share of the pictures' variance that is explained ("relative"), 1 at best for both.
    `hinge` of None is none: success is paid for however small. `width` is the inverter's.

    Raises:
        ConfigError: a knob outside its range; (from the first step) SSIM for pictures below 11 pixels.
        DataError: (from training) a batch of one.

    Source: ResSFL (arXiv 2205.04007), section 3: SSIM adversary, hinge at 0.5, weight 0.3. We differ: the adversary
    alone, without its bottleneck of 8 channels and its first phase on a source task; the inverter is ours, and compares
    pictures of 48 pixels or more at half size.
    """

    weight: float = 0.3
    hinge: float | None = 0.5
    width: int = 32
    measure: Literal["ssim", "relative"] = "ssim"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"AdversarialTraining: expected a weight of 0 or more, got {self.weight}")
        if self.hinge is not None and not 0 <= self.hinge < 1:
            raise ConfigError(f"AdversarialTraining: expected a hinge from 0 to below 1, or none, got {self.hinge}")
        if self.width < 8:
            raise ConfigError(f"AdversarialTraining: expected a width of 8 or more, got {self.width}")
        if self.measure not in ("ssim", "relative"):
            raise ConfigError(f"AdversarialTraining: unknown measure {self.measure!r}; legal: ssim, relative")

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """The adversary, and what its success costs."""
        return _Contest(self, seed)


class _Contest(Pressure):
    def __init__(self, knobs: AdversarialTraining, seed: int) -> None:
        super().__init__()
        self.knobs = knobs
        self.adversary = LaterAdversary(width=knobs.width, measure=knobs.measure, seed=seed)

    def before(self, split: Split, batch: Batch) -> None:
        """One step of the adversary."""
        self.adversary.on(batch.images, batch.features).step(batch.images, batch.features, batch.autocast)

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """The weighted success."""
        if not self.knobs.weight:
            return {}
        adversary = self.adversary.on(batch.images, batch.features)
        success = 1 - adversary.error(batch.images, batch.features, batch.autocast)
        paid = success if self.knobs.hinge is None else torch.relu(success - self.knobs.hinge)
        return {"adversary": self.knobs.weight * paid}

    def held(self) -> dict[str, Tensor]:
        """The adversary."""
        return self.adversary.held()

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `held` gave."""
        self.adversary.hold(tensors)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Defense):
    """Features narrowed to `channels` at the end of the edge and widened again in the cloud, by one linear map each.

    Channels for features (c, h, w); the last axis for others. Both maps start at the principal axes of the features of
    training images, which is the best start that a linear bottleneck can have.

    Raises:
        ConfigError: `channels` below 1; (from `operate`) above what the cut has.
    """

    channels: int = 8

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"Bottleneck: expected channels of 1 or more, got {self.channels}")

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """`split` with the two maps."""
        down, up = self._maps(split)
        halves = copy.deepcopy(split)
        features = sampled_features(halves.edge, images, split.cut.feature_shape, seed=seed)
        rows = features.movedim(1, -1) if isinstance(down, nn.Conv2d) else features
        mean, axes = principal_axes(rows.flatten(0, -2), self.channels)
        with torch.no_grad():
            down.weight.copy_(axes.T.reshape(down.weight.shape))
            up.weight.copy_(axes.reshape(up.weight.shape))
            assert down.bias is not None
            assert up.bias is not None
            down.bias.copy_(-mean @ axes)
            up.bias.copy_(mean)
        return fitted(halves, down.to(features.device), up.to(features.device), images)

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """The two maps, as drawn."""
        down, up = self._maps(split)
        halves = copy.deepcopy(split)
        shape = split.cut.feature_shape
        sent = (self.channels, *shape[1:]) if len(shape) == 3 else (*shape[:-1], self.channels)
        edge, cloud = nn.Sequential(halves.edge, down).eval(), nn.Sequential(up, halves.cloud).eval()
        return Split(edge, cloud, replace(split.cut, feature_shape=sent, aliases=()))

    def _maps(self, split: Split) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
        shape = split.cut.feature_shape
        is_grid = len(shape) == 3
        wide = shape[0] if is_grid else shape[-1]
        if self.channels > wide:
            raise ConfigError(
                f"Bottleneck: expected channels of at most {wide}, which is what cut {split.cut.name!r} has, "
                f"got {self.channels}"
            )
        with torch.random.fork_rng(devices=[]):
            if is_grid:
                return nn.Conv2d(wide, self.channels, 1), nn.Conv2d(self.channels, wide, 1)
            return nn.Linear(wide, self.channels), nn.Linear(self.channels, wide)
