"""The tail probe: the cloud half itself, with another last layer, trained to say something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from louver.devices import has_fast_bfloat16
from louver.errors import AttackError, ConfigError, DataError
from louver.stochastic import drawing_from

__all__ = ["TailProbe", "small_tail", "tail_of", "train_tail"]

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class TailProbe:
    """The cloud half with a new last layer, all of it trained on the features; the epoch is chosen on validation.

    The statistics of batch normalization stay as the cloud learned them, and dropout is off. Without a cloud half, or
    where its last Linear does not make its output, a small network stands in: two convolutions for (n, c, h, w), a
    hidden layer for all else, both on standardized channels. For reconstructions give no cloud: they are pictures, and
    with `is_half` are learned from in bfloat16 where that is fast, which tells their 256 levels apart. It would not see
    what is hidden in the last digits of features.

    Raises:
        ConfigError: a knob outside its range.
        DataError: (from `fit_predict`) the cloud half does not take features of this shape.
        AttackError: (from `fit_predict`) the loss became NaN or infinite.

    Source: fine-tuning as in Yosinski et al., "How transferable are features in deep neural networks?" (NeurIPS 2014);
    optimizer, schedule and the small network are our choice.
    """

    cloud: nn.Module | None = field(default=None, repr=False, compare=False)
    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 1e-3
    is_half: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ConfigError(
                "TailProbe: expected epochs of 1 or more, batch_size of 2 or more and a positive learning_rate, "
                f"got {self.epochs}, {self.batch_size} and {self.learning_rate}"
            )

    @property
    def name(self) -> str:
        """Always the same."""
        return "tail"

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
        """The class with the highest score of the trained tail, at its best epoch on validation."""
        tail = None if self.cloud is None else tail_of(self.cloud, train_x, n_classes=n_classes, seed=seed)
        if tail is None:
            tail = small_tail(train_x, n_classes=n_classes, seed=seed)
        tail = tail.to(device)
        best: tuple[float, float] | None = None
        state: dict[str, Tensor] = {}

        def judge() -> None:
            nonlocal best, state
            scores = scores_of(tail, validation_x, device)
            right = float((scores.argmax(1) == validation_y).double().mean())
            merit = (right, -float(F.cross_entropy(scores, validation_y)))
            if best is None or merit > best:
                best, state = merit, copy.deepcopy(tail.state_dict())

        train_tail(
            tail,
            train_x,
            train_y,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            device=device,
            is_half=self.is_half,
            after_epoch=judge,
        )
        tail.load_state_dict(state)
        return scores_of(tail, test_x, device).argmax(1)


def tail_of(
    cloud: nn.Module, features: Tensor, *, n_classes: int, seed: int, is_fresh: bool = False
) -> nn.Module | None:
    """A copy of `cloud` that gives (n, n_classes) scores, its last Linear new; None where no Linear makes its output.

    With `is_fresh` all its layers forget what they learned, and take features that are standardized by channel.

    Raises:
        DataError: the cloud half does not run on the features.
    """
    tail = copy.deepcopy(cloud).cpu().float().eval()
    sample = features[:2].detach().cpu().float()
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in tail.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            tail(sample)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the cloud half does not take features of shape {tuple(features.shape[1:])}: {error}; "
            "give the features of its own cut, or no cloud for reconstructions"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        return None
    with drawing_from(seed):
        if is_fresh:
            for module in tail.modules():
                if callable(forget := getattr(module, "reset_parameters", None)):
                    forget()
        old = tail.get_submodule(called[-1])
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, n_classes)
    if not called[-1]:
        tail = new
    else:
        parent, _, child = called[-1].rpartition(".")
        setattr(tail.get_submodule(parent), child, new)
    try:
        with torch.no_grad():
            scores = tail(sample)
    except (RuntimeError, ValueError):
        # The cloud ran before: what follows its last Linear counts on the old number of outputs.
        return None
    if not isinstance(scores, Tensor) or scores.shape != (len(sample), n_classes):
        return None
    if is_fresh:
        tail = nn.Sequential(_Standard(features), tail)
    return tail.requires_grad_(True)


def small_tail(features: Tensor, *, n_classes: int, seed: int) -> nn.Module:
    """A small network from features like these to (n, n_classes) scores, weights drawn from `seed`."""
    shape = features.shape[1:]
    with drawing_from(seed):
        if len(shape) == 3:
            stride = 2 if min(shape[1:]) >= 16 else 1
            return nn.Sequential(
                _Standard(features),
                nn.Conv2d(shape[0], 64, 3, stride=stride, padding=1),
                nn.GroupNorm(8, 64),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3, stride=stride, padding=1),
                nn.GroupNorm(8, 64),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(64 * 16, n_classes),
            )
        return nn.Sequential(
            _Standard(features), nn.Flatten(), nn.Linear(shape.numel(), 256), nn.ReLU(), nn.Linear(256, n_classes)
        )


def train_tail(
    tail: nn.Module,
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str,
    learns_statistics: bool = False,
    is_half: bool = False,
    after_epoch: Callable[[], None] | None = None,
) -> None:
    """Train `tail` in place by Adam under a one-cycle schedule, calling `after_epoch`; it ends in evaluation mode.

    `is_half` computes in bfloat16 where that is fast, with weights in float32. `learns_statistics` puts batch
    normalization and dropout in training mode, for a tail that starts from nothing.

    Raises:
        AttackError: the loss became NaN or infinite.
    """
    n_steps = max(1, len(x) // batch_size)
    optimizer = torch.optim.Adam(tail.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * n_steps)
    shuffle = torch.Generator().manual_seed(seed)
    kind = torch.device(device).type
    halved = torch.autocast(kind, torch.bfloat16, enabled=is_half and has_fast_bfloat16(torch.device(device)))
    with torch.enable_grad(), drawing_from(seed):
        for epoch in range(epochs):
            tail.train(learns_statistics)
            # Even parts of batch_size or more: a rest of one row would have no statistics.
            for rows in torch.randperm(len(x), generator=shuffle).tensor_split(n_steps):
                with halved:
                    scores = tail(x[rows].to(device))
                loss = F.cross_entropy(scores.float(), y[rows].to(device))
                if not bool(loss.isfinite()):
                    raise AttackError(f"tail: the loss became {loss.item()} in epoch {epoch + 1}; lower learning_rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            tail.eval()
            if after_epoch is not None:
                after_epoch()


def scores_of(tail: nn.Module, x: Tensor, device: torch.device | str) -> Float[Tensor, "n k"]:
    """Scores of a tail in evaluation mode, on the CPU.

    Raises:
        AttackError: NaN or infinity among them.
    """
    with torch.no_grad():
        scores = torch.cat([tail(part.to(device)).float().cpu() for part in x.split(_ROWS_AT_ONCE)])
    if not bool(torch.isfinite(scores).all()):
        raise AttackError("tail: its scores are NaN or infinite; a broken tail says nothing about privacy")
    return scores


class _Standard(nn.Module):
    """Features with the mean and deviation of each channel (of each column, for (n, d)) taken out."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        others = [i for i in range(features.ndim) if i != 1]
        known = features.detach().double()
        mean, deviation = known.mean(others, keepdim=True), known.std(others, correction=0, keepdim=True)
        varies = deviation > 1e-12 * mean.abs()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Float32, whatever the scale was."""
        return ((x - self.mean) * self.scale).float()
