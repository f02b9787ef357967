"""Principal components of features: fitted in a stream, then a projection on the edge and its inverse in the cloud."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from louver.errors import ConfigError, DataError
from louver.stochastic import silenced
from louver.types import Images

__all__ = ["PrincipalComponents", "Projection", "Reconstruction", "feature_chunks", "fit_components"]

_WIDEST_EXACT = 4096
"""Covariances up to this side are held and solved whole (128 MiB); beyond it, a subspace is iterated."""
_SPARE_DIRECTIONS = 16
_MOST_PASSES = 12
_ENOUGH_GAIN = 1e-4
_CHUNK_FLOATS = 2**24
_CHUNK_ROWS = 256

Chunks = Callable[[], Iterator[Tensor]]
"""Rows (n, ...) in chunks, the same ones in the same order at every call."""


@dataclass(frozen=True, kw_only=True)
class PrincipalComponents:
    """The directions in which rows vary most, orthonormal, by falling variance (divided by n - 1, as is usual).

    `explained` is each direction's share of the whole variance, from 0 to 1.
    """

    mean: Float[Tensor, " p"]
    components: Float[Tensor, "k p"]
    variance: Float[Tensor, " k"]
    explained: Float[Tensor, " k"]


class Projection(nn.Module):
    """Vᵀ(z - μ): features (n, ...) as (n, k) coordinates, in the features' own unit."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Float[Tensor, " p"], components: Float[Tensor, "k p"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("components", components.clone())

    def forward(self, z: Tensor) -> Float[Tensor, "n k"]:
        """The coordinates of these features."""
        return F.linear(z.flatten(1) - self.mean, self.components)


