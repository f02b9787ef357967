"""What every measure of features asks of a batch before it looks at it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from louver.errors import DataError

__all__ = ["FLAT", "checked_rows"]

FLAT = 1e-6
"""A spread below this share of the level is rounding of float32."""


def checked_rows(
    batch: Tensor, what: str, *, least: int = 2, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n d"]:
    """The batch as one row each, without gradients, in `dtype`.

    Raises:
        DataError: fewer than `least` rows, rows without elements, NaN or infinity.
    """
    if batch.ndim < 2 or len(batch) < least or batch[0].numel() == 0:
        raise DataError(f"{what}: expected {least} rows or more, one an image, got shape {tuple(batch.shape)}")
    rows = batch.detach().flatten(1).to(dtype)
    if not bool(torch.isfinite(rows).all()):
        raise DataError(f"{what}: NaN or infinite values among the features; mend what made them")
    return rows
