"""Mutual information of images and features, by a critic that tells true pairs from chance ones."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from louver.errors import ConfigError, DataError
from louver.measures.rows import FLAT, checked_rows
from louver.stochastic import drawing_from

__all__ = ["Estimate", "mutual_information"]

_LEAST_ROWS = 50  # a fifth of them is held out twice
_SQUASH = 4.0
_TRUSTS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_CAPS = (0.25, 0.5, 0.75, 1.0)  # shares of the true pairs that score below


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A lower bound of mutual information in nats: mean over seeds, its 95 % interval, and each seed's value.

    `ceiling` is the most that the held-out images can show; with `is_saturated` some seed reached it, and the truth
    may be anywhere above.
    """

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    ceiling: float
    n_images: int
    n_held_out: int

    @property
    def is_saturated(self) -> bool:
        """Whether a seed reached the ceiling."""
        return max(self.per_seed) >= self.ceiling


def mutual_information(
    x: Float[Tensor, "n ..."],
    z: Float[Tensor, "m ..."],
    *,
    seeds: int = 3,
    steps: int = 800,
    batch_size: int = 256,
    components: int = 64,
    width: int = 64,
    learning_rate: float = 2e-3,
    decay: float = 0.5,
    seed: int = 0,
) -> Estimate:
    """A lower bound of the mutual information of images and features, in nats, by a trained critic (MINE).

    Each seed splits the images anew: 60 % train the critic, 20 % choose when it was best and how far to trust it (a
    factor on its scores, and where they are cut off), 20 % give the value. Both sides are standardized per element,
    projected to their first `components` principal components on the training part, whitened, and squashed
    (4 tanh(·/4), so that no outlier rules); that can only lose information. A critic that does no better than chance
    counts as 0, so a value falls below 0 only by the chance of the last 20 %. The interval is Student's over seeds,
    and says nothing of how far below the truth all of them are. On correlated Gaussians with 2000 rows it finds 0.16 of
    0.14 nats, 1.5 of 1.7, and 7 of 16.6 in 20 dimensions: the more there is, the more it misses, so that a ratio of
    large values tells less than there is to tell. More images, or components, find more.

    A value is cut off at `Estimate.ceiling`, the logarithm of the number of held-out pairs. Features of a noise-free
    edge have infinite information about images, and the bound says only what this critic finds of it.

    Raises:
        DataError: fewer than 50 images, batches of different length, NaN or infinity.
        ConfigError: a knob outside its range.

    Source: Belghazi et al., "Mutual information neural estimation" (ICML 2018): Donsker-Varadhan bound, unbounded
    critic, gradient corrected by a moving average (section 3.2). The code published for SiftFunnel ends its
    critic in a sigmoid, with which no estimate exceeds 1 nat; ours is unbounded. We differ from MINE: the critic is
    f(x)·g(z) + a(x) + b(z), so that all pairs of a batch stand for the product of marginals, and the average may forget
    fast (`decay`); stopping and values are on held-out images; the ceiling follows McAllester, Stratos, "Formal
    limitations on the measurement of mutual information" (AISTATS 2020).

    >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    >>> mutual_information(x, x.sign(), steps=300).value > 0.7
    True
    """
    _check_knobs(seeds=seeds, steps=steps, batch_size=batch_size, components=components, width=width)
    if seeds < 2 or batch_size < 2:
        raise ConfigError(
            f"mutual information: expected 2 seeds and a batch of 2 or more, got {seeds} and {batch_size}"
        )
    if not learning_rate > 0 or not 0 <= decay < 1:
        raise ConfigError(
            "mutual information: expected a positive learning_rate and a decay from 0 to below 1, "
            f"got {learning_rate} and {decay}"
        )
    if len(x) != len(z):
        raise DataError(f"mutual information: expected as many images as features, got {len(x)} and {len(z)}")
    left, right = (checked_rows(side, "mutual information", least=_LEAST_ROWS).to(z.device) for side in (x, z))
    n_held_out = len(left) // 5
    ceiling = math.log(n_held_out * (n_held_out - 1))
    values = []
    for own_seed in range(seed, seed + seeds):
        with drawing_from(own_seed), torch.enable_grad():
            order = torch.randperm(len(left)).to(left.device)
            parts = order[2 * n_held_out :], order[n_held_out : 2 * n_held_out], order[:n_held_out]
            sides = [_whitened(side, parts[0], components) for side in (left, right)]
            pairs = [(sides[0][part], sides[1][part]) for part in parts]
            value = 0.0
            if sides[0].shape[1] and sides[1].shape[1]:
                critic = _Critic(sides[0].shape[1], sides[1].shape[1], width).to(left.device)
                value = _train_critic(critic, pairs, steps, batch_size, learning_rate, decay)
        values.append(min(value, ceiling))
    mean = sum(values) / seeds
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (seeds - 1))
    half = _student_quantile(seeds - 1) * spread / math.sqrt(seeds)
    return Estimate(
        value=mean,
        low=mean - half,
        high=mean + half,
        per_seed=tuple(values),
        ceiling=ceiling,
        n_images=len(left),
        n_held_out=n_held_out,
    )


