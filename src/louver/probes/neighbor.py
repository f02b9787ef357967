"""The nearest-neighbor probe: what lies close together says the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import ConfigError
from louver.probes.base import standardized

__all__ = ["NeighborProbe", "votes"]

_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class NeighborProbe:
    """The class of most of the k nearest training rows, by standardized columns.

    k and the distance (cosine or Euclidean) are chosen by accuracy on validation, the first of equals: fewer
    neighbors, then cosine. Of classes with as many votes, the one whose voters are nearer (by rank) is taken. A k above
    the number of training rows means all of them.

    Raises:
        ConfigError: a count of neighbors below 1.

    Source: Cover, Hart, "Nearest neighbor pattern classification" (IEEE Trans. Information Theory 1967).
    """

    counts: tuple[int, ...] = (1, 3, 5, 9, 17, 33)

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ConfigError(f"NeighborProbe: expected counts of 1 or more, got {self.counts}")

    @property
    def name(self) -> str:
        """Always the same."""
        return "neighbor"

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
        """The vote under the count and the distance that do best on validation; `seed` is not needed."""
        train, validation, test = standardized(train_x, validation_x, test_x, device=device)
        train_y, validation_y = train_y.to(device), validation_y.to(device)
        most = min(max(self.counts), len(train))
        best, choice = -1.0, (True, 1)
        found = _nearest(train, validation, most)
        for count in sorted(self.counts):
            for is_cosine in (True, False):
                guess = votes(train_y[found[is_cosine][:, :count]], n_classes)
                accuracy = float((guess == validation_y).double().mean())
                if accuracy > best:
                    best, choice = accuracy, (is_cosine, count)
        is_cosine, count = choice
        neighbors = _nearest(train, test, most)[is_cosine][:, :count]
        return votes(train_y[neighbors], n_classes).cpu()


def votes(labels: Int[Tensor, "n k"], n_classes: int) -> Int[Tensor, " n"]:
    """The commonest label of each row; of equals, the one at the lower sum of ranks, nearest first."""
    members = F.one_hot(labels, n_classes).double()
    count = members.shape[1]
    nearness = torch.arange(count, 0, -1, dtype=members.dtype, device=members.device)
    # The sum of all ranks is below (count + 1)², so that no number of ranks outweighs one vote.
    return (members.sum(1) + (members * nearness[:, None]).sum(1) / (count + 1) ** 2).argmax(1)


def _nearest(known: Float[Tensor, "n d"], query: Float[Tensor, "m d"], most: int) -> dict[bool, Int[Tensor, "m k"]]:
    """Of each query, rows of the `most` nearest known, nearest first: by cosine (True) and by distance (False)."""
    squares = known.square().sum(1)
    lengths = squares.sqrt().clamp(min=1e-12)
    by_cosine, by_distance = [], []
    for part in query.split(_QUERIES_AT_ONCE):
        products = part @ known.T
        by_cosine.append((products / lengths).topk(most).indices)
        by_distance.append((2 * products - squares).topk(most).indices)
    return {True: torch.cat(by_cosine), False: torch.cat(by_distance)}
