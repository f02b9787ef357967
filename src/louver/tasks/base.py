"""What every task has in common: the protocol, and running a network over images to judge it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.errors import ConfigError, DataError
from louver.types import Images

__all__ = ["Criterion", "Task", "answers", "check_rows", "even_batches"]


class Criterion(nn.Module, ABC):
    """Mean over a batch of how wrong a network's outputs are, which training minimizes.

    It may own parameters, such as the class weights of a metric loss: they are trained along with the network and
    thrown away afterwards. It goes to the device of the network before it is called.
    """

    @abstractmethod
    def forward(self, outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """A scalar with gradients; `targets` are the rows of `Task.targets` that belong to `outputs`."""


@runtime_checkable
class Task(Protocol):
    """A use of a network. Training minimizes its criterion, and keeps the epoch whose figure `score` is highest."""

    @property
    def title(self) -> str:
        """What the network does, in a few plain words, as reports and refusals call it."""

    @property
    def score(self) -> str:
        """The key of `evaluate` that says which of two networks is better: the higher one."""

    def targets(self, images: Images) -> Tensor:
        """What the network should say of each image, one row an image."""

    def criterion(self, outputs: Tensor, targets: Tensor, *, seed: int) -> Criterion:
        """A criterion for a network that answers like `outputs` (an example batch), trained on all of `targets`."""

    def batches(self, targets: Tensor, batch_size: int, generator: torch.Generator) -> list[Int[Tensor, " rows"]]:
        """The rows of each batch of one epoch; how many batches there are does not depend on `generator`."""

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Figures by name, measured in eval mode, and `n`, the number of images; `model` is left as it was."""

    def per_image(
        self, model: nn.Module, images: Images, *, device: torch.device | str = "cpu"
    ) -> dict[str, NDArray[np.float64]]:
        """The figures of `evaluate` image by image, of which they are the means: what an interval is drawn from."""


def even_batches(n: int, batch_size: int, generator: torch.Generator) -> list[Int[Tensor, " rows"]]:
    """Each of `n` rows once, in random order, in batches of `batch_size` or a little more or less.

    >>> [len(batch) for batch in even_batches(10, 4, torch.Generator().manual_seed(0))]
    [5, 5]
    """
    # Even batches: a last one of a single image would break batch normalization.
    return list(torch.randperm(n, generator=generator).tensor_split(max(1, round(n / batch_size))))


def answers(
    model: nn.Module,
    images: Images,
    check: Callable[[Tensor], None],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "n ..."]:
    """What `model` says of each image in eval mode, on the CPU; `model` is left as it was.

    `check` gets each batch of outputs and raises what does not fit the task.

    Raises:
        ConfigError: from `check`, or the network does not give one row an image.
        DataError: no images, or the network answers NaN or infinity.
    """
    if not len(images):
        raise DataError(f"{images.name}: expected images to evaluate the network on, got none")
    # A copy, since moving to a device and eval mode would otherwise change the user's model.
    judged = copy.deepcopy(model).to(device).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(images.floats(slice(start, start + batch_size))).to(device)
            outputs = judged(pixels)
            check(outputs)
            if len(outputs) != len(pixels):
                raise ConfigError(
                    f"{images.name}: expected one row an image from the network, got {len(outputs)} rows for "
                    f"{len(pixels)} images; keep the batch as the first dimension"
                )
            if not bool(torch.isfinite(outputs).all()):
                raise DataError(
                    f"{images.name}: the network answers NaN or infinity to an image after row {start}; "
                    "its weights are broken, or it is not for images in [0,1]"
                )
            found.append(outputs.cpu())
    return torch.cat(found)


def check_rows(outputs: object, width: int | None, expected: str, remedy: str) -> None:
    """Refuses what is not a tensor of shape (n, `width`), of any width if None.

    Raises:
        ConfigError: "`expected`, got ...; `remedy`".
    """
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and (width is None or outputs.shape[1] == width):
        return
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ConfigError(f"{expected}, got {got}; {remedy}")
