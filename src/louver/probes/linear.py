"""The linear probe: multinomial logistic regression, solved to its optimum however ill-scaled the features are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import AttackError, ConfigError
from louver.probes.base import standardized

__all__ = ["LinearProbe", "logistic"]

_POOLED_COLUMNS = 256
"""A coarser grid has no more columns than this: few enough to learn from hundreds of rows."""
_FEW_COLUMNS = 32
"""As many columns alone show a label that one of them codes, where all together would drown it."""


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Finds labels that are coded linearly: logistic regression on standardized columns, ridge chosen on validation.

    Tried as they are, (n, c, h, w) also averaged over coarser grids (linear as well, but learned from fewer rows), and
    each of these also as the few columns whose class means differ most. Up to `width` columns nothing is dropped: a
    label on a direction 10⁻⁴ as large as the rest is found. Wider features are reduced to `width`: half are the columns
    whose class means differ most, half are coordinates on a random range of the training rows (all of their span where
    there are few rows). Limit: beyond `width` columns a label that no single column shows, on a direction far smaller
    than the rest, may be missed.

    Ridge and view are chosen by accuracy on validation, then by cross-entropy.

    Raises:
        ConfigError: a knob outside its range.
        AttackError: (from `fit_predict`) the fit gave NaN.

    Source: Alain, Bengio, "Understanding intermediate layers using linear classifier probes" (2016), for the
    probe; Halko, Martinsson, Tropp (SIAM Review 2011), algorithm 4.1, for the range. The strength of the ridge, the
    grids, the columns taken beside the range and the preconditioned solver are our choice.
    """

    ridges: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-9)
    width: int = 1024
    iterations: int = 40

    def __post_init__(self) -> None:
        if not self.ridges or min(self.ridges) <= 0:
            raise ConfigError(f"LinearProbe: expected positive ridges, got {self.ridges}")
        if self.width < 2 or self.iterations < 1:
            raise ConfigError(
                f"LinearProbe: expected width of 2 or more and iterations of 1 or more, got {self.width} and "
                f"{self.iterations}"
            )

    @property
    def name(self) -> str:
        """Always the same."""
        return "linear"

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
        """The class with the highest score under the ridge and the view that do best on validation."""
        train_y, validation_y = train_y.to(device), validation_y.to(device)
        best: tuple[float, float] | None = None
        views: list[tuple[Tensor, ...]] = []
        for view in zip(*(_views(x) for x in (train_x, validation_x, test_x)), strict=True):
            views += _narrowed(
                standardized(*view, device=device), train_y, n_classes=n_classes, width=self.width, seed=seed
            )
        for rows in views:
            train, validation, test = (x.double() for x in rows)
            gram = train.T @ train / len(train)
            start: tuple[Tensor, Tensor] | None = None
            for ridge in sorted(self.ridges, reverse=True):
                start = logistic(
                    train, train_y, ridge=ridge, n_classes=n_classes, iterations=self.iterations, start=start, gram=gram
                )
                weight, bias = start
                scores = validation @ weight + bias
                right = float((scores.argmax(1) == validation_y).double().mean())
                merit = (right, -float(F.cross_entropy(scores, validation_y)))
                if best is None or merit > best:
                    best, answer = merit, (test @ weight + bias).argmax(1)
        return answer.cpu()


def _views(x: Tensor) -> list[Tensor]:
    """The features, and those of a grid averaged over coarser ones: the finest of few columns, and all of it."""
    if x.ndim != 4 or x.shape[2] * x.shape[3] == 1:
        return [x]
    side = 1
    while x.shape[1] * (2 * side) ** 2 <= _POOLED_COLUMNS and 4 * side <= min(x.shape[2:]):
        side *= 2
    return [x, *(F.adaptive_avg_pool2d(x, grid) for grid in sorted({side, 1}, reverse=True))]


def logistic(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    *,
    ridge: float,
    n_classes: int,
    iterations: int = 60,
    start: tuple[Tensor, Tensor] | None = None,
    gram: Tensor | None = None,
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Weight and bias that minimize mean cross-entropy + ridge/2 · ‖weight‖²; the bias is free. float64 in and out.

    LBFGS in the coordinates of the Cholesky factor of xᵀx/n + ridge: there the curvature is nearly the same in all
    directions, small ones included. `start` is where to begin, `gram` is xᵀx/n where it is known.

    Raises:
        AttackError: NaN or infinity.
    """
    gram = x.T @ x / len(x) if gram is None else gram
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)).mT
    if start is None:
        moved = torch.zeros(x.shape[1], n_classes, dtype=x.dtype, device=x.device)
        bias = torch.zeros(n_classes, dtype=x.dtype, device=x.device)
    else:
        moved, bias = factor @ start[0], start[1].clone()
    moved.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [moved, bias],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        weight = torch.linalg.solve_triangular(factor, moved, upper=True)
        loss: Tensor = F.cross_entropy(x @ weight + bias, y) + ridge / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    weight = torch.linalg.solve_triangular(factor, moved.detach(), upper=True)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise AttackError(f"LinearProbe: the fit with ridge {ridge:g} is not finite; use a stronger one")
    return weight, bias.detach()


def _narrowed(
    rows: tuple[Tensor, ...], train_y: Int[Tensor, " n"], *, n_classes: int, width: int, seed: int
) -> list[tuple[Tensor, ...]]:
    """The rows, `width` columns at most, and, where there are many, their few most telling columns alone.

    Of wider rows remain columns whose class means differ most, and coordinates on a range of the training rows.
    """
    train = rows[0]
    if train.shape[1] <= _FEW_COLUMNS:
        return [rows]
    members = F.one_hot(train_y, n_classes).to(train.dtype)
    sizes = members.sum(0)
    means = members.T @ train / sizes.clamp(min=1)[:, None]
    order = (sizes[:, None] * means.square()).sum(0).argsort(descending=True, stable=True)
    few = tuple(x[:, order[:_FEW_COLUMNS]] for x in rows)
    if train.shape[1] <= width:
        return [rows, few]
    n_range = width // 2
    spanning = train
    if len(train) > n_range:
        generator = torch.Generator().manual_seed(seed)
        spanning = torch.randn(n_range, len(train), generator=generator).to(train) @ train
    basis = torch.linalg.qr(spanning.T).Q
    columns = order[: width - n_range]
    return [tuple(torch.cat([x[:, columns], x @ basis], 1) for x in rows), few]
