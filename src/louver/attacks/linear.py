"""The best linear inverse of an edge, in closed form: where a decoder starts, and all that an early cut needs.

Two shapes of it. *Local*: each block of pixels from the features around it (features keep their spatial order).
*Flat*: the whole picture from all features at once (they do not, or there is none).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.attacks.base import Auxiliary

__all__ = [
    "Layout",
    "LinearInverse",
    "batches",
    "block_size",
    "feature_batches",
    "feature_statistics",
    "fit_flat",
    "fit_local",
    "standardization",
    "to_grid",
    "unblock",
]

Layout = Literal["local", "flat"]

_MOST_ROWS = 256
_MOST_FLOATS = 2**24
"""Floats in one batch of work (64 MiB): large features are taken a few at a time."""
_MOST_LOCAL_INPUTS = 3000
"""Normal equations up to this size are solved in seconds; a smaller neighborhood is taken beyond it."""
_MOST_FLAT_WEIGHTS = 2**27
"""A flat inverse holds inputs × pixels weights: half a gigabyte at this count."""
_MOST_FLAT_ROWS = 6000
_FLAT_TRIAL_PIXELS = 512
_RIDGES = (1e-6, 1e-4, 1e-2, 1.0)


class LinearInverse(nn.Module):
    """Standardised features to pictures by one convolution and a pixel shuffle (local) or one matrix (flat).

    Input (n, *feature_shape) raw features, output (n, c, h, w), not clamped. Parameters are buffers: closed form,
    never trained.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        *,
        layout: Layout,
        weight: Tensor,
        bias: Tensor,
        image_shape: tuple[int, int, int],
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.layout = layout
        self.image_shape = image_shape
        self.grid = grid
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, standardized: Tensor) -> Float[Tensor, "n c h w"]:
        """Pictures of standardised features; for the local layout these are on their grid, (n, c, gh, gw)."""
        channels, height, width = self.image_shape
        if self.layout == "flat":
            return F.linear(standardized.flatten(1), self.weight, self.bias).view(-1, channels, height, width)
        blocks = F.conv2d(standardized, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return unblock(blocks, self.image_shape, self.grid)


def to_grid(features: Tensor, image_shape: tuple[int, int, int]) -> Float[Tensor, "n c gh gw"]:
    """Features as channels on a grid no finer than half the picture, nothing lost.

    (n, c, h, w) that are finer are folded 2×2 into channels as often as needed (space to depth, padded to fit);
    (n, h, w, c), known by sides in the picture's proportion, are turned first; tokens (n, t, d) with t = s² or s² + 1
    become a square of s × s, the odd token spread over it; what has no spatial order, (n, d), becomes a grid of 1 × 1.
    """
    if features.ndim == 2:
        return features[:, :, None, None]
    if features.ndim == 3:
        return _tokens_to_grid(features)
    if features.ndim != 4:
        return features.flatten(1)[:, :, None, None]
    _, height, width = image_shape
    if _strays(features.shape[1:3], height / width) < _strays(features.shape[2:4], height / width):
        features = features.permute(0, 3, 1, 2)
    while features.shape[2] > -(-height // 2) and features.shape[3] > -(-width // 2):
        pad = (0, features.shape[3] % 2, 0, features.shape[2] % 2)
        features = F.pixel_unshuffle(F.pad(features, pad), 2)
    return features


def _strays(sides: torch.Size, proportion: float) -> float:
    return abs(math.log(sides[0] / sides[1] / proportion))


def _tokens_to_grid(tokens: Float[Tensor, "n t d"]) -> Tensor:
    n_tokens = tokens.shape[1]
    for extra in (0, 1):
        side = round((n_tokens - extra) ** 0.5)
        if side > 1 and side * side == n_tokens - extra:
            grid: Tensor = tokens[:, extra:].transpose(1, 2).unflatten(2, (side, side))
            if extra:
                spread = tokens[:, 0, :, None, None].expand(-1, -1, side, side)
                grid = torch.cat([grid, spread], 1)
            return grid
    return tokens.flatten(1)[:, :, None, None]


def standardization(rows: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation per channel (dimension 1), each shaped to broadcast over (n, c, ...).

    A channel that never changes gets 0, not a huge factor: it says nothing, and noise on it must not drown the rest.
    Computed in double precision, so features of any scale are seen.
    """
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    pivot: Tensor | None = None
    ndim = 2
    for batch in rows:
        ndim = batch.ndim
        columns = batch.double().transpose(0, 1).flatten(1)
        # Sums about the first batch's mean: deviations far smaller than the mean survive the subtraction.
        if pivot is None:
            pivot = columns.mean(1)
        centered = columns - pivot[:, None]
        count += columns.shape[1]
        total = total + centered.sum(1)
        squares = squares + centered.square().sum(1)
    assert pivot is not None
    shift = total / count
    deviation = (squares / count - shift.square()).clamp(min=0).sqrt()
    # What float32 cannot tell from a constant is one.
    resolution = torch.finfo(torch.float32).eps * (pivot + shift).abs()
    is_heard = deviation > torch.maximum(1e-6 * deviation.max(), resolution)
    scale = torch.where(is_heard, 1 / deviation.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    shape = (1, -1) + (1,) * (ndim - 2)
    return (pivot + shift).float().view(shape), scale.float().view(shape)


def unblock(blocks: Tensor, image_shape: tuple[int, int, int], grid: tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """(n, c·b·b, gh, gw) blocks of pixels as pictures: shuffled out, then cropped to (h, w)."""
    _, height, width = image_shape
    return F.pixel_shuffle(blocks, block_size(image_shape, grid))[:, :, :height, :width]


def block_size(image_shape: tuple[int, int, int], grid: tuple[int, int]) -> int:
    """Pixels per grid cell along the side that needs most."""
    return max(-(-image_shape[1] // grid[0]), -(-image_shape[2] // grid[1]))


def _blocks(images: Float[Tensor, "n c h w"], grid: tuple[int, int]) -> Tensor:
    size = block_size((images.shape[1], images.shape[2], images.shape[3]), grid)
    pad = (0, grid[1] * size - images.shape[3], 0, grid[0] * size - images.shape[2])
    return F.pixel_unshuffle(F.pad(images, pad, mode="replicate") if any(pad) else images, size)


def batches(n: int, floats_per_row: int) -> Iterator[NDArray[np.int64]]:
    """Consecutive indices 0..n in batches of bounded memory."""
    rows = max(1, min(_MOST_ROWS, _MOST_FLOATS // floats_per_row))
    for start in range(0, n, rows):
        yield np.arange(start, min(start + rows, n))


def feature_batches(auxiliary: Auxiliary, *, most: int | None = None, spread: int = 1) -> Iterator[NDArray[np.int64]]:
    """Indices of the first `most` images in batches whose features, `spread` times over, stay within bounds."""
    assert auxiliary.features is not None
    floats = int(np.prod(auxiliary.features.rows(np.arange(1)).shape)) * spread
    return batches(min(len(auxiliary.images), most or len(auxiliary.images)), floats)


def feature_statistics(
    auxiliary: Auxiliary, *, on_grid: tuple[int, int, int] | None = None, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """`standardization` of an attacker's features; of their grid for pictures of shape `on_grid`, if given."""
    features = auxiliary.features
    assert features is not None
    rows = (features.rows(index) for index in feature_batches(auxiliary, most=most))
    return standardization(rows if on_grid is None else (to_grid(batch, on_grid) for batch in rows))


def fit_local(
    train: Auxiliary, validation: Auxiliary, mean: Tensor, scale: Tensor, image_shape: tuple[int, int, int]
) -> tuple[LinearInverse, float] | None:
    """The ridge-regression inverse with the largest affordable neighborhood, and its validation MSE.

    None where the features have no grid worth the name, or too many channels for normal equations.
    """
    assert train.features is not None
    assert validation.features is not None
    probe = to_grid(train.features.rows(np.arange(1)), image_shape)
    channels, grid = probe.shape[1], (probe.shape[2], probe.shape[3])
    kernel = next((k for k in (5, 3, 1) if channels * k * k <= _MOST_LOCAL_INPUTS and k <= 2 * min(grid) - 1), None)
    if kernel is None or grid == (1, 1):
        return None
    inputs = channels * kernel * kernel
    # Enough positions to determine the inverse many times over; more only costs time.
    enough = max(_MOST_ROWS, 60 * inputs // (grid[0] * grid[1]) + 1)
    gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
    cross: Tensor | None = None
    for index in feature_batches(train, most=enough, spread=kernel * kernel):
        standardized = (to_grid(train.features.rows(index), image_shape) - mean) * scale
        columns = F.unfold(standardized, kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
        columns = torch.cat([columns, columns.new_ones(len(columns), 1)], 1)
        targets = _blocks(train.images.rows(index), grid).flatten(2).transpose(1, 2).flatten(0, 1)
        gram += (columns.T @ columns).double()
        product = (columns.T @ targets).double()
        cross = product if cross is None else cross + product
    assert cross is not None

    def build(solution: Tensor) -> LinearInverse:
        weight = solution[:-1].T.reshape(-1, channels, kernel, kernel).float().contiguous()
        return LinearInverse(
            layout="local", weight=weight, bias=solution[-1].float(), image_shape=image_shape, grid=grid
        )

    best: tuple[LinearInverse, float] | None = None
    for ridge in _RIDGES:
        penalty = torch.full((inputs + 1,), ridge * float(gram.diagonal()[:-1].mean()), dtype=torch.float64)
        penalty[-1] = 0.0
        solution = _solve(gram + penalty.diag(), cross)
        if solution is None:
            continue
        candidate = build(solution)
        error = _validation_error(candidate, validation, mean, scale, image_shape, to_grid_first=True)
        if best is None or error < best[1]:
            best = candidate, error
    return best


def fit_flat(
    train: Auxiliary, validation: Auxiliary, mean: Tensor, scale: Tensor, image_shape: tuple[int, int, int]
) -> tuple[LinearInverse, float] | None:
    """The ridge-regression inverse from all features to all pixels, and its validation MSE; None if too large."""
    assert train.features is not None
    assert validation.features is not None
    pixels = int(np.prod(image_shape))
    inputs = int(np.prod(train.features.rows(np.arange(1)).shape[1:]))
    n = min(len(train.images), _MOST_FLAT_ROWS)
    if inputs * pixels > _MOST_FLAT_WEIGHTS or n * inputs > _MOST_FLAT_WEIGHTS:
        return None
    features = torch.cat([((train.features.rows(i) - mean) * scale).flatten(1) for i in feature_batches(train, most=n)])
    targets = torch.cat([train.images.rows(i) for i in batches(n, pixels)]).flatten(1)
    middle, center = features.mean(0), targets.mean(0)
    features, targets = features - middle, targets - center
    is_dual = n < inputs
    gram = (features @ features.T if is_dual else features.T @ features).double()

    def solve(ridge: float, columns: Tensor) -> Tensor | None:
        damped = gram + ridge * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
        right = targets[:, columns]
        solution = _solve(damped, (right if is_dual else features.T @ right).double())
        if solution is None:
            return None
        return (features.T @ solution.float() if is_dual else solution.float()).T.contiguous()

    # Solving for every pixel is most of the time: the ridge is chosen on some of them.
    few = torch.linspace(0, pixels - 1, min(pixels, _FLAT_TRIAL_PIXELS)).long()
    known = torch.cat([validation.images.rows(i).flatten(1)[:, few] for i in batches(len(validation.images), pixels)])

    validation_features = validation.features

    def trial_error(ridge: float) -> float:
        weight, total, start = solve(ridge, few), 0.0, 0
        if weight is None:
            return math.inf
        for index in feature_batches(validation):
            centered = ((validation_features.rows(index) - mean) * scale).flatten(1) - middle
            guess = (centered @ weight.T + center[few]).clamp(0, 1)
            total += float((guess - known[start : start + len(index)]).square().double().sum())
            start += len(index)
        return total

    weight = solve(min(_RIDGES, key=trial_error), torch.arange(pixels))
    if weight is None:
        return None
    inverse = LinearInverse(
        layout="flat", weight=weight, bias=center - weight @ middle, image_shape=image_shape, grid=(1, 1)
    )
    return inverse, _validation_error(inverse, validation, mean, scale, image_shape, to_grid_first=False)


def _solve(gram: Tensor, right: Tensor) -> Tensor | None:
    """None where so little ridge leaves `gram`, whose sums are of single precision, short of positive definite."""
    factor, info = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right, factor) if int(info) == 0 else None


def _validation_error(
    inverse: LinearInverse,
    validation: Auxiliary,
    mean: Tensor,
    scale: Tensor,
    image_shape: tuple[int, int, int],
    *,
    to_grid_first: bool,
) -> float:
    assert validation.features is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for index in feature_batches(validation):
            features = validation.features.rows(index)
            if to_grid_first:
                features = to_grid(features, image_shape)
            guess = inverse((features - mean) * scale).clamp(0, 1)
            truth = validation.images.rows(index)
            total += float((guess - truth).square().double().sum())
            count += truth.numel()
    return total / count
