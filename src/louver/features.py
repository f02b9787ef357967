"""Features of many images, computed once and kept: in memory while they fit, else on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.errors import AttackError
from louver.stochastic import drawing_from
from louver.storage import RowFile
from louver.types import Images, Progress

__all__ = ["FeatureRows", "FreshRows", "ImageRows", "compute_features", "observed"]

_BATCH_FLOATS = 2**24


@dataclass(frozen=True)
class ImageRows:
    """Images as an attack reads them, each also mirrored if `is_mirrored` (the mirrored ones follow the others)."""

    images: Images
    is_mirrored: bool = False

    def __len__(self) -> int:
        return len(self.images) * (2 if self.is_mirrored else 1)

    def rows(self, index: NDArray[np.int64]) -> Float[Tensor, "n c h w"]:
        """Images at `index`, float32 in [0,1]."""
        n = len(self.images)
        pixels = torch.from_numpy(self.images.floats(index % n))
        is_flipped = torch.from_numpy(index >= n)
        if bool(is_flipped.any()):
            pixels = torch.where(is_flipped[:, None, None, None], pixels.flip(3), pixels)
        return pixels


@dataclass(frozen=True)
class FeatureRows:
    """Rows of a `RowFile` as tensors."""

    file: RowFile

    def __len__(self) -> int:
        return len(self.file)

    def rows(self, index: NDArray[np.int64]) -> Tensor:
        """Features at `index`, float32, on the CPU."""
        return torch.from_numpy(self.file.read(index))


@dataclass(frozen=True)
class FreshRows:
    """What an edge that draws by chance sends for images, drawn anew at each look.

    A decoder that meets each picture under one draw of the noise learns that draw by heart; an attacker who holds the
    edge sends its pictures as often as it likes.
    """

    edge: nn.Module
    images: ImageRows
    device: torch.device
    seed: int
    observations: int = 1
    _looks: Iterator[int] = field(default_factory=count, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: NDArray[np.int64]) -> Tensor:
        """Features of the images at `index`, float32, on the CPU; of one seed, the same at the same look."""
        draw = int(np.random.SeedSequence([self.seed, next(self._looks)]).generate_state(1)[0])
        with torch.no_grad(), drawing_from(draw, self.device):
            return observed(self.edge, self.images.rows(index).to(self.device), self.observations)


def compute_features(
    edge: nn.Module,
    images: ImageRows,
    feature_shape: tuple[int, ...],
    *,
    device: torch.device,
    memory_bytes: int,
    seed: int = 0,
    observations: int = 1,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> FeatureRows:
    """What the edge sends for each image, (n, *feature_shape) float32, held in at most `memory_bytes` of memory.

    An edge that draws noise draws it from `seed`; with `observations` above 1 each image is sent so often, and what
    is kept is the mean, as an attacker would who sees the same scene again.

    Raises:
        AttackError: the edge sends NaN or infinity for some image, which no attack could be blamed for missing.
        StorageError: the disk is full.
    """
    file = RowFile(len(images), feature_shape, memory_bytes=memory_bytes, folder=folder)
    floats = int(np.prod(feature_shape)) + 8 * int(np.prod(images.images.image_shape))
    batch = max(1, min(256, _BATCH_FLOATS // floats))
    with torch.no_grad(), drawing_from(seed, device):
        for start in range(0, len(images), batch):
            index = np.arange(start, min(start + batch, len(images)))
            features = observed(edge, images.rows(index).to(device), observations)
            if not bool(features.isfinite().all()):
                broken = int(index[int((~features.flatten(1).isfinite().all(1)).int().argmax())])
                raise AttackError(
                    f"the edge sends NaN or infinity for image {broken} of {images.images.name}; "
                    "mend the network or its weights: an attack on broken features proves nothing"
                )
            file.write(start, features.numpy())
            if progress is not None:
                progress("features", (start + len(index)) / len(images))
    return FeatureRows(file)


def observed(edge: nn.Module, images: Float[Tensor, "n c h w"], observations: int) -> Tensor:
    """Mean over so many sendings of what the edge sends for each image, float32, on the CPU."""
    sent: Tensor = edge(images).float().cpu()
    for _ in range(observations - 1):
        sent = sent + edge(images).float().cpu()
    return sent / observations
