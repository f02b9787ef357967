"""What an attacker is given, and what an attack must offer.

`louver.audit` builds the `View` from the threat model, so an attack can only reach what was granted; the images that
it will be scored on are never in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.errors import ThreatError
from louver.types import Progress

__all__ = ["Attack", "Auxiliary", "Inverter", "View"]


@runtime_checkable
class FeatureRows(Protocol):
    """Features of many images, computed once; may live on disk."""

    def __len__(self) -> int: ...

    def rows(self, index: NDArray[np.int64]) -> Tensor:
        """Features at `index`, float32 (len(index), *feature_shape), on the CPU."""


@runtime_checkable
class ImageRows(Protocol):
    """Images of the attacker; `rows` returns float32 (n, c, h, w) in [0,1]."""

    def __len__(self) -> int: ...

    def rows(self, index: NDArray[np.int64]) -> Float[Tensor, "n c h w"]:
        """Images at `index`, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """The attacker's own images. `features` is None where the threat model grants neither edge nor query.

    `fresh` is there where the edge draws by chance and the attacker holds it: the same features, drawn anew at each
    look, for attacks that learn in many passes.
    """

    images: ImageRows
    labels: Int[Tensor, " n"] | None
    features: FeatureRows | None
    fresh: FeatureRows | None = None


@runtime_checkable
class Inverter(Protocol):
    """Features in, pictures out."""

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        """Reconstructions in [0,1] of (n, *feature_shape) features."""

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `Attack.restore` makes the same inverter again."""


@dataclass(frozen=True, kw_only=True)
class View:
    """All that one attacker can reach at one cut.

    `edge` is None unless the threat model grants it. `train` and `validation` split the auxiliary images: attacks fit
    on the first and choose on the second; their features come from the edge as deployed, noise included. `earlier`
    holds the inverters that ran before this attack at the same cut, in order. Features are means of `observations`
    sendings of each picture.
    """

    image_shape: tuple[int, int, int]
    feature_shape: tuple[int, ...]
    cloud: nn.Module
    edge: nn.Module | None
    train: Auxiliary | None
    validation: Auxiliary | None
    earlier: Mapping[str, Inverter] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observations: int = 1

    def need_auxiliary(self, attack: str) -> tuple[Auxiliary, Auxiliary]:
        """The attacker's images to fit on and to choose on.

        Raises:
            ThreatError: the threat model grants no auxiliary images.
        """
        if self.train is None or self.validation is None:
            raise ThreatError(f"{attack} needs auxiliary images, which the threat model does not grant")
        return self.train, self.validation

    def need_features(self, attack: str) -> tuple[Auxiliary, Auxiliary]:
        """Auxiliary images with their features.

        Raises:
            ThreatError: the threat model grants no auxiliary images, or no way to compute features of them.
        """
        train, validation = self.need_auxiliary(attack)
        if train.features is None or validation.features is None:
            raise ThreatError(f"{attack} needs features of auxiliary images: the threat model must grant edge or query")
        return train, validation

    def need_edge(self, attack: str) -> nn.Module:
        """The edge half, weights and all.

        Raises:
            ThreatError: the threat model does not grant the edge.
        """
        if self.edge is None:
            raise ThreatError(f"{attack} needs the edge half, which the threat model does not grant")
        return self.edge


@runtime_checkable
class Attack(Protocol):
    """One way to turn features back into pictures."""

    @property
    def needs(self) -> frozenset[str]:
        """The grants without which it cannot run."""

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        """Fit to the edge behind `view`, on auxiliary images only."""

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The inverter whose `state()` this is, without fitting again."""
