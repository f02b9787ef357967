"""The floor: a guess that looks at no feature at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from louver.attacks.base import Inverter, Progress, View

__all__ = ["MeanImage"]

_ROWS = 1024


@dataclass(frozen=True)
class _Constant:
    image: Float[Tensor, "c h w"]

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        return self.image.expand(len(features), *self.image.shape).clone()

    def state(self) -> dict[str, Tensor]:
        return {"image": self.image}


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
        total = torch.zeros(view.image_shape, dtype=torch.float64)
        for start in range(0, len(train.images), _ROWS):
            rows = train.images.rows(np.arange(start, min(start + _ROWS, len(train.images))))
            total += rows.double().sum(0)
        return _Constant((total / len(train.images)).float())

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The same constant again."""
        return _Constant(state["image"])
