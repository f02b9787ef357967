"""SiftFunnel's criterion of inversion difficulty, and whether it orders splits as measured attacks do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.measures.information import effective_dimensions, effective_volume, feature_entropy, mutual_information

__all__ = [
    "Agreement",
    "Difficulty",
    "Factors",
    "inversion_difficulty",
    "measure_factors",
    "order_agreement",
    "recorded_factors",
]

Factor = Literal["mutual_information", "entropy", "volume"]
VolumeBy = Literal["nonzero", "dimensions"]

_LEAST_RATIO = 1e-3  # a factor that is gone counts as a thousandth: no single one makes the score infinite
_MOST_ORDERS = 5040  # 7!: as many orders as are tried one by one


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What the criterion looks at: mutual information in nats, entropy in bits over all elements, effective volume.

    `volume_by` says how the volume was counted: elements that are not 0, or directions in which features vary.

    Raises:
        ConfigError: NaN or infinity, a negative entropy or volume, or an unknown `volume_by`.
    """

    mutual_information: float
    entropy: float
    volume: float
    volume_by: VolumeBy = "nonzero"

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.mutual_information, self.entropy, self.volume))):
            raise ConfigError(f"factors of inversion difficulty: expected finite numbers, got {self}")
        if self.entropy < 0 or self.volume < 0:
            raise ConfigError(f"factors of inversion difficulty: expected an entropy and a volume of 0 or more: {self}")
        if self.volume_by not in ("nonzero", "dimensions"):
            raise ConfigError(f"unknown volume_by {self.volume_by!r}; legal: nonzero, dimensions")


def measure_factors(
    x: Float[Tensor, "n ..."],
    z: Float[Tensor, "m ..."],
    *,
    seeds: int = 3,
    steps: int = 800,
    bins: int = 64,
    threshold: float = 0.0,
    volume_by: VolumeBy = "nonzero",
    seed: int = 0,
) -> Factors:
    """The three factors of a split, from images and their features; the knobs are those of each measure.

    Take the same images, knobs and `volume_by` for every split that you compare; `dimensions` where features of one
    of them are never exactly 0.

    Raises:
        DataError, ConfigError: as `mutual_information`, `feature_entropy` and `effective_volume`.
    """
    return Factors(
        mutual_information=mutual_information(x, z, seeds=seeds, steps=steps, seed=seed).value,
        entropy=feature_entropy(z, bins=bins).total_bits,
        volume=effective_volume(z, threshold=threshold) if volume_by == "nonzero" else effective_dimensions(z),
        volume_by=volume_by,
    )


def recorded_factors(found: Sequence[Mapping[str, float]], n_elements: Sequence[int]) -> list[Factors]:
    """The factors of splits that are compared, from figures that were recorded of each and the sizes of its features.

    Volume is counted in elements that are not 0 or, where a split has none that is ever 0 and all have the figure, in
    directions: in the same way for all. The figures are "mine", "entropy", "effective_volume", "effective_dimensions".
    """
    has_zeros = all(one["effective_volume"] < size for one, size in zip(found, n_elements, strict=True))
    in_directions = not has_zeros and all("effective_dimensions" in one for one in found)
    return [
        Factors(
            mutual_information=one["mine"],
            entropy=one["entropy"],
            volume=one["effective_dimensions" if in_directions else "effective_volume"],
            volume_by="dimensions" if in_directions else "nonzero",
        )
        for one in found
    ]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard the criterion expects inversion to be: each factor as a ratio to the reference; below 1 protects.

    `score` is 0 for the reference and rises with difficulty: the mean of -ln(ratio). `protects_by` names the factors
    that fell by at least the margin, strongest first; it is empty when none did.
    """

    mutual_information: float
    entropy: float
    volume: float
    score: float
    protects_by: tuple[Factor, ...]


def inversion_difficulty(factors: Factors, reference: Factors, *, margin: float = 0.1) -> Difficulty:
    """What the criterion says of a split next to `reference`, the undefended one, and which factors do it.

    A factor protects when it lies below 1 - `margin` of the reference's. A mutual information below 0 counts as 0.

    Raises:
        ConfigError: `margin` outside [0, 1), or volumes counted in different ways.
        DataError: a factor of the reference is not above 0: there is nothing to fall from.

    Source: the three factors are those of SiftFunnel (arXiv 2501.00824: less information, less entropy and less
    effective volume make inversion harder). Ratios to a reference, their geometric mean as the score, the margin and
    the naming are ours; the paper gives no rule that we know of. It is a criterion, not a bound: see
    `order_agreement` before you trust its order.

    >>> plain = Factors(mutual_information=4.0, entropy=900.0, volume=300.0)
    >>> funnel = Factors(mutual_information=2.0, entropy=880.0, volume=75.0)
    >>> inversion_difficulty(funnel, plain).protects_by
    ('volume', 'mutual_information')
    """
    if not 0 <= margin < 1:
        raise ConfigError(f"inversion difficulty: expected a margin from 0 to below 1, got {margin}")
    if factors.volume_by != reference.volume_by:
        raise ConfigError(
            f"inversion difficulty: volume by {factors.volume_by} cannot be compared with volume by "
            f"{reference.volume_by}; count both the same way"
        )
    ratios: dict[Factor, float] = {}
    names: tuple[Factor, ...] = ("mutual_information", "entropy", "volume")
    for name in names:
        whole = getattr(reference, name)
        if not whole > 0:
            raise DataError(
                f"inversion difficulty: expected a reference whose {name.replace('_', ' ')} is above 0, got {whole}; "
                "take the undefended split, with enough images to measure it"
            )
        ratios[name] = max(getattr(factors, name), 0.0) / whole
    score = -sum(math.log(max(ratio, _LEAST_RATIO)) for ratio in ratios.values()) / len(ratios)
    falling = sorted((ratio, name) for name, ratio in ratios.items() if ratio < 1 - margin)
    return Difficulty(
        mutual_information=ratios["mutual_information"],
        entropy=ratios["entropy"],
        volume=ratios["volume"],
        score=score + 0.0,
        protects_by=tuple(name for _, name in falling),
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether difficulty orders splits as leakage does: Spearman's correlation of the score with *less* leakage.

    1: the harder, the less leaks, always; 0: no relation; -1: upside down. `low` and `high` are a 95 % bootstrap
    interval over splits, `p_value` the chance of an agreement this large among random orders. `orders` is the answer:
    the interval is above 0 and the chance below 5 %.
    """

    correlation: float
    low: float
    high: float
    p_value: float
    n_splits: int

    @property
    def orders(self) -> bool:
        """Whether the criterion orders these splits better than chance."""
        return self.low > 0 and self.p_value < 0.05


