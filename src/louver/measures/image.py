"""How close a reconstruction is to the true image, pixel for pixel: one value per image, range fixed at 1.0.

Plain functions of `(truth, guess)`, both (n, c, h, w) in [0,1]. They never pool over the batch, never infer a range
from the data and never mix channels with images: each of these has inflated or hidden leakage in published code.
All are differentiable, so that an attack may train on them, and compute in float32 or, where an input is float64,
in float64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from louver.errors import DataError

__all__ = [
    "MS_SSIM_MIN_SIDE",
    "PSNR_CAP_DB",
    "SSIM_MIN_SIDE",
    "check_pair",
    "ms_ssim",
    "mse",
    "psnr",
    "ssim",
]

PSNR_CAP_DB = 100.0
"""PSNR of a perfect reconstruction. Without a cap one such image would make the mean of all others infinite."""

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K1 L)² and (K2 L)² of Wang et al. with L = 1.0
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2

SSIM_MIN_SIDE = _WINDOW
"""Smallest height and width that hold one SSIM window."""

MS_SSIM_MIN_SIDE = (_WINDOW - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1
"""Smallest height and width whose coarsest scale still holds one window: 161."""

_MATMUL_MAX_SIDE = 128  # past it the zeros of the band matrix cost more than depthwise convolution does


def check_pair(truth: Tensor, guess: Tensor, *, min_side: int = 1) -> None:
    """Nothing, if `truth` and `guess` can be compared: same (n, c, h, w), floating point, finite, in [0,1].

    A guess out of range is refused, not clamped: clamping would flatter a broken attack, and belongs to the audit.

    Raises:
        DataError: any of this does not hold, or a side is below `min_side`.
    """
    if truth.ndim != 4 or truth.shape != guess.shape:
        raise DataError(
            f"expected truth and guess of one shape (n, c, h, w), got {tuple(truth.shape)} and {tuple(guess.shape)}; "
            "compare images one to one, with the batch first"
        )
    if truth.shape[0] == 0 or min(truth.shape[1:]) == 0:
        raise DataError(f"expected at least one image and one pixel, got shape {tuple(truth.shape)}")
    if min(truth.shape[2:]) < min_side:
        raise DataError(
            f"expected images of at least {min_side} pixels a side, got {truth.shape[2]}×{truth.shape[3]}; "
            "this measure does not exist for smaller ones, leave it out"
        )
    for what, images in (("truth", truth), ("guess", guess)):
        if not images.is_floating_point():
            raise DataError(f"expected floating-point images in [0,1], got {what} of {images.dtype}; divide by 255")
        low, high = torch.aminmax(images.detach())  # NaN comes out of both, so one pass checks everything
        if not (float(low) >= 0.0 and float(high) <= 1.0):
            raise DataError(
                f"expected {what} finite and in [0,1], got values in [{float(low):g}, {float(high):g}]; "
                "peak is 1.0 here, never 255: divide by 255, undo any normalisation, clamp what an attack returns"
            )


def mse(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean squared error of each image, over its channels and pixels; 0 (the same image) to 1.

    Sums are taken in float64.

    Raises:
        DataError: shapes differ, not 4-D, not finite or not in [0,1].

    Example:
        >>> mse(torch.zeros(7, 3, 18, 23), torch.full((7, 3, 18, 23), 0.5)).shape
        torch.Size([7])
    """
    check_pair(truth, guess)
    dtype = _working_dtype(truth, guess)
    squares = (truth.to(dtype) - guess.to(dtype)).square()
    return squares.flatten(1).mean(dim=1, dtype=torch.float64).to(dtype)