class _Critic(nn.Module):
    """Scores of all pairs of two batches, (n, m): high where they may belong together."""

    def __init__(self, left_width: int, right_width: int, width: int) -> None:
        super().__init__()
        self.left, self.right = _Side(left_width, width), _Side(right_width, width)

    def forward(self, x: Float[Tensor, "n p"], z: Float[Tensor, "m q"]) -> Float[Tensor, "n m"]:
        """One score a pair."""
        (f, a), (g, b) = self.left(x), self.right(z)
        scores: Tensor = f @ g.T / math.sqrt(f.shape[1]) + a + b.T
        return scores


class _Side(nn.Module):
    """A vector and a number for each row; linear in the row plus what a small network adds."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.straight, last = nn.Linear(inputs, width + 1), nn.Linear(width, width + 1)
        self.bent = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)
        # A critic that starts as products of its inputs starts close to 0, where the bound is tame.
        for tensor in (self.straight.bias, last.weight, last.bias):
            nn.init.zeros_(tensor)
        with torch.no_grad():
            self.straight.weight[-1].zero_()

    def forward(self, rows: Float[Tensor, "n p"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n 1"]]:
        """The vector and the number."""
        both = self.straight(rows) + self.bent(rows)
        return both[:, :-1], both[:, -1:]


def _train_critic(
    critic: _Critic,
    pairs: list[tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
    learning_rate: float,
    decay: float,
) -> float:
    """The held-out bound of the critic that was best on the second part of `pairs`; 0 if none was above 0 there."""
    (x, z), validation, held_out = pairs
    optimizer = torch.optim.AdamW(critic.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    best, best_trust, best_cap, best_state = 0.0, 0.0, 0.0, critic.state_dict()
    average: Tensor | None = None
    for step in range(steps):
        index = torch.randperm(len(x))[:batch_size].to(x.device)
        joint, log_mean = _bound_terms(critic(x[index], z[index]))
        now = log_mean.detach()
        if average is None or decay == 0:
            average = now
        average = torch.logaddexp(average + math.log(decay), now + math.log1p(-decay)) if decay else average
        # The gradient of mean(exp T) over its moving average, instead of over its biased value on this batch.
        loss = (log_mean - average).exp() - joint
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 32) == 0 or step + 1 == steps:
            with torch.no_grad():
                scores = critic(*validation)
            caps = torch.quantile(scores.diagonal(), scores.new_tensor(_CAPS)).tolist()
            value, trust, cap = max((_bound(scores, trust, cap), trust, cap) for trust in _TRUSTS for cap in caps)
            if value > best:
                best, best_trust, best_cap, best_state = value, trust, cap, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(best_state)
    with torch.no_grad():
        return _bound(critic(*held_out), best_trust, best_cap) if best > 0 else 0.0


def _bound(scores: Float[Tensor, "n n"], trust: float, cap: float) -> float:
    """The bound that `trust` times the scores give, cut off at `cap` and far below it.

    A critic that is cut off is a critic, so this is a bound as well, but one that no single row can ruin: neither by a
    false pair that scores beyond all true ones, nor by a true pair that scores as if it could not be.
    """
    floor = cap - 2 * math.log(len(scores) * (len(scores) - 1))
    joint, log_mean = _bound_terms(trust * scores.clamp(floor, cap))
    return float(joint - log_mean)


def _bound_terms(scores: Float[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    """Mean score of true pairs; logarithm of the mean of exp(score) of the others. Their difference is the bound."""
    n = len(scores)
    others = scores.masked_fill(torch.eye(n, dtype=torch.bool, device=scores.device), -math.inf)
    top = others.detach().amax()
    # Cut off where nothing counts any more: numbers too small for float32 make a processor several times slower.
    total = (others - top).clamp(min=-60).exp().sum()
    return scores.diagonal().mean(), total.log() + top - math.log(n * (n - 1))


def _whitened(rows: Float[Tensor, "n d"], fitted_on: Int[Tensor, " k"], components: int) -> Float[Tensor, "n p"]:
    """All rows in the leading principal components of some, each of deviation 1 there; without those that are 0."""
    part = rows[fitted_on]
    deviation, mean = torch.std_mean(part, dim=0)
    is_alive = deviation > FLAT * part.abs().amax(0)
    if not bool(is_alive.any()):
        return rows[:, :0]
    rows = ((rows - mean) / deviation)[:, is_alive]
    part = rows[fitted_on]
    most = min(components, *part.shape)
    if min(part.shape) <= 256:
        _, values, directions = torch.linalg.svd(part, full_matrices=False)
        directions = directions.T
    else:
        _, values, directions = torch.svd_lowrank(part, q=min(most + 16, *part.shape), niter=3)
    values, directions = values[:most], directions[:, :most]
    is_kept = values > 1e-4 * values[0]
    scale = math.sqrt(len(part) - 1) / values[is_kept]
    return _SQUASH * torch.tanh(rows @ directions[:, is_kept] * (scale / _SQUASH))


def _student_quantile(degrees: int, level: float = 0.95) -> float:
    """The t that holds `level` of Student's distribution between -t and t.

    Source: Abramowitz, Stegun, "Handbook of mathematical functions", 26.7.3 and 26.7.4; inverted by bisection.
    """

    def share(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        is_odd = degrees % 2 == 1
        term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
        for k in range(1 if is_odd else 0, degrees - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if is_odd else total

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < level else (low, middle)
    return high


def _check_knobs(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"mutual information: expected {name} of 1 or more, got {count}")
