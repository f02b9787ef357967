"""Rows of features: what every measure asks of them, and their products."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from louver.errors import DataError

__all__ = ["FLAT", "checked_rows", "gram"]

FLAT = 1e-6
"""A spread below this share of the level is rounding of float32."""


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        (rows,) = ctx.saved_tensors
        out: Tensor = (gradient + gradient.mT) @ rows
        return out


def gram(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    """Products of all pairs of rows; its gradient is one product, where autograd takes two, one for each factor."""
    found: Tensor = _Gram.apply(rows)
    return found


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
