"""Whether a reconstruction is recognized: by the victim's own model, or by a search among the test images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from louver.errors import AttackError, DataError
from louver.measures.image import check_pair

__all__ = ["predicted", "recognized", "reidentified"]

_SEARCH_SIDE = 64
_SEARCH_CHUNK = 512
_NO_STRUCTURE = 1e-5  # a standard deviation of pixels below this is rounding
_TIE = 1e-6  # identical pictures differ by less than this in float32 products, different ones by more


def recognized(
    model: nn.Module,
    truth: Int[Tensor, " labels"] | Float[Tensor, "n c h w"],
    guess: Float[Tensor, "n c h w"],
    *,
    device: torch.device | str | None = None,
) -> Float[Tensor, " n"]:
    """1.0 for each reconstruction that `model` gives the label of its true image, else 0.0.

    `truth` holds the true labels, or the true images: then the label is what `model` makes of them. Chance is the share
    of the commonest label (1/K for K balanced classes); the floor's own value says what a know-nothing guess gets.
    The model runs in eval mode without gradients, and gets its modes back; images go to `device` chunk by chunk.

    Raises:
        DataError: images as in `check_pair`, labels of another length or outside of the model's classes.
        AttackError: the model's output on a reconstruction is not finite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 18 * 23, 5))
        >>> recognized(model, torch.arange(4), torch.rand(4, 3, 18, 23)).shape
        torch.Size([4])
    """
    if truth.is_floating_point():
        check_pair(truth, guess)
        labels, n_classes = predicted(model, truth, device=device)
    else:
        check_pair(guess, guess)
        labels, n_classes = truth, None
    found, n_found = predicted(model, guess, device=device)
    n_classes = n_classes or n_found
    if labels.shape != (len(guess),):
        raise DataError(f"expected {len(guess)} labels, one a reconstruction, got shape {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise DataError(
            f"expected labels in 0..{n_classes - 1}, the model's classes, "
            f"got {int(labels.min())}..{int(labels.max())}; "
            "give the label column that the model was trained on"
        )
    return (found == labels.to(found.device)).to(torch.float64)


def predicted(
    model: nn.Module, images: Float[Tensor, "n c h w"], *, device: torch.device | str | None = None, chunk: int = 256
) -> tuple[Int[Tensor, " n"], int]:
    """The class that `model` gives each image, (n,) int64, and the number of its classes.

    Raises:
        DataError: the output is not (n, classes).
        AttackError: the output is not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    labels, n_classes = [], 0
    try:
        model.eval()
        with torch.no_grad():
            for part in torch.split(images, chunk):
                scores = model(part if device is None else part.to(device))
                if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
                    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                    raise DataError(
                        f"expected a model that returns (n, classes) scores, got {shape}; "
                        "leave `recognized` out for a model that does not classify"
                    )
                if not torch.isfinite(scores).all():
                    raise AttackError("the victim's scores are NaN or infinite; they say nothing about recognition")
                labels.append(scores.argmax(dim=1))
                n_classes = scores.shape[1]
    finally:
        for module, is_training in modes:
            module.training = is_training
    return torch.cat(labels), n_classes


def reidentified(
    pool: Float[Tensor, "m c h w"], guess: Float[Tensor, "n c h w"], *, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """For each reconstruction: 1.0 if its true image is its nearest in the pool, else 0.0; and the true image's rank.

    `pool[i]` is the true image of `guess[i]`; images after the first n only make the search harder. Rank 1 is the
    nearest. Chance is 1/m for a hit and (m + 1)/2 for the rank. Distance is Euclidean between pixels that are
    standardized per image (brightness and contrast do not count), after area averaging to at most 64 pixels a side.
    True images that are the same picture count as one. A guess without any structure points nowhere: rank m.

    Raises:
        DataError: fewer than 2 images in the pool, fewer than guesses, or as in `check_pair`.

    Example:
        >>> images = torch.rand(7, 3, 18, 23)
        >>> hits, ranks = reidentified(images, images / 2 + 0.1)
        >>> hits.shape, ranks.tolist()
        (torch.Size([7]), [1, 1, 1, 1, 1, 1, 1])
    """
    if pool.ndim != 4 or len(pool) < max(2, len(guess)):
        raise DataError(
            f"expected a pool of at least 2 images that starts with the true ones, got {tuple(pool.shape)} "
            f"for {len(guess)} reconstructions; a search among fewer finds nothing out"
        )
    check_pair(pool[: len(guess)], guess)
    if len(pool) > len(guess):
        check_pair(pool[len(guess) :], pool[len(guess) :])
    known, _ = _standardized(pool, device)
    ranks = []
    for start in range(0, len(guess), _SEARCH_CHUNK):
        part, has_structure = _standardized(guess[start : start + _SEARCH_CHUNK], device)
        # Unit vectors: the nearest is the one with the largest product.
        likeness = part @ known.T
        own = likeness.gather(1, torch.arange(start, start + len(part), device=likeness.device).unsqueeze(1))
        rank = 1 + (likeness > own + _TIE).sum(dim=1)
        ranks.append(torch.where(has_structure, rank, len(pool)))
    rank = torch.cat(ranks)
    return (rank == 1).to(torch.float64), rank


def _standardized(
    images: Float[Tensor, "n c h w"], device: torch.device | str | None
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Each image as a vector of mean 0 and length 1, and whether it had any structure to scale (else it is all 0)."""
    side = (min(images.shape[2], _SEARCH_SIDE), min(images.shape[3], _SEARCH_SIDE))
    vectors, structured = [], []
    for part in torch.split(images, _SEARCH_CHUNK):
        part = part.to(device or images.device, torch.float32)
        flat = F.adaptive_avg_pool2d(part, side).flatten(1)
        flat = flat - flat.mean(dim=1, keepdim=True)
        length = flat.norm(dim=1, keepdim=True)
        has_structure = length > _NO_STRUCTURE * flat.shape[1] ** 0.5
        vectors.append(torch.where(has_structure, flat / length.clamp_min(1e-12), 0.0))
        structured.append(has_structure.squeeze(1))
    return torch.cat(vectors), torch.cat(structured)
