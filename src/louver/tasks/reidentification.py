"""Finding the same vehicle or person again: embeddings, near each other when they show the same identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from louver.errors import ConfigError, DataError
from louver.stochastic import drawing_from
from louver.tasks.base import Criterion, answers, check_rows
from louver.tasks.ranking import Retrieval, retrieval
from louver.types import Images

__all__ = ["ReIdentification", "identity_batches"]


@dataclass(frozen=True, kw_only=True)
class ReIdentification:
    """Embeddings (n, d) that are close, by cosine distance, for images of the same identity in label column `column`.

    camera: label column of the camera; images of the query's identity and camera are no answer to it. None: no cameras.
    distractor: the identity that stands for "nobody that is asked for", as 0 does in Market-1501: wrong for every
    query, never a query, and not to be trained on. None: there are none.
    per_identity: images of an identity in a batch. identity_weight, triplet_weight: of the two terms of the loss.
    temperature: what the cosines with the class weights are divided by. margin: of the triplets, between distances
    (0 to 2) of embeddings of unit length.

    Raises:
        ConfigError: a value out of range.

    Source: triplets of the hardest positive and negative in batches of P identities × K images, Hermans et al., "In
    defense of the triplet loss" (2017), section 2; identity loss beside them as in Luo et al., "Bag of tricks" (CVPR
    workshops 2019). We differ: the identity loss is the normalized softmax (Zhai and Wu, BMVC 2019), and the triplets
    too are of unit length, so that training and evaluation compare embeddings in the same way; triplets that keep the
    margin are left out of the mean. Weights and margin are our choice.
    """

    column: str = "identity"
    camera: str | None = "camera"
    distractor: int | None = None
    per_identity: int = 4
    identity_weight: float = 1.0
    triplet_weight: float = 1.0
    temperature: float = 0.05
    margin: float = 0.3

    def __post_init__(self) -> None:
        rules = {
            "per_identity": ("2 or more", self.per_identity >= 2),
            "identity_weight": ("0 or more", 0 <= self.identity_weight < math.inf),
            "triplet_weight": ("0 or more", 0 <= self.triplet_weight < math.inf),
            "temperature": ("above 0", 0 < self.temperature < math.inf),
            "margin": ("0 to below 2", 0 <= self.margin < 2),
        }
        for what, (expected, holds) in rules.items():
            if not holds:
                raise ConfigError(f"{self.title}: expected {what} of {expected}, got {getattr(self, what)}")
        if not (self.identity_weight or self.triplet_weight):
            raise ConfigError(
                f"{self.title}: expected identity_weight or triplet_weight above 0, got 0 for both; there is no loss"
            )

    @property
    def title(self) -> str:
        """The column of identities."""
        return f"re-identification by {self.column!r}"

    @property
    def score(self) -> str:
        """Mean average precision decides between epochs."""
        return "mAP"

    def targets(self, images: Images) -> Int[Tensor, " n"]:
        """The identity of each image, as numbered in its label column; the criterion numbers them anew.

        Raises:
            DataError: no such label column, or no images.
        """
        identities = images.column(self.column)
        if not len(identities):
            raise DataError(f"{images.name}: expected images with label column {self.column!r}, got none")
        return torch.from_numpy(identities.astype(np.int64))

    def criterion(self, outputs: Float[Tensor, "n d"], targets: Int[Tensor, " m"], *, seed: int) -> Criterion:
        """Weighted sum of identity loss and triplet loss; it owns one class weight of length d for each identity.

        Label smoothing is that of the identity loss; the triplet loss has none. A batch without a pair of the same
        identity, or of one identity alone, has a triplet loss of 0.

        Raises:
            ConfigError: (also when called) the network does not give one embedding an image.
            DataError: an identity with one image only, fewer than two identities, or distractors; and, when called, an
                identity that is not among `targets`.
        """
        self.check(outputs)
        self._check_trainable(targets)
        return _MetricLoss(self, targets, outputs.shape[1], seed)

    def batches(self, targets: Tensor, batch_size: int, generator: torch.Generator) -> list[Int[Tensor, " rows"]]:
        """Batches as `identity_batches` makes them.

        Raises:
            DataError: as in `criterion`.
        """
        self._check_trainable(targets)
        return identity_batches(targets, batch_size, self.per_identity, generator)

    def evaluate(
        self, model: nn.Module, images: Images, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`mAP`, `rank1`, `rank5` (shares from 0 to 1), and counts; each image is a query to all others.

        rank1 and rank5 are the shares of queries with a true match among the first 1 and 5. `n` images; `n_queries`
        that were scored; `n_unmatched` queries left out, since no other camera saw their identity; `n_lone` of them
        that are the only image of their identity. What is ignored, and average precision, are as in `retrieval`.

        Raises:
            ConfigError: the network does not give one embedding an image.
            DataError: as `targets`, no such camera column, the network answers NaN, or no query has a true match.
        """
        found = self._retrieved(model, images, batch_size, device)
        counts = self.targets(images)[self._is_query(images)].unique(return_counts=True)[1]
        return {
            "mAP": float(found.average_precision.mean()),
            "rank1": float((found.first_hit <= 1).mean()),
            "rank5": float((found.first_hit <= 5).mean()),
            "n_queries": float(len(found.rows)),
            "n_unmatched": float(found.n_unmatched),
            "n_lone": float((counts == 1).sum()),
            "n": float(len(images)),
        }

    def per_image(
        self, model: nn.Module, images: Images, *, device: torch.device | str = "cpu"
    ) -> dict[str, NDArray[np.float64]]:
        """`mAP`, `rank1` and `rank5` of each query that was scored, not of each image.

        Raises:
            ConfigError, DataError: as `evaluate`.
        """
        found = self._retrieved(model, images, 256, device)
        return {
            "mAP": found.average_precision,
            "rank1": (found.first_hit <= 1).astype(np.float64),
            "rank5": (found.first_hit <= 5).astype(np.float64),
        }

    def _is_query(self, images: Images) -> Bool[Tensor, " n"]:
        identities = self.targets(images)
        return torch.ones(len(images), dtype=torch.bool) if self.distractor is None else identities != self.distractor

    def _retrieved(self, model: nn.Module, images: Images, batch_size: int, device: torch.device | str) -> Retrieval:
        identities = self.targets(images)
        cameras = None if self.camera is None else self._cameras(images)
        embeddings = answers(model, images, self.check, batch_size=batch_size, device=device)
        return retrieval(embeddings.float().to(device), identities, cameras, is_query=self._is_query(images))

    def check(self, outputs: Tensor) -> None:
        """Refuses outputs that are not one embedding an image.

        Raises:
            ConfigError: they are not.
        """
        expected = f"{self.title}: expected embeddings of shape (n, d)"
        check_rows(outputs, None, expected, "end the network with pooling and flattening")

    def _cameras(self, images: Images) -> Int[Tensor, " n"]:
        assert self.camera is not None
        try:
            return torch.from_numpy(images.column(self.camera).astype(np.int64))
        except DataError as error:
            raise DataError(f"{error}; if the images have no cameras, set camera to none") from error

    def _check_trainable(self, targets: Tensor) -> None:
        identities, counts = targets.unique(return_counts=True)
        lone = identities[counts == 1].tolist()
        if lone:
            others = f" (and {len(lone) - 1} more identities)" if len(lone) > 1 else ""
            raise DataError(
                f"{self.title}: expected 2 images or more of each identity to train on, got 1 of identity "
                f"{lone[0]}{others}; drop it from the training images, or add images of it"
            )
        if len(identities) < 2:
            raise DataError(
                f"{self.title}: expected 2 identities or more to train on, got {identities.tolist()}; add others"
            )
        if self.distractor is not None and bool((identities == self.distractor).any()):
            raise DataError(
                f"{self.title}: expected no distractors (identity {self.distractor}) to train on; "
                "drop them from the training images"
            )