def order_agreement(
    criterion_scores: Sequence[float] | NDArray[np.float64],
    measured_leakage: Sequence[float] | NDArray[np.float64],
    *,
    resamples: int = 5000,
    seed: int = 0,
) -> Agreement:
    """Rank correlation of the criterion with what attacks found, over splits; ties get mean ranks.

    `measured_leakage` is higher where more leaks (SSIM or PSNR of the strongest attack). With up to 7 splits all orders
    are tried, so that the chance is exact; a perfect order of few splits has an interval of no width, and is then told
    by its chance alone. Splits of one network and images are not independent: take the interval as the least doubt.

    Raises:
        DataError: fewer than 4 splits, lists of different length, NaN or infinity, or all values of one list equal.
        ConfigError: fewer than 100 resamples.

    Source: Spearman's rho; percentile bootstrap and permutation test as in Efron, Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapters 13 and 15; a resample in which all are equal counts as no relation, which is ours.

    >>> found = order_agreement([0.0, 0.4, 0.9, 1.5, 2.0], [0.9, 0.8, 0.5, 0.3, 0.2])
    >>> round(found.correlation, 6), found.orders
    (1.0, True)
    """
    scores, leakage = (np.asarray(values, dtype=np.float64) for values in (criterion_scores, measured_leakage))
    n = len(scores)
    if scores.ndim != 1 or scores.shape != leakage.shape or n < 4:
        raise DataError(
            f"order agreement: expected a score and a leakage for each of 4 splits or more, got shapes {scores.shape} "
            f"and {leakage.shape}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(leakage).all()):
        raise DataError("order agreement: NaN or infinite values; a broken attack or measure has no place in an order")
    if np.ptp(scores) == 0 or np.ptp(leakage) == 0:
        raise DataError("order agreement: all scores, or all leakages, are equal; there is no order to agree with")
    if resamples < 100:
        raise ConfigError(f"order agreement: expected 100 resamples or more, got {resamples}")
    rng = np.random.default_rng(seed)
    harder, safer = _mean_ranks(scores[None]), _mean_ranks(-leakage[None])
    correlation = float(_correlations(harder, safer)[0])

    picks = rng.integers(0, n, size=(resamples, n))
    draws = _correlations(_mean_ranks(scores[picks]), _mean_ranks(-leakage[picks]))
    low, high = np.percentile(draws, [2.5, 97.5])

    if math.factorial(n) <= _MOST_ORDERS:
        orders = np.array(list(itertools.permutations(range(n))))
        p_value = float((_correlations(harder, safer[0][orders]) >= correlation - 1e-9).mean())
    else:
        orders = rng.permuted(np.tile(np.arange(n), (resamples, 1)), axis=1)
        as_large = int((_correlations(harder, safer[0][orders]) >= correlation - 1e-9).sum())
        p_value = (1 + as_large) / (1 + resamples)
    return Agreement(
        correlation=correlation,
        low=min(float(low), correlation),
        high=max(float(high), correlation),
        p_value=p_value,
        n_splits=n,
    )


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value in its row, from 0; equal ones share the mean."""
    columns, rows = values[:, :, None], values[:, None, :]
    ranks: NDArray[np.float64] = (rows < columns).sum(2) + ((rows == columns).sum(2) - 1) / 2
    return ranks


def _correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation of each row of a with that of b; 0 where a row is constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: NDArray[np.float64] = (a * b).sum(1) / np.where(size > 0, size, 1.0)
    return found
