"""What a network is for: the loss that trains it and the figures that say how well it does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from louver.errors import ConfigError, DataError
from louver.types import Images

__all__ = ["Classification", "Task"]


@runtime_checkable
class Task(Protocol):
    """A use of a network. Training minimizes `loss`, and keeps the epoch whose figure named `score` is highest."""

    @property
    def score(self) -> str:
        """The key of `evaluate` that says which of two networks is better: the higher one."""

    def targets(self, images: Images) -> Tensor:
        """What the network should say of each image, one row an image."""

    def loss(self, outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Mean over the batch of how wrong `outputs` are."""

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Figures by name, measured in eval mode, and `n`, the number of images; `model` is left as it was."""


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

    def loss(
        self, outputs: Float[Tensor, "n k"], targets: Int[Tensor, " n"], *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats.

        Raises:
            ConfigError: the network does not give one score a class.
        """
        self._check(outputs)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=label_smoothing)

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`accuracy`, the share of images whose highest score is at the right class, and `n`, the number of images.

        Raises:
            ConfigError: the network does not give one score a class.
            DataError: as `targets`, or the network answers NaN.
        """
        targets = self.targets(images)
        # A copy, since moving to a device and eval mode would otherwise change the user's model.
        judged = copy.deepcopy(model).to(device).eval()
        n_right = 0
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                outputs = judged(torch.from_numpy(images.floats(batch)).to(device))
                self._check(outputs)
                if not bool(torch.isfinite(outputs).all()):
                    raise DataError(
                        f"{images.name}: the network answers NaN or infinity to an image after row {start}; "
                        "its weights are broken, or it is not for images in [0,1]"
                    )
                n_right += int((outputs.argmax(1).cpu() == targets[batch]).sum())
        return {"accuracy": n_right / len(images), "n": float(len(images))}

    def _check(self, outputs: Tensor) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] != self.n_classes:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"classification of {self.column!r}: expected scores of shape (n, {self.n_classes}), got {got}; "
                "load the network with this n_classes"
            )
