"""Hybrid inference: an edge trained to gather what the task calls alike, reduced to a few noisy coordinates."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from louver.cut import Split, joined
from louver.defenses.base import Batch, Defense, FrozenEdge, Pressure
from louver.defenses.pca import Projection, Reconstruction, feature_chunks, fit_components
from louver.errors import ConfigError, DataError, nearest
from louver.stochastic import Noise
from louver.types import Images

__all__ = ["Hybrid", "contrastive_loss", "explained_variance"]

_EMBEDDINGS = ("simple", "reduced", "siamese", "noisy", "advanced")
_SIAMESE = ("siamese", "advanced")
_REDUCED = ("reduced", "noisy", "advanced")
_NOISY = ("noisy", "advanced")


@final
@dataclass(frozen=True, kw_only=True)
class Hybrid(Defense):
    """An edge that sends `components` coordinates of features that were gathered by class, with fresh noise on them.

    `embedding` says how much of that: "simple" is a plain split; "reduced" keeps the leading principal components of
    the features; "siamese" trains with the contrastive term; "noisy" is reduced, with noise of standard deviation
    `noise_std` on every coordinate; "advanced" is all three.

    siamese_weight: λ of `contrastive_loss`, whose margin is `margin`. primary: the column of targets (n, k) that says
    whether two images are alike; None: all columns must agree. noise_scale: "absolute" is the unit of the features, as
    published, and so means another amount at another cut; "relative" multiplies `noise_std` by the root mean square
    of the kept coordinates. mending_share: the share of the epochs in which the cloud learns to live with what is
    sent, the edge held still.

    Raises:
        ConfigError: a knob outside its range; (from `operate`) more components than features or images.
        DataError: (from the pressure's `terms`) a batch of one image, or (from `finish`) features that never change.

    Source: Osia et al., "A hybrid deep learning architecture for privacy-preserving mobile analytics"
    (arXiv 1703.02952), section 4, and "Privacy-preserving deep inference for rich user data on the cloud"
    (arXiv 1710.01727); we differ: pairs are formed inside the batch, the cloud is fine-tuned once the noise is on, and
    the noise may be relative.
    """

    embedding: Literal["simple", "reduced", "siamese", "noisy", "advanced"] = "advanced"
    components: int = 8
    siamese_weight: float = 0.01
    margin: float = 10.0
    primary: int | None = None
    noise_std: float = 1.0
    noise_scale: Literal["absolute", "relative"] = "absolute"
    mending_share: float = 0.2

    def __post_init__(self) -> None:
        for what, legal in (("embedding", _EMBEDDINGS), ("noise_scale", ("absolute", "relative"))):
            value = getattr(self, what)
            if value not in legal:
                raise ConfigError(f"Hybrid: no {what} {value!r}; {nearest(str(value), list(legal))}")
        rules = {
            "components": ("1 or more", self.components >= 1),
            "siamese_weight": ("0 or more", 0 <= self.siamese_weight < math.inf),
            "margin": ("above 0", 0 < self.margin < math.inf),
            "primary": ("0 or more, or none", self.primary is None or self.primary >= 0),
            "noise_std": ("0 or more", 0 <= self.noise_std < math.inf),
            "mending_share": ("a share from 0 to below 1", 0 <= self.mending_share < 1),
        }
        for what, (expected, holds) in rules.items():
            if not holds:
                raise ConfigError(f"Hybrid: expected {what} {expected}, got {getattr(self, what)}")

    @property
    def mending(self) -> float:
        """`mending_share` where `finish` changes what is sent, else 0."""
        return self.mending_share if self.embedding in _REDUCED else 0.0

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """The split as it is; that the components fit is checked here, before any training."""
        most = min(prod(split.cut.feature_shape), len(images))
        if self.embedding in _REDUCED and self.components > most:
            raise ConfigError(
                f"Hybrid at cut {split.cut.name!r}: expected at most {most} components (features of shape "
                f"{split.cut.feature_shape}, {len(images)} images), got {self.components}"
            )
        return split

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """The contrastive term before `finish`, a frozen edge after it."""
        if is_mending:
            return FrozenEdge()
        if self.embedding in _SIAMESE:
            return _Siamese(weight=self.siamese_weight, margin=self.margin, primary=self.primary)
        return Pressure()

    def finish(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """Fits the components to the features of `images`; the edge then sends coordinates, the cloud expands them."""
        if self.embedding not in _REDUCED:
            return split
        found = fit_components(lambda: feature_chunks(split.edge, images), self.components, seed=seed)
        device = next((tensor.device for tensor in split.state_dict().values()), torch.device("cpu"))
        project = Projection(found.mean, found.components)
        expand = Reconstruction(found.mean, found.components, found.explained, split.cut.feature_shape)
        noise: Noise | None = None
        if self.embedding in _NOISY:
            unit = float(found.variance.mean().sqrt()) if self.noise_scale == "relative" else 1.0
            noise = Noise(self.noise_std * unit)
        edge, cloud = _halves(split, project, expand, noise)
        example = torch.from_numpy(images.floats(slice(0, 2))).to(device)
        return joined(edge.to(device), cloud.to(device), example, name=split.cut.name)

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """The undefended split with projection, noise and expansion of the sizes that `state` has."""
        if self.embedding not in _REDUCED:
            return split
        components, mean = state["edge.project.components"], state["edge.project.mean"]
        project = Projection(mean, components)
        expand = Reconstruction(mean, components, state["cloud.expand.explained"], split.cut.feature_shape)
        edge, cloud = _halves(split, project, expand, Noise(0.0) if self.embedding in _NOISY else None)
        return Split(edge, cloud, replace(split.cut, feature_shape=(len(components),)))


def contrastive_loss(
    features: Float[Tensor, "n ..."], is_alike: Bool[Tensor, " half"], *, margin: float
) -> Float[Tensor, ""]:
    """1/(2N) Σ [s·d² + (1 - s)·max(0, margin - d)²] over the N pairs (i, i + n // 2); 0 or more, in features squared.

    d is the Euclidean distance of flattened features and s = 1 where `is_alike`. Of an odd batch the last image stays
    out of the pairs.

    Raises:
        DataError: fewer than 2 images, which make no pair.

    Source: Osia et al. (arXiv 1703.02952), section 4.2.

    Example:
        >>> contrastive_loss(torch.tensor([[0.0], [3.0]]), torch.tensor([True]), margin=10)
        tensor(4.5000)
        >>> contrastive_loss(torch.tensor([[0.0], [3.0]]), torch.tensor([False]), margin=10)
        tensor(24.5000)
    """
    half = len(features) // 2
    if half < 1:
        raise DataError(
            f"Siamese term: expected 2 images or more in a batch, got {len(features)}, which make no pair; "
            "raise batch_size, or use an embedding without it"
        )
    flat = features.flatten(1)
    distance = torch.linalg.vector_norm(flat[:half] - flat[half : 2 * half], dim=1)
    per_pair = torch.where(is_alike, distance, (margin - distance).clamp(min=0)).square()
    return per_pair.mean() / 2


def explained_variance(split: Split) -> Float[Tensor, " k"]:
    """The share of the features' variance that each coordinate carries, as found by `Hybrid.finish`.

    Raises:
        ConfigError: the split sends no principal components.
    """
    for module in split.cloud.modules():
        if isinstance(module, Reconstruction):
            return module.explained.clone()
    raise ConfigError(f"cut {split.cut.name!r}: the split sends no principal components; harden it with Hybrid first")


class _Siamese(Pressure):
    """CE_a + CE_b + λ·contrastive: the loss of the whole batch is the mean of both streams', so it counts twice.

    The two streams share all weights, as in the paper, and one pass over a batch serves both; see `_pairs`.
    """

    task_weight = 2.0

    def __init__(self, *, weight: float, margin: float, primary: int | None) -> None:
        super().__init__()
        self.weight, self.margin, self.primary = weight, margin, primary

    def terms(self, split: Split, batch: Batch) -> dict[str, Tensor]:
        """The weighted contrastive term."""
        targets = batch.targets.flatten(1) if batch.targets.ndim > 1 else batch.targets[:, None]
        if self.primary is not None:
            if self.primary >= targets.shape[1]:
                raise ConfigError(
                    f"Hybrid: expected primary below {targets.shape[1]}, the columns of the targets, got {self.primary}"
                )
            targets = targets[:, self.primary : self.primary + 1]
        order = _pairs(len(targets))
        half, targets = len(order) // 2, targets[order]
        is_alike = (targets[:half] == targets[half:]).all(1)
        return {"siamese": self.weight * contrastive_loss(batch.features[order], is_alike, margin=self.margin)}


def _pairs(n: int) -> Int[Tensor, " rows"]:
    """The rows of a batch, first of each pair and then second: neighbors in one half of it, far rows in the other.

    A sampler for metric losses puts rows of one identity side by side: far rows alone would never be alike there, and
    neighbors hardly ever different.
    """
    # A batch of one stays one: the loss refuses it.
    quarter, rows = n // 4, torch.arange(2 * (n // 2) or n)
    near, far = rows[: 2 * quarter], rows[2 * quarter :]
    return torch.cat([near[::2], far[: len(far) // 2], near[1::2], far[len(far) // 2 :]])


def _halves(
    split: Split, project: Projection, expand: Reconstruction, noise: Noise | None
) -> tuple[nn.Module, nn.Module]:
    edge: OrderedDict[str, nn.Module] = OrderedDict(body=copy.deepcopy(split.edge), project=project)
    if noise is not None:
        edge["noise"] = noise
    cloud: OrderedDict[str, nn.Module] = OrderedDict(expand=expand, body=copy.deepcopy(split.cloud))
    return nn.Sequential(edge), nn.Sequential(cloud)