class _MetricLoss(Criterion):
    """Both terms of `task`'s loss, for embeddings of length `width`."""

    identities: Tensor

    def __init__(self, task: ReIdentification, targets: Int[Tensor, " m"], width: int, seed: int) -> None:
        # Seconds to import, and only training needs it.
        from pytorch_metric_learning.losses import (  # type: ignore[import-untyped, unused-ignore]
            NormalizedSoftmaxLoss,
            TripletMarginLoss,
        )
        from pytorch_metric_learning.miners import BatchHardMiner  # type: ignore[import-untyped, unused-ignore]

        super().__init__()
        self.task = task
        self.register_buffer("identities", targets.unique())
        if task.identity_weight:
            with drawing_from(seed):
                self.classes = NormalizedSoftmaxLoss(len(self.identities), width, temperature=task.temperature)
        if task.triplet_weight:
            self.hardest = BatchHardMiner()
            self.triplets = TripletMarginLoss(margin=task.margin)

    def forward(
        self, outputs: Float[Tensor, "n d"], targets: Int[Tensor, " n"], *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        self.task.check(outputs)
        embeddings, numbers = outputs.float(), self._numbered(targets)
        total = embeddings.new_zeros(())
        if self.task.identity_weight:
            scores = self.classes.get_logits(embeddings)
            term = F.cross_entropy(scores, numbers, label_smoothing=label_smoothing)
            total = total + self.task.identity_weight * term
        if self.task.triplet_weight:
            term = self.triplets(embeddings, numbers, self.hardest(embeddings, numbers))
            total = total + self.task.triplet_weight * term
        return total

    def _numbered(self, targets: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        numbers = torch.searchsorted(self.identities, targets).clamp(max=len(self.identities) - 1)
        is_known = self.identities[numbers] == targets
        if not bool(is_known.all()):
            raise DataError(
                f"{self.task.title}: identity {int(targets[~is_known][0])} is none of the "
                f"{len(self.identities)} that the criterion was made for; make it from the targets of all training "
                "images"
            )
        return numbers


def identity_batches(
    identities: Int[Tensor, " n"], batch_size: int, per_identity: int, generator: torch.Generator
) -> list[Int[Tensor, " rows"]]:
    """The rows of each batch of one epoch: batches of about `batch_size` rows, `per_identity` of each identity in them.

    Every identity comes at least once, no row twice. An identity's rows are dealt in groups of `per_identity`, fewer
    (two at least) where the number of its rows asks for it, to different batches. Of an identity with more groups than
    there are batches, others sit out each epoch. A batch holds two identities or more, even if that makes it larger
    than `batch_size`. Needs two identities, and two rows of each.
    """
    _, place, counts = identities.unique(return_inverse=True, return_counts=True)
    n_groups = torch.minimum(-(-counts // per_identity), counts // 2)
    rows_per_group = len(identities) / int(n_groups.sum())
    n_batches = _n_batches(n_groups, min(max(2, round(batch_size / rows_per_group)), len(counts)))
    shuffled = torch.randperm(len(identities), generator=generator)
    rows_of = shuffled[place[shuffled].argsort(stable=True)].split(counts.tolist())
    groups = [
        group
        for number in torch.randperm(len(counts), generator=generator).tolist()
        for group in rows_of[number].tensor_split(int(n_groups[number]))[:n_batches]
    ]
    # An identity's groups are neighbors and no more than there are batches: no batch gets two of them.
    return [torch.cat(groups[first::n_batches]) for first in range(n_batches)]


def _n_batches(n_groups: Int[Tensor, " k"], per_batch: int) -> int:
    """The most batches of about `per_batch` groups, two at least, of which no batch holds two of one identity."""
    n = int(n_groups.sum())
    while True:
        dealt = int(n_groups.clamp(max=n).sum())
        fewer = max(1, min(round(dealt / per_batch), dealt // 2))
        if fewer >= n:
            return n
        n = fewer