class Reconstruction(nn.Module):
    """V u + μ: coordinates (n, k) as features of `shape` again. `explained` reports what share each one carries."""

    mean: Tensor
    components: Tensor
    explained: Tensor

    def __init__(
        self,
        mean: Float[Tensor, " p"],
        components: Float[Tensor, "k p"],
        explained: Float[Tensor, " k"],
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", mean.clone())
        self.register_buffer("components", components.clone())
        self.register_buffer("explained", explained.clone())

    def forward(self, u: Float[Tensor, "n k"]) -> Tensor:
        """Features (n, *shape)."""
        flat = F.linear(u, self.components.t(), self.mean)
        return flat.view(-1, *self.shape)


def feature_chunks(edge: nn.Module, images: Images) -> Iterator[Tensor]:
    """What a copy of the edge sends for all images in order, float32 on the CPU, at most 256 images at a time.

    The copy is in evaluation mode and without noise, on the device of its weights.

    Raises:
        DataError: a feature is NaN or infinite.
    """
    quiet = silenced(edge).eval()
    weights = itertools.chain(quiet.parameters(), quiet.buffers())
    device = next((tensor.device for tensor in weights), torch.device("cpu"))
    with torch.no_grad():
        n_floats = quiet(torch.from_numpy(images.floats(slice(0, 1))).to(device)).numel() if len(images) else 0
    # What an edge holds on the way is bounded too, by a guess of eight times the image.
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_FLOATS // (8 * int(np.prod(images.image_shape)) + n_floats)))
    for start in range(0, len(images), rows):
        pixels = torch.from_numpy(images.floats(slice(start, start + rows)))
        with torch.no_grad():
            features: Tensor = quiet(pixels.to(device)).float().cpu()
        if not bool(features.isfinite().all()):
            raise DataError(
                f"{images.name}: the edge sends NaN or infinity for an image after row {start}; mend its weights"
            )
        yield features


def fit_components(
    chunks: Chunks,
    n_components: int,
    *,
    seed: int,
    widest_exact: int = _WIDEST_EXACT,
    memory_bytes: int = 2**28,
) -> PrincipalComponents:
    """The `n_components` leading principal components of flattened rows, in memory that the number of rows leaves be.

    Exact (eigenvectors of the covariance) for up to `widest_exact` features. Wider rows are gone through several
    times: a block of `n_components` + max(16, `n_components`) random directions is multiplied by the covariance until
    the variance that it captures grows by less than a ten-thousandth, 12 times at most; first on the rows that
    `memory_bytes` hold, then, from where that ended, on all. What is captured falls short of the exact variance by
    less than a thousandth on spectra that decay at all; single directions whose variances are nearly equal may come
    out turned among themselves. `seed` draws the first block.

    Raises:
        ConfigError: more components than features, or than rows.
        DataError: all rows are the same.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithm 4.4; we differ:
    each pass ends in a Rayleigh-Ritz step, and the gain in variance decides when to stop.
    """
    first = next(iter(chunks()), None)
    if first is None:
        raise DataError("principal components: expected rows to fit to, got none")
    width = first[0].numel()
    if not 1 <= n_components <= width:
        raise ConfigError(f"expected 1 to {width} components, the size of the features, got {n_components}")
    pivot = first.flatten(1).double().mean(0).float()
    if width <= widest_exact:
        found = _multiply(chunks, None, pivot)
        variance, components = _leading(found.product, n_components)
    else:
        found, variance, components = _iterated(chunks, width, n_components, pivot, seed, memory_bytes)
    if n_components > found.count:
        raise ConfigError(f"expected at most {found.count} components, the number of images, got {n_components}")
    resolution = torch.finfo(torch.float32).eps * float(pivot.abs().max())
    if found.total <= width * resolution**2:
        raise DataError("principal components: all images have the same features, so there is nothing to reduce")
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    return PrincipalComponents(
        mean=found.mean.float(),
        components=(components * largest.sign()).T.float().contiguous(),
        variance=variance.float(),
        explained=(variance / found.total).float(),
    )


@dataclass(frozen=True)
class _Pass:
    """What one pass over the rows gives: covariance times a block, and the moments on the way."""

    product: Tensor
    mean: Tensor
    total: float
    count: int


def _iterated(
    chunks: Chunks, width: int, n_components: int, pivot: Tensor, seed: int, memory_bytes: int
) -> tuple[_Pass, Tensor, Tensor]:
    """The last pass of a subspace iteration, with the leading variances and their directions (width, k)."""
    n_directions = min(width, n_components + max(_SPARE_DIRECTIONS, n_components))
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(torch.randn(width, n_directions, generator=generator, dtype=torch.float64)).Q
    held: list[Tensor] = []
    is_all_held = True
    for chunk in chunks():
        is_all_held = (sum(map(len, held)) + len(chunk)) * 4 * width <= memory_bytes
        if not is_all_held:
            break
        held.append(chunk)

    def in_memory() -> Iterator[Tensor]:
        return iter(held)

    stages: list[Chunks] = [in_memory] if is_all_held else [in_memory, chunks] if held else [chunks]
    for stage in stages:
        captured = 0.0
        for _ in range(_MOST_PASSES):
            found = _multiply(stage, block, pivot)
            variance, turned = _leading(block.T @ found.product, n_components)
            components = block @ turned
            block = torch.linalg.qr(found.product).Q
            before, captured = captured, float(variance.sum())
            if captured - before <= _ENOUGH_GAIN * captured:
                break
    return found, variance, components


def _leading(covariance: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0)[:n_components].clamp(min=0), vectors.flip(1)[:, :n_components]


def _multiply(chunks: Chunks, block: Tensor | None, pivot: Tensor) -> _Pass:
    """The covariance of the rows times `block`, or the covariance itself."""
    width = len(pivot)
    product = torch.zeros(width, width if block is None else block.shape[1], dtype=torch.float64)
    narrow = None if block is None else block.float()
    count, squares, total = 0, 0.0, torch.zeros(width, dtype=torch.float64)
    for chunk in chunks():
        # About the first chunk's mean: float32 then resolves deviations far smaller than the mean.
        centered = chunk.flatten(1).float() - pivot
        product += (centered.T @ (centered if narrow is None else centered @ narrow)).double()
        total += centered.sum(0, dtype=torch.float64)
        squares += float(centered.square().sum(dtype=torch.float64))
        count += len(centered)
    shift, degrees = total / count, max(count - 1, 1)
    product -= count * torch.outer(shift, shift if block is None else shift @ block)
    spread = squares - count * float(shift.square().sum())
    return _Pass(product / degrees, pivot.double() + shift, spread / degrees, count)
