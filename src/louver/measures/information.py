"""How much features say about images, without an attack: dependence, information, entropy, volume, radius.

None of these is a verdict. They are quick, they can be trained against, and they can be wrong; an attack that
reconstructs images is right whatever they say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.measures.mutual import Estimate, mutual_information
from louver.measures.rows import FLAT, checked_rows, gram

__all__ = [
    "Entropy",
    "Estimate",
    "distance_correlation",
    "effective_dimensions",
    "effective_volume",
    "feature_entropy",
    "intra_class_radius",
    "mutual_information",
]

_LEAST_BATCH = 4  # of 3 rows every distance matrix looks like every other
_ROUNDING = 4e-6  # squared distances below this share of the rows' squares are rounding of float32 products
_FAR_FROM_0 = 0.1  # squared distances below this share of the rows' squares have lost digits
_CHUNK_ELEMENTS = 4_000_000


def distance_correlation(x: Float[Tensor, "n ..."], z: Float[Tensor, "m ..."]) -> Float[Tensor, ""]:
    """Squared distance correlation of two batches, row by row; from 0 to 1, differentiable in both.

    1 is a copy up to rotation and scale. Independent rows give above 0: in many dimensions, the size of the batch
    decides how much (0.99 of 128 rows of noise, 12288 numbers against 3072), so compare values of equal batches only.
    Where either batch is constant it is 0, and gradients are finite there and wherever rows coincide. Computed in
    float32 whatever autocast says.

    Raises:
        DataError: fewer than 4 rows, or batches of different length.

    Source: Székely, Rizzo, Bakirov, Annals of Statistics 35, 2007, definition 3 (biased, V-statistic), squared; so
    used as a loss by NoPeek and in the code of SiftFunnel (arXiv 2501.00824), which leave out the final root. Ours:
    distances come from one Gram matrix, those that are rounding count as 0.

    >>> x = torch.rand(7, 3, 8, 10)
    >>> round(float(distance_correlation(x, 5 - 2 * x)), 4)
    1.0
    """
    if len(x) != len(z):
        raise DataError(f"distance correlation: expected as many images as features, got {len(x)} and {len(z)}")
    if len(x) < _LEAST_BATCH:
        raise DataError(
            f"distance correlation: expected a batch of {_LEAST_BATCH} or more, got {len(x)}; rows are compared with "
            "one another, so raise the batch size or drop the last, incomplete batch"
        )
    with torch.autocast(x.device.type, enabled=False):
        a, b = _centered_distances(x), _centered_distances(z)
        scale = a.square().mean() * b.square().mean()
        covariance = (a * b).mean()
        return torch.where(scale > 0, covariance / torch.where(scale > 0, scale, 1.0).sqrt(), 0.0)


def _centered_distances(batch: Tensor) -> Float[Tensor, "n n"]:
    """Doubly centred Euclidean distances, of mean 1 before centring: the coefficient does not see the scale."""
    rows = batch.flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    squared, both = _squared_distances(rows)
    if bool(squared.detach().mean() < _FAR_FROM_0 * both.detach().mean()):
        # Distances do not see a shift, but float32 does: of rows far from 0 the products cancel. The first row is as
        # good a shift as the mean, and exact where all rows are equal. Elsewhere the pass over the data is saved.
        squared, both = _squared_distances(rows - rows[:1].detach())
    is_apart = squared > _ROUNDING * both.detach()
    distances = torch.where(is_apart, torch.where(is_apart, squared, 1.0).sqrt(), 0.0)
    mean = distances.mean().detach()
    distances = distances / torch.where(mean > 0, mean, 1.0)
    means = distances.mean(0)
    return distances - means.unsqueeze(0) - means.unsqueeze(1) + means.mean()


def _squared_distances(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Squared distances by one product, and the sums of squares that they are small differences of."""
    products = gram(rows)
    squares = products.diagonal()
    both = squares.unsqueeze(0) + squares.unsqueeze(1)
    return both - 2 * products, both


