"""One class for each image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from louver.errors import ConfigError, DataError
from louver.tasks.base import Criterion, answers, check_rows, even_batches
from louver.types import Images

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification:
    """One of `n_classes` for each image, as label column `column` has it.

    Raises:
        ConfigError: fewer than two classes.
    """

    column: str
    n_classes: int

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise ConfigError(
                f"classification of {self.column!r}: expected n_classes of 2 or more, got {self.n_classes}"
            )

    @property
    def title(self) -> str:
        """The column and the number of classes."""
        return f"classification of {self.column!r} into {self.n_classes} classes"

    @property
    def score(self) -> str:
        """Accuracy decides between epochs."""
        return "accuracy"

    def targets(self, images: Images) -> Int[Tensor, " n"]:
        """The class of each image.

        Raises:
            DataError: no such label column, no images, or a label outside 0..n_classes-1.
        """
        labels = images.column(self.column)
        if not len(labels):
            raise DataError(f"{images.name}: expected images with label column {self.column!r}, got none")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.n_classes:
            raise DataError(
                f"{images.name}: expected labels 0..{self.n_classes - 1} in column {self.column!r}, got {low}..{high}; "
                "set n_classes to the number of classes, or number them from 0"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def criterion(self, outputs: Float[Tensor, "n k"], targets: Int[Tensor, " n"], *, seed: int) -> Criterion:
        """Mean cross-entropy, in nats; it owns no parameters, and no chance is involved.

        Raises:
            ConfigError: (also when called) the network does not give one score a class.
        """
        self.check(outputs)
        return _CrossEntropy(self)

    def batches(self, targets: Tensor, batch_size: int, generator: torch.Generator) -> list[Int[Tensor, " rows"]]:
        """Each image once an epoch, in random order, in batches of even size."""
        return even_batches(len(targets), batch_size, generator)

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`accuracy`, the share of images whose highest score is at the right class, and `n`, the number of images.

        Raises:
            ConfigError: the network does not give one score a class.
            DataError: as `targets`, or the network answers NaN.
        """
        targets = self.targets(images)
        scores = answers(model, images, self.check, batch_size=batch_size, device=device)
        return {"accuracy": int((scores.argmax(1) == targets).sum()) / len(images), "n": float(len(images))}

    def per_image(
        self, model: nn.Module, images: Images, *, device: torch.device | str = "cpu"
    ) -> dict[str, NDArray[np.float64]]:
        """`accuracy`: 1 for an image whose highest score is at the right class, else 0.

        Raises:
            ConfigError, DataError: as `evaluate`.
        """
        targets = self.targets(images)
        scores = answers(model, images, self.check, device=device)
        return {"accuracy": (scores.argmax(1) == targets).double().numpy()}

    def check(self, outputs: Tensor) -> None:
        """Refuses outputs that are not one score a class.

        Raises:
            ConfigError: they are not.
        """
        check_rows(
            outputs,
            self.n_classes,
            f"classification of {self.column!r}: expected scores of shape (n, {self.n_classes})",
            "load the network with this n_classes",
        )


class _CrossEntropy(Criterion):
    def __init__(self, task: Classification) -> None:
        super().__init__()
        self.task = task

    def forward(
        self, outputs: Float[Tensor, "n k"], targets: Int[Tensor, " n"], *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        self.task.check(outputs)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=label_smoothing)