def psnr(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image in dB, with peak 1.0; 0 (nothing alike) to 100 (the cap).

    Per image: the PSNR of a pooled error is another number, higher or lower as the batch is mixed. A perfect
    reconstruction counts as `PSNR_CAP_DB`, so that no infinity reaches a mean.

    Raises:
        DataError: shapes differ, not 4-D, not finite or not in [0,1].

    Example:
        >>> psnr(torch.zeros(2, 3, 18, 23), torch.full((2, 3, 18, 23), 0.1)).round().tolist()
        [20.0, 20.0]
    """
    floor = 10 ** (-PSNR_CAP_DB / 10)
    return -10 * torch.log10(mse(truth, guess).clamp_min(floor))


def ssim(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each image; -1 to 1 (the same image), above 0 in practice.

    11×11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 1.0, population covariance, averaged over the
    positions where the window lies inside the image ("valid"), then over channels. Equals scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)`.

    Raises:
        DataError: as in `check_pair`, or a side below `SSIM_MIN_SIDE`.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004, section III; we differ:
    color images are averaged over their channels, where the paper has gray images only.

    Example:
        >>> ssim(torch.rand(7, 3, 18, 23), torch.rand(7, 3, 18, 23)).shape
        torch.Size([7])
    """
    check_pair(truth, guess, min_side=SSIM_MIN_SIDE)
    return _similarity(truth, guess)[0].mean(dim=1)


def ms_ssim(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Multi-scale structural similarity of each image, over five scales; 0 to 1 (the same image).

    Needs 161 pixels a side; smaller images have no five scales, and fewer scales would be another measure.

    Raises:
        DataError: as in `check_pair`, or a side below `MS_SSIM_MIN_SIDE`.

    Source: Wang, Simoncelli, Bovik, "Multi-scale structural similarity", Asilomar 2003, section 3; we differ: terms
    are averaged over channels before they are raised to their weights, and a negative average counts as 0, since a
    negative number has no real fractional power.

    Example:
        >>> ms_ssim(torch.rand(2, 3, 161, 170), torch.rand(2, 3, 161, 170)).shape
        torch.Size([2])
    """
    check_pair(truth, guess, min_side=MS_SSIM_MIN_SIDE)
    result = torch.ones((), dtype=_working_dtype(truth, guess), device=truth.device)
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        if scale:
            # ceil_mode keeps the last row and column of odd sizes, as the reference's mirrored border does.
            truth, guess = (F.avg_pool2d(images, 2, ceil_mode=True) for images in (truth, guess))
        whole, structure = _similarity(truth, guess)
        is_coarsest = scale == len(_SCALE_WEIGHTS) - 1
        term = (whole if is_coarsest else structure).mean(dim=1)
        # The gradient of x**0.3 at 0 is infinite; a floor far below any printed digit keeps training finite.
        result = result * term.clamp_min(1e-12) ** weight
    return result


def _similarity(truth: Tensor, guess: Tensor) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """SSIM, and its contrast-and-structure factor alone, of each channel of each image."""
    dtype = _working_dtype(truth, guess)
    with torch.autocast(truth.device.type, enabled=False):  # half precision loses the variance of smooth regions
        truth, guess = truth.to(dtype), guess.to(dtype)
        # Variances do not change with a shift, but E[x²] - E[x]² loses all its digits where the mean is large.
        shift = truth.mean(dim=(1, 2, 3), keepdim=True)
        x, y = truth - shift, guess - shift
        # The two variances only ever appear as their sum: four fields to blur, not five.
        mean_x, mean_y, squares, product = _blur(torch.stack((x, y, x * x + y * y, x * y)))
        covariance = product - mean_x * mean_y
        variances = squares - (mean_x * mean_x + mean_y * mean_y)
        structure = (2 * covariance + _C2) / (variances + _C2)
        mean_x, mean_y = mean_x + shift, mean_y + shift
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
        return (luminance * structure).mean(dim=(2, 3)), structure.mean(dim=(2, 3))


def _blur(fields: Float[Tensor, "k n c h w"]) -> Float[Tensor, "k n c h-10 w-10"]:
    """The Gaussian window over the last two axes, where it lies inside."""
    height, width = fields.shape[-2:]
    if max(height, width) <= _MATMUL_MAX_SIDE or fields.dtype == torch.float64:
        # Two small matrix products: on a CPU, several times the speed of depthwise convolution at these sizes.
        down = _band(height, fields.dtype, fields.device)
        across = _band(width, fields.dtype, fields.device)
        rows = (fields.reshape(-1, width) @ across.T).view(-1, height, across.shape[0])
        return (down @ rows).view(*fields.shape[:-2], down.shape[0], across.shape[0])
    window = _window().to(fields)
    flat = fields.reshape(1, -1, height, width)
    channels = flat.shape[1]
    flat = F.conv2d(flat, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    flat = F.conv2d(flat, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return flat.view(*fields.shape[:-2], *flat.shape[-2:])


def _window() -> Float[Tensor, " 11"]:
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return weights / weights.sum()


@lru_cache(maxsize=64)
def _band(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "outputs size"]:
    """The matrix whose product with a line of `size` pixels is that line, blurred: the window along the diagonal."""
    with torch.inference_mode(False):  # a cached inference tensor would break the next call that needs gradients
        band = torch.zeros(size - _WINDOW + 1, size, dtype=torch.float64)
        for row in range(len(band)):
            band[row, row : row + _WINDOW] = _window()
        return band.to(dtype=dtype, device=device)


def _working_dtype(truth: Tensor, guess: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (truth.dtype, guess.dtype) else torch.float32