# Entropy, volume, radius


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Entropy of quantised features in bits: mean over their elements, and the sum."""

    bits_per_element: float
    total_bits: float


def feature_entropy(z: Float[Tensor, "n ..."], *, bins: int = 64) -> Entropy:
    """Entropy of features whose elements are each quantised to `bins` levels of their own range, in bits.

    From 0 (constant) to log2(bins) an element. Levels span an element's own range over the images, since a receiver
    can rescale: a contraction hides nothing. The sum ignores what elements tell about each other, so the joint
    entropy is at most that. The histogram is plugged in: with n images it is low by about (bins - 1) / (2 n ln 2)
    bits an element, so compare values of equally many images.

    Raises:
        DataError: fewer than 2 images, NaN or infinity.
        ConfigError: fewer than 2 bins.

    Source: H(z) of SiftFunnel's criterion (arXiv 2501.00824); the quantisation is ours.

    >>> feature_entropy(torch.tensor([[0.0, 3.0], [1.0, 3.0]])).total_bits
    1.0
    """
    if bins < 2:
        raise ConfigError(f"feature entropy: expected 2 bins or more, got {bins}")
    rows = checked_rows(z, "feature entropy")
    bits = 0.0
    for part in rows.split(max(1, _CHUNK_ELEMENTS // max(len(rows), bins)), dim=1):
        low, high = part.aminmax(dim=0)
        spread = high - low
        is_alive = spread > FLAT * torch.maximum(low.abs(), high.abs())
        level = ((part - low) / torch.where(is_alive, spread, 1.0) * bins).long().clamp_(0, bins - 1)
        level = torch.where(is_alive, level, 0) + torch.arange(part.shape[1], device=part.device) * bins
        share = torch.bincount(level.flatten(), minlength=part.shape[1] * bins).double() / len(rows)
        bits -= float(torch.special.xlogy(share, share).sum()) / math.log(2)
    bits = max(bits, 0.0)
    return Entropy(bits_per_element=bits / rows.shape[1], total_bits=bits)


def effective_volume(z: Float[Tensor, "n ..."], *, threshold: float = 0.0) -> float:
    """Mean number of elements per image whose magnitude is above `threshold`; of ReLU features, those that fired.

    Of features that are never exactly 0 (after SiLU, or with noise) it is just their number: raise the threshold, or
    ask `effective_dimensions`.

    Raises:
        DataError: fewer than 2 images, NaN or infinity.
        ConfigError: a negative threshold.

    Source: effective information volume in the code of SiftFunnel (arXiv 2501.00824), with threshold 0.

    >>> effective_volume(torch.tensor([[0.0, 3.0], [1.0, 3.0]]))
    1.5
    """
    if not threshold >= 0:
        raise ConfigError(f"effective volume: expected a threshold of 0 or more, got {threshold}")
    rows = checked_rows(z, "effective volume")
    return int((rows.abs() > threshold).sum()) / len(rows)


def effective_dimensions(z: Float[Tensor, "n ..."]) -> float:
    """In how many directions features vary: participation ratio of their covariance; 0 for constant features.

    (Σλ)² / Σλ² over the eigenvalues λ: d for d equal ones, 1 for a line. At most n - 1 with n images, and low where n
    is not well above it, so compare values of equally many images. Sees no global scale, but does see those of single
    elements.

    Raises:
        DataError: fewer than 2 images, NaN or infinity.

    Source: ours, as what effective volume cannot say of features that are never 0.

    >>> round(effective_dimensions(torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]])), 6)
    2.0
    """
    rows = checked_rows(z, "effective dimensions")
    centered = rows - rows.mean(0)
    is_alive = centered.abs().amax(0) > FLAT * rows.abs().amax(0)
    centered = centered * is_alive
    scale = float(centered.abs().max())
    if scale == 0:
        return 0.0
    centered = centered / scale
    products = centered @ centered.T if centered.shape[0] <= centered.shape[1] else centered.T @ centered
    products = products.double()
    return float(products.trace() ** 2 / products.square().sum())


def intra_class_radius(z: Float[Tensor, "n ..."], labels: Int[Tensor, " m"]) -> float:
    """Mean squared distance of features to their class's centre, as a share of that to the common centre.

    0 when a class is one point, about 1 when classes say nothing. Both means divide by degrees of freedom (n - K,
    n - 1), so that few images a class do not make the radius look small; images of a class of one tell nothing and
    count in neither. Constant features give 0.

    Raises:
        DataError: labels of another length, no class with two images, NaN or infinity.

    Source: R_c² of arXiv 2506.15412, which bounds what is left to find inside a class; dividing by the total
    variance (an attacker rescales) and by degrees of freedom is ours.

    >>> round(intra_class_radius(torch.tensor([[0.0], [0.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1])), 6)
    0.0
    """
    rows = checked_rows(z, "intra-class radius")
    if labels.shape != (len(rows),):
        raise DataError(f"intra-class radius: expected {len(rows)} labels, got shape {tuple(labels.shape)}")
    _, index, counts = torch.unique(labels.to(rows.device), return_inverse=True, return_counts=True)
    is_used = counts[index] > 1
    if not bool(is_used.any()):
        raise DataError("intra-class radius: every class has one image; give classes with two or more")
    rows = rows[is_used]
    _, index, counts = torch.unique(index[is_used], return_inverse=True, return_counts=True)
    rows = rows - rows[:1]
    centers = torch.zeros(len(counts), rows.shape[1], device=rows.device).index_add_(0, index, rows)
    centers /= counts.unsqueeze(1)
    within = float((rows - centers[index]).square().sum(dtype=torch.float64)) / (len(rows) - len(counts))
    total = float((rows - rows.mean(0)).square().sum(dtype=torch.float64)) / (len(rows) - 1)
    return within / total if total > 0 else 0.0
