"""Whether noisy features can be traced to their owner: rank privacy, log-rank privacy, re-identification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from louver.errors import ConfigError, DataError
from louver.measures.rows import checked_rows

__all__ = ["LogRankPrivacy", "RankPrivacy", "log_rank_privacy", "rank_privacy"]

_CHUNK_ELEMENTS = 8_000_000
_TIE = 1e-10  # squared distances in float64 that differ by less than this share are the same
_BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class RankPrivacy:
    """How well points hide among candidates: `privacy` from 0 (identified) to 1, with `chance` for points told blindly.

    `top1` is the share of points whose likeliest candidate is the true one; `ranks` and `hits` are one value a point,
    for intervals.
    """

    privacy: float
    top1: float
    chance: float
    ranks: NDArray[np.float64]
    hits: NDArray[np.float64]


def rank_privacy(
    clean: Float[Tensor, "n ..."], noisy: Float[Tensor, "m ..."], noise_std: float | Float[Tensor, " d"]
) -> RankPrivacy:
    """Mean rank of the true point when all `clean` points are sorted by how likely each became `noisy[i]`, over n.

    Rank 0 is the likeliest. `noise_std` is the deviation of the Gaussian noise: with one number it cancels, and
    candidates are sorted by distance; with one a dimension they are sorted by distance in units of it. Candidates that
    are equally likely share the mean of their ranks (and the hit), so that constant features give chance, (n - 1) / 2n.

    Raises:
        DataError: fewer than 2 points, shapes that differ, NaN or infinity.
        ConfigError: a negative deviation, or one of 0 among several.

    Source: Osia et al. (arXiv 1703.02952), as in their released code; equal shares among ties are ours (a sort that
    breaks ties by position would call constant features identified, or private, as it happens).

    >>> clean = torch.arange(7.0).unsqueeze(1)
    >>> found = rank_privacy(clean, clean + 0.1, 0.1)
    >>> found.privacy, found.top1
    (0.0, 1.0)
    """
    if clean.shape != noisy.shape:
        raise DataError(
            f"rank privacy: expected a noisy point for each clean one, got {tuple(clean.shape)}, {tuple(noisy.shape)}"
        )
    known, seen = (checked_rows(points, "rank privacy", dtype=torch.float64) for points in (clean, noisy))
    deviation = torch.as_tensor(noise_std, dtype=torch.float64, device=known.device)
    if deviation.ndim:
        if deviation.shape != known.shape[1:] or not bool((deviation > 0).all()):
            raise ConfigError(
                f"rank privacy: expected one positive deviation for each of {known.shape[1]} dimensions, or one number"
            )
        known, seen = known / deviation, seen / deviation
    elif not 0 <= float(deviation) < math.inf:
        raise ConfigError(f"rank privacy: expected a noise_std of 0 or more, got {noise_std}")
    n = len(known)
    ranks, hits = [], []
    for start in range(0, n, _step(n)):
        distances, tie = _squared_distances(seen[start : start + _step(n)], known)
        own = distances.diagonal(offset=start).unsqueeze(1)
        nearer = (distances < own - tie).sum(1)
        level = ((distances - own).abs() <= tie).sum(1)
        ranks.append((nearer + (level.double() - 1) / 2) / n)
        hits.append((nearer == 0) / level.double())
    rank, hit = (torch.cat(parts).cpu().numpy() for parts in (ranks, hits))
    return RankPrivacy(
        privacy=float(rank.mean()), top1=float(hit.mean()), chance=(n - 1) / (2 * n), ranks=rank, hits=hit
    )


@dataclass(frozen=True, kw_only=True)
class LogRankPrivacy:
    """How well identities hide: `privacy` from 0 (always found first) to 1 (always last); `chance` for blind guesses.

    `top1` is the share of points whose likeliest identity is the true one, `bandwidth` that of the kernels;
    `log_ranks` and `hits` are one value a point, for intervals.
    """

    privacy: float
    top1: float
    chance: float
    bandwidth: float
    log_ranks: NDArray[np.float64]
    hits: NDArray[np.float64]


def log_rank_privacy(
    known: Float[Tensor, "n ..."],
    known_identities: Int[Tensor, " k"],
    observed: Float[Tensor, "m ..."],
    observed_identities: Int[Tensor, " j"],
    *,
    noise_std: float = 0.0,
    bandwidth: float | None = None,
) -> LogRankPrivacy:
    """Mean of log(rank of the true identity) / log(number of identities) over the observed features.

    Identities are sorted by the density of a Gaussian kernel estimate on their `known` features (clean); rank 1 is the
    densest. Noise of deviation `noise_std` on `observed` widens the kernels, as an attacker who knows it would. Without
    a bandwidth, the one that finds the known features' own identities best, each without itself, is taken from a grid
    around the median distance to the nearest neighbour. Ties share the mean of their ranks. Chance is the mean of
    log(r) / log(K) over r = 1..K, well above one half: 0.66 for 10 identities, 0.79 for 100.

    Raises:
        DataError: fewer than 2 identities, an observed one that is not known, identities of another length, points
            of another width, NaN or infinity; no identity with two known features, when a bandwidth must be found.
        ConfigError: a bandwidth that is not positive, a negative noise_std.

    Source: Osia et al., "Deep private-feature extraction" (arXiv 1802.03151), density estimate as in their code;
    choosing the bandwidth for the attacker, adding the noise to it, and ties are ours.

    >>> known = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> log_rank_privacy(known, torch.tensor([0, 0, 1, 1]), known + 0.01, torch.tensor([0, 0, 1, 1])).privacy
    0.0
    """
    points = checked_rows(known, "log-rank privacy", dtype=torch.float64)
    seen = checked_rows(observed, "log-rank privacy", least=1, dtype=torch.float64)
    if known_identities.shape != points.shape[:1] or observed_identities.shape != seen.shape[:1]:
        raise DataError(
            f"log-rank privacy: expected an identity for each of {len(points)} known and {len(seen)} observed "
            f"features, got {tuple(known_identities.shape)} and {tuple(observed_identities.shape)}"
        )
    if points.shape[1] != seen.shape[1]:
        raise DataError(f"log-rank privacy: features of width {points.shape[1]} are known, {seen.shape[1]} observed")
    if not 0 <= noise_std < math.inf or (bandwidth is not None and not 0 < bandwidth < math.inf):
        raise ConfigError(
            f"log-rank privacy: expected a positive bandwidth and a noise_std of 0 or more, got {bandwidth}, "
            f"{noise_std}"
        )
    names, groups = torch.unique(known_identities.to(points.device), return_inverse=True)
    wanted = observed_identities.to(points.device)
    if len(names) < 2 or not bool(torch.isin(wanted, names).all()):
        raise DataError(
            f"log-rank privacy: expected 2 identities or more and known features of every observed one, got "
            f"{len(names)} known and {int((~torch.isin(wanted, names)).sum())} observed features of unknown ones"
        )
    if bandwidth is None:
        bandwidth = _best_bandwidth(points, groups, len(names))
    width = math.hypot(bandwidth, noise_std)
    ranks, hits = _identity_ranks(seen, torch.searchsorted(names, wanted), points, groups, len(names), width)
    log_ranks = ranks.log() / math.log(len(names))
    return LogRankPrivacy(
        privacy=float(log_ranks.mean()),
        top1=float(hits.mean()),
        chance=math.lgamma(len(names) + 1) / (len(names) * math.log(len(names))),
        bandwidth=bandwidth,
        log_ranks=log_ranks.cpu().numpy(),
        hits=hits.cpu().numpy(),
    )


def _best_bandwidth(points: Tensor, groups: Tensor, n_groups: int) -> float:
    has_another = torch.bincount(groups, minlength=n_groups)[groups] > 1
    if not bool(has_another.any()):
        raise DataError("log-rank privacy: no identity has two known features; give more, or a bandwidth")
    nearest = []
    for start in range(0, len(points), _step(len(points))):
        distances, _ = _squared_distances(points[start : start + _step(len(points))], points)
        distances.diagonal(offset=start).fill_(math.inf)
        nearest.append(distances.amin(1))
    base = float(torch.cat(nearest).median().clamp(min=0).sqrt()) or float((points - points.mean(0)).norm(dim=1).mean())
    grid = [factor * (base or 1.0) for factor in _BANDWIDTHS]
    found = [
        float(
            _identity_ranks(points, groups, points, groups, n_groups, width, without_self=True)[0][has_another]
            .log()
            .mean()
        )
        for width in grid
    ]
    return grid[int(np.argmin(found))]


def _identity_ranks(
    seen: Float[Tensor, "m d"],
    wanted: Int[Tensor, " m"],
    points: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    n_groups: int,
    width: float,
    *,
    without_self: bool = False,
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Rank of the wanted group among all, by kernel density at each seen point, and the hit; ties share."""
    ranks, hits = [], []
    for start in range(0, len(seen), _step(len(points))):
        rows = seen[start : start + _step(len(points))]
        exponents = -_squared_distances(rows, points)[0] / (2 * width**2)
        counts = torch.bincount(groups, minlength=n_groups).double().expand(len(rows), -1)
        if without_self:
            exponents.diagonal(offset=start).fill_(-math.inf)
            own_group = torch.nn.functional.one_hot(groups[start : start + len(rows)], n_groups)
            counts = counts - own_group
        index = groups.expand(len(rows), -1)
        top = torch.full_like(counts, -math.inf).scatter_reduce_(1, index, exponents, "amax")
        finite_top = torch.where(top.isfinite(), top, 0.0)
        sums = torch.zeros_like(top).scatter_add_(1, index, (exponents - finite_top.gather(1, index)).exp())
        density = finite_top + sums.log() - counts.clamp(min=1).log()
        own = density.gather(1, wanted[start : start + len(rows)].unsqueeze(1))
        tie = 1e-9 * (1 + torch.where(own.isfinite(), own, 0.0).abs())
        denser = (density > own + tie).sum(1)
        level = ((density - own).abs() <= tie).sum(1).clamp(min=1)
        ranks.append(1 + denser + (level.double() - 1) / 2)
        hits.append((denser == 0) / level.double())
    return torch.cat(ranks), torch.cat(hits)


def _squared_distances(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m n"], Tensor]:
    """Squared distances in float64, and below which difference two of a row are the same, (m, 1)."""
    of_a, of_b = a.square().sum(1, keepdim=True), b.square().sum(1)
    return of_a + of_b - 2 * (a @ b.T), _TIE * (of_a + of_b.max())


def _step(n_columns: int) -> int:
    return max(1, _CHUNK_ELEMENTS // n_columns)
