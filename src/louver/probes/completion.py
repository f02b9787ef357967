"""Model completion: how well someone without the cloud half does the task itself, from a few labeled features."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from louver.errors import ConfigError, DataError
from louver.probes.base import Labels, checked_features, coded
from louver.probes.tail import scores_of, small_tail, tail_of, train_tail

__all__ = ["Completion", "completion"]

_STUDENT_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's distribution for 1 to 10 degrees of freedom, as in any printed table."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Accuracy on `n` test rows of a tail trained on `count` labeled examples of each class.

    `accuracy` is the mean over `repeats`, each with other examples and other first weights; `low`..`high` is the 95 %
    interval of that mean by Student's distribution, kept inside [0,1]; `chance` is the share of the commonest test
    class.
    """

    count: int
    n_labels: int
    n_classes: int
    n: int
    accuracy: float
    low: float
    high: float
    chance: float
    repeats: tuple[float, ...]
    seconds: float
    seed: int


def completion(
    cloud: nn.Module | None,
    features: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    *,
    counts: Sequence[int] = (5, 20, 100),
    repeats: int = 3,
    keeps_weights: bool = False,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Completion, ...]:
    """One result for each count of labeled examples **per class**: accuracy on the task, with interval over repeats.

    `features` and `labels` have the roles "train" (where examples are drawn, and the scale of all features is known
    from) and "test". The tail is `cloud` with fresh weights in every layer; with `keeps_weights` only the last layer
    is fresh, as for an attacker who holds the cloud half of another task. None, or a cloud whose last Linear does not
    make its output, gives the small network of `TailProbe`. Training takes a fixed number of steps and its last
    weights: an attacker with so few labels has none to choose an epoch by.

    Raises:
        ConfigError: a knob outside its range, or fewer than 2 repeats (which have no interval).
        DataError: a class of train with fewer examples than the largest count, the cloud half does not take the
            features, or roles and labels as in `probe`.
        AttackError: a tail diverged.

    Source: Fu et al., "Label inference attacks against vertical federated learning" (USENIX Security 2022);
    we differ: the tail learns from the labeled features alone, without their semi-supervised part.

    Example:
        >>> x = {role: torch.randn(80, 12) for role in ("train", "test")}
        >>> y = {role: (rows[:, 0] > 0).long() for role, rows in x.items()}
        >>> [(found.count, found.n_labels) for found in completion(None, x, y, counts=(5, 20), steps=20)]
        [(5, 10), (20, 40)]
    """
    if not counts or min(counts) < 1 or repeats < 2:
        raise ConfigError(f"completion: expected counts of 1 or more and 2 repeats or more, got {counts} and {repeats}")
    if steps < 1 or batch_size < 2 or not learning_rate > 0:
        raise ConfigError(
            "completion: expected steps of 1 or more, batch_size of 2 or more and a positive learning_rate, "
            f"got {steps}, {batch_size} and {learning_rate}"
        )
    missing = [role for role in ("train", "test") if role not in features or role not in labels]
    if missing:
        raise DataError(f"completion: expected features and labels of train and test, {', '.join(missing)} missing")
    x = {role: checked_features(features[role], role) for role in ("train", "test")}
    y, known = coded({role: labels[role] for role in ("train", "test")}, x, classes=classes)
    sizes = torch.bincount(y["train"], minlength=len(known))
    rarest = int(sizes.argmin())
    if int(sizes[rarest]) < max(counts):
        label = int(known[rarest])
        name = classes[label] if classes and 0 <= label < len(classes) else str(label)
        raise DataError(
            f"train: expected {max(counts)} examples of each class, got {int(sizes[rarest])} of {name}; "
            "give more examples or smaller counts"
        )
    results = []
    for count in counts:
        start = time.perf_counter()
        shares = []
        for repeat in range(repeats):
            own_seed = int(np.random.SeedSequence((seed, count, repeat)).generate_state(1)[0])
            rows = _drawn(y["train"], len(known), count, own_seed)
            tail = None
            if cloud is not None:
                tail = tail_of(cloud, x["train"], n_classes=len(known), seed=own_seed, is_fresh=not keeps_weights)
            if tail is None:
                tail = small_tail(x["train"], n_classes=len(known), seed=own_seed)
            tail = tail.to(device)
            train_tail(
                tail,
                x["train"][rows],
                y["train"][rows],
                epochs=-(-steps // max(1, len(rows) // batch_size)),
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=own_seed,
                device=device,
                learns_statistics=not keeps_weights,
            )
            guess = scores_of(tail, x["test"], device).argmax(1)
            shares.append(float((guess == y["test"]).double().mean()))
        mean, half = float(np.mean(shares)), _half_width(shares)
        results.append(
            Completion(
                count=count,
                n_labels=count * len(known),
                n_classes=len(known),
                n=len(y["test"]),
                accuracy=mean,
                low=max(mean - half, 0.0),
                high=min(mean + half, 1.0),
                chance=float(torch.bincount(y["test"]).max()) / len(y["test"]),
                repeats=tuple(shares),
                seconds=time.perf_counter() - start,
                seed=seed,
            )
        )
    return tuple(results)


def _drawn(labels: Int[Tensor, " n"], n_classes: int, count: int, seed: int) -> Int[Tensor, " m"]:
    """Rows of `count` examples of each class, without repetition."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in range(n_classes)])


def _half_width(shares: Sequence[float]) -> float:
    degrees = len(shares) - 1
    if degrees <= len(_STUDENT_95):
        quantile = _STUDENT_95[degrees - 1]
    else:
        z = NormalDist().inv_cdf(0.975)
        quantile = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return float(quantile * np.std(shares, ddof=1) / len(shares) ** 0.5)
