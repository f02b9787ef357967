"""The floor: a guess that looks at no feature at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from louver.attacks.base import Auxiliary, Inverter, View
from louver.types import Progress

__all__ = ["Constant", "MeanImage", "mean_image"]

_ROWS = 1024


@dataclass(frozen=True)
class Constant:
    """An inverter that makes the same picture of everything: what an attack is left with that hears nothing."""

    image: Float[Tensor, "c h w"]

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        """The picture, once for each row of features."""
        return self.image.expand(len(features), *self.image.shape).clone()

    def state(self) -> dict[str, Tensor]:
        """The picture."""
        return {"image": self.image}


def mean_image(auxiliary: Auxiliary, *, most: int | None = None) -> Float[Tensor, "c h w"]:
    """The mean of the first `most` images."""
    count = min(len(auxiliary.images), most or len(auxiliary.images))
    rows = [np.arange(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
    total = sum((auxiliary.images.rows(index).double().sum(0) for index in rows), torch.tensor(0.0))
    return (total / count).float()


@dataclass(frozen=True, kw_only=True)
class MeanImage:
    """The mean auxiliary image, whatever the features say: what an attacker knows before listening.

    Every finding carries its score as the floor; an attack that does not beat it has rebuilt nothing.

    Source: ours; the constant guess with the least expected squared error.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Images to average."""
        return frozenset({"auxiliary"})

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        """Average the attacker's images."""
        train, _ = view.need_auxiliary("MeanImage")
        return Constant(mean_image(train))

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The same constant again."""
        return Constant(state["image"])
