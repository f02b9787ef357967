"""Several attributes of each image at once, by one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from louver.errors import ConfigError
from louver.tasks.base import Criterion, answers, check_rows, even_batches
from louver.tasks.classification import Classification
from louver.types import Images

__all__ = ["Attributes"]


@dataclass(frozen=True)
class Attributes:
    """One class of each attribute for each image: `columns` maps a label column to its number of classes.

    The network gives the scores of all attributes in one row, attribute after attribute in the order of `columns`.

    Raises:
        ConfigError: no columns, or one of fewer than two classes.
    """

    columns: Mapping[str, int]

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("attributes: expected one label column or more with its number of classes, got none")
        # A copy: the caller's mapping may change later, and with it what the task means.
        object.__setattr__(self, "columns", dict(self.columns))
        _ = self._parts

    @property
    def title(self) -> str:
        """The columns."""
        *others, last = (repr(column) for column in self.columns)
        return "attributes " + (f"{', '.join(others)} and {last}" if others else last)

    @property
    def score(self) -> str:
        """Mean accuracy over the attributes decides between epochs."""
        return "accuracy"

    def targets(self, images: Images) -> Int[Tensor, "n k"]:
        """The class of each attribute of each image, in the order of `columns`.

        Raises:
            DataError: no images, no such label column, or a label outside of its classes.
        """
        return torch.stack([part.targets(images) for part in self._parts], dim=1)

    def criterion(self, outputs: Float[Tensor, "n s"], targets: Int[Tensor, "n k"], *, seed: int) -> Criterion:
        """Mean over the attributes of the mean cross-entropy, in nats; no parameters, no chance.

        Raises:
            ConfigError: (also when called) the network does not give one score a class of every attribute.
        """
        self.check(outputs)
        return _MeanCrossEntropy(self)

    def batches(self, targets: Tensor, batch_size: int, generator: torch.Generator) -> list[Int[Tensor, " rows"]]:
        """Each image once an epoch, in random order, in batches of even size."""
        return even_batches(len(targets), batch_size, generator)

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`accuracy.COLUMN`, the share of images right in one attribute; `accuracy`, their mean; `n` images.

        Raises:
            ConfigError: the network does not give one score a class of every attribute.
            DataError: as `targets`, or the network answers NaN.
        """
        targets = self.targets(images)
        scores = answers(model, images, self.check, batch_size=batch_size, device=device)
        shares = {
            f"accuracy.{column}": int((part.argmax(1) == truth).sum()) / len(images)
            for column, part, truth in zip(self.columns, self.parted(scores), targets.unbind(1), strict=True)
        }
        return {"accuracy": sum(shares.values()) / len(shares), **shares, "n": float(len(images))}

    def per_image(
        self, model: nn.Module, images: Images, *, device: torch.device | str = "cpu"
    ) -> dict[str, NDArray[np.float64]]:
        """`accuracy.COLUMN`: 1 for an image that is right in one attribute, else 0; `accuracy`, their mean.

        Raises:
            ConfigError, DataError: as `evaluate`.
        """
        targets = self.targets(images)
        scores = answers(model, images, self.check, device=device)
        hits = {
            f"accuracy.{column}": (part.argmax(1) == truth).double().numpy()
            for column, part, truth in zip(self.columns, self.parted(scores), targets.unbind(1), strict=True)
        }
        return {"accuracy": np.mean(list(hits.values()), axis=0), **hits}

    def parted(self, outputs: Float[Tensor, "n s"]) -> tuple[Float[Tensor, "n _"], ...]:
        """The scores of each attribute, in the order of `columns`."""
        return torch.split(outputs, list(self.columns.values()), dim=1)

    def check(self, outputs: Tensor) -> None:
        """Refuses outputs that are not one score a class of every attribute.

        Raises:
            ConfigError: they are not.
        """
        width = sum(self.columns.values())
        sizes = ", ".join(f"{column} {n}" for column, n in self.columns.items())
        check_rows(
            outputs,
            width,
            f"attributes ({sizes}): expected scores of shape (n, {width})",
            f"end the network in {width} scores, attribute after attribute",
        )

    @property
    def _parts(self) -> list[Classification]:
        return [Classification(column, n_classes) for column, n_classes in self.columns.items()]


class _MeanCrossEntropy(Criterion):
    def __init__(self, task: Attributes) -> None:
        super().__init__()
        self.task = task

    def forward(
        self, outputs: Float[Tensor, "n s"], targets: Int[Tensor, "n k"], *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        self.task.check(outputs)
        terms = [
            F.cross_entropy(scores, truth, label_smoothing=label_smoothing)
            for scores, truth in zip(self.task.parted(outputs.float()), targets.unbind(1), strict=True)
        ]
        return torch.stack(terms).mean()
