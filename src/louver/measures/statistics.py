"""Figures of one finding: mean, worst 5 %, their intervals, and whether the attack beats the know-nothing guess."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from louver.errors import AttackError, ConfigError, DataError
from louver.types import Finding, Row

__all__ = ["WORST_SHARE", "Summary", "row", "summarize"]

WORST_SHARE = 0.05
"""Share of the images that "worst" averages over: those that leak most."""

_CHUNK_ELEMENTS = 200_000  # draws held at once: few enough to stay in the cache of a processor


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All of `louver.types.Row` that is not identity; the fields mean what they mean there."""

    n_images: int
    mean: float
    low: float
    high: float
    worst: float
    worst_low: float
    worst_high: float
    floor: float
    floor_low: float
    floor_high: float
    floor_worst: float
    beats_floor: bool


def row(finding: Finding, *, resamples: int = 2000, level: float = 0.95) -> Row:
    """`finding` in figures; the bootstrap draws from the finding's own seed, so that a report can be made again.

    Raises:
        AttackError, ConfigError, DataError: as in `summarize`.
    """
    summary = summarize(
        finding.per_image,
        finding.floor,
        finding.leaks_when,
        seed=finding.seed,
        resamples=resamples,
        level=level,
    )
    return Row(
        cut=finding.cut,
        attack=finding.attack,
        measure=finding.measure,
        unit=finding.unit,
        leaks_when=finding.leaks_when,
        seconds=finding.seconds,
        **asdict(summary),
    )


def summarize(
    per_image: NDArray[np.float64],
    floor: NDArray[np.float64],
    leaks_when: Literal["high", "low"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Summary:
    """Mean, worst 5 %, floor and their percentile-bootstrap intervals of one measure, value by value with its floor.

    Images are resampled, floor and attack together. "Worst" is the mean over the ceil(5 %) images which leak most, in
    each resample anew. `beats_floor`: the lower end of the interval of the paired difference, turned so that more is
    more leakage, is above 0 (so chance alone gives it (1 - level)/2 of the time). Fewer than 6 images never show it at
    95 %: all of them above the floor would still happen by chance too often.

    Values that are only ever 0 or 1 (hits) get Wilson's interval instead: the bootstrap of 0 hits has no width, and
    would read "none of 20 images" as "never".

    Raises:
        AttackError: NaN or infinity among the values: a broken attack is not a good defense.
        DataError: fewer than 2 images, or a floor of another length.
        ConfigError: `level` outside (0, 1), or fewer than 100 resamples.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3; Wilson, JASA 22, 1927.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = summarize(rng.random(50) + 1, rng.random(50), "high", seed=0)
        >>> found.low < found.mean < found.high, found.beats_floor
        (True, True)
    """
    per_image, floor = _checked(per_image, floor)
    if not 0.0 < level < 1.0 or resamples < 100:
        raise ConfigError(f"expected a level in (0, 1) and 100 resamples or more, got {level} and {resamples}")
    # Sorted by leakage once: the worst of a resample are then its first draws, with no sorting per resample.
    sign = 1.0 if leaks_when == "high" else -1.0
    order = np.argsort(-sign * per_image, kind="stable")
    values, floor = per_image[order], floor[order]
    n_images = len(values)
    n_worst = int(np.ceil(WORST_SHARE * n_images))

    gain = sign * (values - floor)
    draws = _resample(np.stack((values, floor, gain)), n_worst, seed=seed, resamples=resamples)
    tail = 50.0 * (1.0 - level)
    (low, floor_low, gain_low, worst_low), (high, floor_high, _, worst_high) = np.percentile(
        draws, [tail, 100.0 - tail], axis=1
    )
    mean, worst, floor_mean = float(values.mean()), float(values[:n_worst].mean()), float(floor.mean())
    if _is_hits(values) and _is_hits(floor):
        low, high = _wilson(mean, n_images, level)
        floor_low, floor_high = _wilson(floor_mean, n_images, level)
        worst_low, worst_high = _worst_of_hits(low, high, n_images, n_worst, leaks_when)
    return Summary(
        n_images=n_images,
        # Equal values leave an interval of rounding errors only, which need not hold their mean: min and max do.
        mean=mean,
        low=min(float(low), mean),
        high=max(float(high), mean),
        worst=worst,
        worst_low=min(float(worst_low), worst),
        worst_high=max(float(worst_high), worst),
        floor=floor_mean,
        floor_low=min(float(floor_low), floor_mean),
        floor_high=max(float(floor_high), floor_mean),
        floor_worst=float(floor[np.argsort(-sign * floor)[:n_worst]].mean()),
        beats_floor=bool(gain_low > 0.0 and 0.5**n_images <= (1.0 - level) / 2),
    )


def _checked(
    per_image: NDArray[np.float64], floor: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    per_image, floor = np.asarray(per_image, dtype=np.float64), np.asarray(floor, dtype=np.float64)
    if per_image.ndim != 1 or per_image.shape != floor.shape:
        raise DataError(
            f"expected one value and one floor per image, got shapes {per_image.shape} and {floor.shape}; "
            "score the know-nothing guess on the same images, in the same order"
        )
    if len(per_image) < 2:
        raise DataError(
            f"expected at least 2 images, got {len(per_image)}; one image has no interval, audit more (hundreds)"
        )
    for what, values in (("attack", per_image), ("floor", floor)):
        n_bad = int((~np.isfinite(values)).sum())
        if n_bad:
            raise AttackError(
                f"{n_bad} of {len(values)} values of the {what} are NaN or infinite; "
                "a broken attack says nothing about privacy, mend it and run again"
            )
    return per_image, floor


def _resample(columns: NDArray[np.float64], n_worst: int, *, seed: int, resamples: int) -> NDArray[np.float64]:
    """Means of each of the (k, n) columns, and the worst mean of the first, in each resample: (k + 1, resamples)."""
    rng = np.random.default_rng(seed)
    n_columns, n_images = columns.shape
    results = np.empty((n_columns + 1, resamples))
    step = max(1, _CHUNK_ELEMENTS // n_images)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picks = rng.integers(0, n_images, size=(size, n_images))
        picks += np.arange(size)[:, None] * n_images
        # float64 at once: a product of integers with floats goes past BLAS.
        counts = np.bincount(picks.ravel(), minlength=size * n_images).reshape(size, n_images).astype(np.float64)
        results[:-1, start : start + size] = columns @ counts.T / n_images
        # Of the sorted images, take as many draws as fill the worst share: min(cumulative count, n_worst). The first
        # few images hold them all, save by an accident that the check catches.
        head = counts[:, : 2 * n_worst + 50]
        if (head.sum(axis=1) < n_worst).any():
            head = counts
        taken = np.diff(np.minimum(np.cumsum(head, axis=1), n_worst), axis=1, prepend=0.0)
        results[-1, start : start + size] = taken @ columns[0, : taken.shape[1]] / n_worst
    return results


def _is_hits(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(max(center - half, 0.0)), float(min(center + half, 1.0))


def _worst_of_hits(
    low: float, high: float, n: int, n_worst: int, leaks_when: Literal["high", "low"]
) -> tuple[float, float]:
    """Interval of the share of hits among the worst, where the number of hits (of misses) is as in (low, high)."""
    if leaks_when == "high":
        return min(1.0, n * low / n_worst), min(1.0, n * high / n_worst)
    return 1.0 - min(1.0, n * (1.0 - low) / n_worst), 1.0 - min(1.0, n * (1.0 - high) / n_worst)
