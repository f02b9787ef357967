"""Whether features of one identity lie next to each other, where train and test share no identity."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.probes.base import Labels, checked_features, standardized

__all__ = ["MetricProbe", "Reidentification", "learned_metric", "reidentify"]

LEAST_IDENTITIES = 10
"""Fewer tell nothing of how people differ."""
_QUERIES_AT_ONCE = 512
_TIE = 1e-6
"""Cosines that differ by less than this are rounding apart."""
_LEVEL = 0.95
_MOST_DIRECTIONS = 512
_SHRINKAGES = (1e-4, 1e-3, 0.01, 0.1, 0.5)
"""How far the spread within identities is drawn to a ball before it is divided out; 1 would leave plain cosines."""


@dataclass(frozen=True, kw_only=True)
class Reidentification:
    """How often the nearest other row shows the same identity.

    `accuracy` over the `n_queries` rows that have a right answer, with the interval `low`..`high` over identities;
    `n_skipped` rows have none; `chance` is what a draw at random from the same candidates gets; `correct` and
    `chances` hold one value for each row, NaN for those skipped. A tie counts by its share of right answers.
    """

    n_queries: int
    n_skipped: int
    n_identities: int
    accuracy: float
    low: float
    high: float
    chance: float
    beats_chance: bool
    seconds: float
    seed: int
    correct: NDArray[np.float64] = field(repr=False, compare=False)
    chances: NDArray[np.float64] = field(repr=False, compare=False)


def reidentify(
    features: Tensor,
    identities: Labels,
    cameras: Labels | None = None,
    *,
    is_scaled: bool = False,
    seed: int = 0,
    resamples: int = 2000,
    device: torch.device | str = "cpu",
) -> Reidentification:
    """Share of rows whose nearest neighbor among the others, by cosine of standardized columns, is the same identity.

    `is_scaled`: the columns are compared as they are, as `learned_metric` weighs them.
    With `cameras`, other rows of the same identity from the same camera are junk, and no candidates. Chance is exact:
    for each query the right candidates over all candidates. `low`..`high` is the 95 % percentile bootstrap that draws
    whole identities (rows of one are not independent); `beats_chance`: the lower end of the paired difference to
    chance is above 0, with 6 identities or more.

    Raises:
        DataError: rows that do not match, features that are not finite, or fewer than 2 identities with a right answer
            to find.
        ConfigError: fewer than 100 resamples.

    Source: rank-1 with the junk rule of Zheng et al., "Scalable person re-identification" (ICCV 2015); we
    differ: every row is a query in turn, and ties are shared.

    Example:
        >>> centers = torch.randn(8, 1, 12)
        >>> rows = (centers + 0.1 * torch.randn(8, 5, 12)).flatten(0, 1)
        >>> found = reidentify(rows, torch.arange(8).repeat_interleave(5))
        >>> found.accuracy, round(found.chance, 3)
        (1.0, 0.103)
    """
    if resamples < 100:
        raise ConfigError(f"reidentify: expected 100 resamples or more, got {resamples}")
    start = time.perf_counter()
    features = checked_features(features, "reidentify")
    identity = _column(identities, len(features), "identities").to(device)
    camera = None if cameras is None else _column(cameras, len(features), "cameras").to(device)
    (rows,) = (features.flatten(1).to(device),) if is_scaled else standardized(features, device=device)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    correct, chances = [], []
    for queries in torch.arange(len(rows), device=rows.device).split(_QUERIES_AT_ONCE):
        hit, chance = _searched(rows, queries, identity, camera)
        correct.append(hit)
        chances.append(chance)
    hits, by_chance = torch.cat(correct).cpu().numpy(), torch.cat(chances).cpu().numpy()
    asked = by_chance > 0
    _, group = np.unique(identity.cpu().numpy()[asked], return_inverse=True)
    n_identities = int(group.max()) + 1 if len(group) else 0
    if n_identities < 2:
        raise DataError(
            f"reidentify: expected 2 identities or more with another row to find, got {n_identities}; "
            "give several rows of each identity" + ("" if cameras is None else ", from different cameras")
        )
    low, high, gain_low = _bootstrap(hits[asked], by_chance[asked], group, seed=seed, resamples=resamples)
    accuracy = float(hits[asked].mean())
    return Reidentification(
        n_queries=int(asked.sum()),
        n_skipped=int((~asked).sum()),
        n_identities=n_identities,
        accuracy=accuracy,
        low=min(low, accuracy),
        high=max(high, accuracy),
        chance=float(by_chance[asked].mean()),
        beats_chance=gain_low > 0.0 and 0.5**n_identities <= (1.0 - _LEVEL) / 2,
        seconds=time.perf_counter() - start,
        seed=seed,
        correct=np.where(asked, hits, np.nan),
        chances=np.where(asked, by_chance, np.nan),
    )


def learned_metric(
    known: Tensor, identities: Labels, *features: Tensor, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "_ k"], ...]:
    """`features` seen by an attacker who learned from `known` what tells identities apart, each (n, k) on the CPU.

    The spread of pictures of one identity is divided out of the leading directions of the known features, as linear
    discriminant analysis does; how much of it, is chosen on a fifth of the known identities, which is kept apart. Rows
    of identities that none of them shares become comparable by `reidentify(…, is_scaled=True)`.

    Raises:
        DataError: rows that do not match, features that are not finite, or fewer than 10 identities with two rows.
    """
    rows = checked_features(known, "learned_metric")
    others = [checked_features(one, "learned_metric") for one in features]
    identity = _column(identities, len(rows), "identities")
    names, counts = identity.unique(return_counts=True)
    repeated = names[counts > 1]
    if len(repeated) < LEAST_IDENTITIES:
        raise DataError(
            f"learned_metric: expected {LEAST_IDENTITIES} identities or more with two rows, got {len(repeated)}; give "
            "more labeled images, or compare features as they are"
        )
    flat, *seen = standardized(rows, *others, device=device)
    identity = identity.to(flat.device)
    order = torch.randperm(len(repeated), generator=torch.Generator().manual_seed(seed))
    apart = torch.isin(identity, repeated[order[: max(2, len(repeated) // 5)]].to(flat.device))
    mapping = _within_whitened(flat[~apart], identity[~apart])
    projections = [mapping(shrinkage) for shrinkage in _SHRINKAGES]

    def accuracy(projection: Tensor) -> float:
        found = reidentify(
            flat[apart] @ projection, identity[apart], is_scaled=True, seed=seed, resamples=100, device=device
        )
        return found.accuracy

    best = max(projections, key=accuracy)
    return tuple((one @ best).cpu() for one in seen)


@dataclass(frozen=True, kw_only=True)
class MetricProbe:
    """For many classes of few rows, such as known people: the nearest row, or class mean, in a learned metric.

    Which of the two is chosen by accuracy on validation. The metric is `learned_metric`'s, from the training rows.

    Raises:
        DataError: (from `fit_predict`) fewer than 10 classes with two rows.
    """

    @property
    def name(self) -> str:
        """Always the same."""
        return "metric"

    def fit_predict(
        self,
        train_x: Tensor,
        train_y: Int[Tensor, " n"],
        validation_x: Tensor,
        validation_y: Int[Tensor, " m"],
        test_x: Tensor,
        *,
        n_classes: int,
        seed: int,
        device: torch.device | str,
    ) -> Int[Tensor, " t"]:
        """The class of the nearest known row, or of the nearest mean of a class."""
        train, validation, test = (
            F.normalize(rows, dim=1)
            for rows in learned_metric(train_x, train_y, train_x, validation_x, test_x, seed=seed, device=device)
        )
        means = torch.zeros(n_classes, train.shape[1]).index_add_(0, train_y.cpu(), train)
        best, answer = -1.0, torch.zeros(len(test), dtype=torch.long)
        for known, classes in ((train, train_y.cpu()), (F.normalize(means, dim=1), torch.arange(n_classes))):
            right = float((classes[(validation @ known.T).argmax(1)] == validation_y.cpu()).double().mean())
            if right > best:
                best, answer = right, classes[(test @ known.T).argmax(1)]
        return answer


def _within_whitened(
    rows: Float[Tensor, "n d"], identity: Int[Tensor, " n"]
) -> Callable[[float], Float[Tensor, "d k"]]:
    """For each shrinkage, the projection after which pictures of one identity spread alike in all directions."""
    rank = min(_MOST_DIRECTIONS, *rows.shape)
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    axes = directions[:rank].T
    seen = rows @ axes
    _, group = identity.unique(return_inverse=True)
    counts = torch.bincount(group)
    centers = torch.zeros(len(counts), rank, device=rows.device).index_add_(0, group, seen) / counts[:, None]
    within = torch.cov((seen - centers[group]).double().T, correction=0).reshape(rank, rank)
    values, vectors = torch.linalg.eigh(within)

    def projection(shrinkage: float) -> Tensor:
        spread = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
        mapping: Tensor = axes @ (vectors * spread.clamp(min=1e-12).rsqrt()).float()
        return mapping

    return projection


def _column(values: Labels, n: int, what: str) -> Int[Tensor, " n"]:
    column = torch.as_tensor(values)
    if column.is_floating_point() or column.shape != (n,):
        raise DataError(f"reidentify: expected {n} integer {what}, got {column.dtype} {tuple(column.shape)}")
    return column.long()


def _searched(
    rows: Float[Tensor, "n d"],
    queries: Int[Tensor, " q"],
    identity: Int[Tensor, " n"],
    camera: Int[Tensor, " n"] | None,
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """For each query the share of right answers among its nearest, and among all candidates; 0 where none is right."""
    is_same: Bool[Tensor, "q n"] = identity[queries, None] == identity
    is_candidate = torch.ones_like(is_same)
    is_candidate[torch.arange(len(queries), device=rows.device), queries] = False
    if camera is not None:
        is_candidate &= ~(is_same & (camera[queries, None] == camera))
    likeness = (rows[queries] @ rows.T).masked_fill(~is_candidate, -torch.inf)
    is_nearest = is_candidate & (likeness >= likeness.amax(1, keepdim=True) - _TIE)
    hit = (is_nearest & is_same).sum(1).double() / is_nearest.sum(1).clamp(min=1)
    chance = (is_candidate & is_same).sum(1).double() / is_candidate.sum(1).clamp(min=1)
    return hit, chance


def _bootstrap(
    hits: NDArray[np.float64], chances: NDArray[np.float64], group: NDArray[np.int64], *, seed: int, resamples: int
) -> tuple[float, float, float]:
    """Interval of the share of hits, and lower end of its difference to chance, drawing whole identities."""
    n = int(group.max()) + 1
    totals = np.stack([np.bincount(group, weights, minlength=n) for weights in (hits, hits - chances, None)])
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) @ totals.T
    tail = 50.0 * (1.0 - _LEVEL)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 2], [tail, 100.0 - tail])
    return float(low), float(high), float(np.percentile(drawn[:, 1] / drawn[:, 2], tail))
