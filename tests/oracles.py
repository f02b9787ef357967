"""Slow and obviously right: what the fast paths are held against. Loops over images, windows and resamples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gaussian_window(size: int = 11, sigma: float = 1.5) -> Array:
    line = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    window = np.outer(line, line)
    return window / window.sum()


def ssim_maps(truth: Array, guess: Array) -> tuple[Array, Array]:
    """SSIM and its contrast-structure factor at each position of one gray image (h, w), window by window."""
    window = gaussian_window()
    rows, columns = truth.shape[0] - 10, truth.shape[1] - 10
    whole, structure = np.empty((rows, columns)), np.empty((rows, columns))
    c1, c2 = 0.01**2, 0.03**2
    for i in range(rows):
        for j in range(columns):
            x, y = truth[i : i + 11, j : j + 11], guess[i : i + 11, j : j + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            structure[i, j] = (2 * covariance + c2) / (var_x + var_y + c2)
            whole[i, j] = structure[i, j] * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return whole, structure


def ssim(truth: Array, guess: Array) -> Array:
    """SSIM of each image of (n, c, h, w), averaged over its channels."""
    return np.array(
        [
            np.mean([ssim_maps(t, g)[0].mean() for t, g in zip(a, b, strict=True)])
            for a, b in zip(truth, guess, strict=True)
        ]
    )


def halved(image: Array) -> Array:
    """Averages of 2×2 blocks of (h, w); at an odd border, of what there is."""
    rows, columns = math.ceil(image.shape[0] / 2), math.ceil(image.shape[1] / 2)
    return np.array([[image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(columns)] for i in range(rows)])


def ms_ssim(truth: Array, guess: Array) -> float:
    """MS-SSIM of one gray image (h, w)."""
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    product = 1.0
    for scale, weight in enumerate(weights):
        whole, structure = ssim_maps(truth, guess)
        term = (whole if scale == 4 else structure).mean()
        product *= max(term, 0.0) ** weight
        truth, guess = halved(truth), halved(guess)
    return product


def feature_distance(maps_a: list[Array], maps_b: list[Array], heads: list[Array]) -> Array:
    """LPIPS from feature maps (n, c, h, w) and heads (c,), position by position: (n,)."""
    n = len(maps_a[0])
    total = np.zeros(n)
    for a, b, head in zip(maps_a, maps_b, heads, strict=True):
        for k in range(n):
            positions = []
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    u, v = a[k, :, i, j], b[k, :, i, j]
                    u, v = u / (np.linalg.norm(u) + 1e-10), v / (np.linalg.norm(v) + 1e-10)
                    positions.append((head * (u - v) ** 2).sum())
            total[k] += np.mean(positions)
    return total


def search_ranks(pool: Array, guess: Array) -> list[int]:
    """Rank of pool[i] among all of the pool by distance to guess[i], pixels standardized per image."""

    def standardized(image: Array) -> Array:
        return (image - image.mean()) / image.std()

    known = [standardized(image) for image in pool]
    ranks = []
    for i, image in enumerate(guess):
        distances = [np.linalg.norm(standardized(image) - other) for other in known]
        ranks.append(1 + sum(distance < distances[i] for distance in distances))
    return ranks


def worst(values: Array, leaks_when: str) -> float:
    """Mean of the ceil(5 %) values that leak most."""
    count = math.ceil(0.05 * len(values))
    ordered = sorted(values, reverse=leaks_when == "high")
    return float(np.mean(ordered[:count]))


def bootstrap(values: Array, leaks_when: str, *, seed: int, resamples: int) -> tuple[Array, Array]:
    """Mean and worst of each resample, one at a time."""
    rng = np.random.default_rng(seed)
    draws = [values[rng.integers(0, len(values), len(values))] for _ in range(resamples)]
    return np.array([draw.mean() for draw in draws]), np.array([worst(draw, leaks_when) for draw in draws])
