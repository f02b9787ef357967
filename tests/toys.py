"""Small worlds and edges whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from louver.attacks import Auxiliary, Inverter, View
from louver.features import ImageRows, compute_features
from louver.types import Images

SHAPE = (3, 12, 16)


def pictures(n: int, *, seed: int, shape: tuple[int, int, int] = SHAPE) -> Images:
    """Soft colored blobs on a colored ground; label "kind" is the channel that the blob shines in."""
    rng = np.random.default_rng(seed)
    c, h, w = shape
    y, x = np.mgrid[0:h, 0:w]
    kind = rng.integers(0, c, n)
    ground = rng.uniform(0.1, 0.5, (n, c, 1, 1))
    blobs = np.zeros((n, c, h, w))
    for _ in range(2):
        cy, cx, r = rng.uniform(0, h, n), rng.uniform(0, w, n), rng.uniform(1.5, 4, n)
        blob = np.exp(-((y - cy[:, None, None]) ** 2 + (x - cx[:, None, None]) ** 2) / (2 * r[:, None, None] ** 2))
        strength = rng.uniform(0.05, 0.15, (n, c))
        strength[np.arange(n), kind] = rng.uniform(0.3, 0.5, n)
        blobs += strength[:, :, None, None] * blob[:, None]
    pixels = (np.clip(ground + blobs, 0, 1) * 255).round().astype(np.uint8)
    return Images(pixels=pixels, labels={"kind": kind.astype(np.int64)}, name="blobs")


class Mixed(nn.Module):
    """Every pixel in every feature: an orthogonal matrix over the whole picture."""

    def __init__(self, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        size = int(np.prod(shape))
        self.register_buffer("matrix", torch.linalg.qr(torch.randn(size, size, generator=generator))[0])

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix


class Shuffled(nn.Module):
    """All pixels, each in another place: a grid whose order means nothing."""

    def __init__(self, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(int(np.prod(shape)), generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self.order].view(x.shape)


class Wide(nn.Module):
    """A convolution and ReLU with more channels than the pixels that each sees; `scale` shrinks what is sent."""

    def __init__(self, scale: float = 1.0, channels: int = 40) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            nn.init.normal_(self.conv.weight, std=0.4)
            nn.init.normal_(self.conv.bias, std=0.2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) * self.scale


class Tokens(nn.Module):
    """Patches of 4 × 4 pixels as tokens in front of which a class token stands, as a transformer sends them."""

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


class Silent(nn.Module):
    """Says the same of every picture."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 5, 6, 8), 0.7) + 0 * x.sum()


class Noise(nn.Module):
    """Says something else each time, never anything of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 5, 6, 8, generator=self.generator)


def features_of(edge: nn.Module, images: Images, *, is_mirrored: bool = False) -> Auxiliary:
    rows = ImageRows(images, is_mirrored)
    with torch.no_grad():
        shape = tuple(edge(rows.rows(np.arange(1))).shape[1:])
    features = compute_features(edge, rows, shape, device=torch.device("cpu"), memory_bytes=2**30)
    labels = torch.from_numpy(images.labels["kind"])
    return Auxiliary(images=rows, labels=torch.cat([labels, labels]) if is_mirrored else labels, features=features)


def view_of(
    edge: nn.Module,
    *,
    n: int = 300,
    cloud: nn.Module | None = None,
    earlier: Mapping[str, Inverter] | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> View:
    """An attacker who has been granted everything."""
    train = features_of(edge, pictures(n, seed=1, shape=shape), is_mirrored=False)
    validation = features_of(edge, pictures(40, seed=2, shape=shape))
    assert train.features is not None
    return View(
        image_shape=shape,
        feature_shape=tuple(train.features.rows(np.arange(1)).shape[1:]),
        cloud=cloud or nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
        edge=edge,
        train=train,
        validation=validation,
        earlier=earlier or {},
    )
