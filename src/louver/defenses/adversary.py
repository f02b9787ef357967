"""The proxy attacker that trains along: a small inverter, made to be cheap, whose failure a defense is paid for.

It is no judge. What a hardened split gives away is measured by `louver.attacks`, retrained from nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from louver.errors import ConfigError, DataError
from louver.measures.image import SSIM_MIN_SIDE, ssim
from louver.stochastic import drawing_from

__all__ = ["Adversary", "Inverter", "LaterAdversary"]

_MOST_POSITIONS = 600
"""Positions of the grid that the inverter works on: its cost hardly grows with the picture."""

_HALVED_SIDE = 48


class Inverter(nn.Module):
    """Pictures in (0,1), (n, c, h, w), from features (n, c, h, w) or (n, d) of the batch.

    Features are standardised with the batch's own means and deviations, so that an edge which merely shrinks them
    gains nothing. All convolutions run on one coarse grid, whose positions each paint a block of pixels.

    Raises:
        ConfigError: a `width` below 8.
        DataError: (from `forward`) a batch of one, which has no deviation to standardise by.
    """

    def __init__(
        self, feature_shape: tuple[int, ...], image_shape: tuple[int, int, int], *, width: int = 32, blocks: int = 2
    ) -> None:
        super().__init__()
        if width < 8 or blocks < 0:
            raise ConfigError(f"inverter: expected a width of 8 or more and 0 or more blocks, got {width}, {blocks}")
        channels, height, image_width = image_shape
        self.block = 2
        while self.block < 8 and height * image_width > _MOST_POSITIONS * self.block**2:
            self.block *= 2
        self.grid = (-(-height // self.block), -(-image_width // self.block))
        self.image_size = (height, image_width)
        self.enter = _entrance(feature_shape, self.grid, width)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks))
        self.leave = nn.Conv2d(width, channels * self.block**2, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Tensor) -> Float[Tensor, "n c h w"]:
        """Guesses at the pictures."""
        height, width = self.image_size
        return F.pixel_shuffle(self.blocks(features), self.block)[:, :, :height, :width]

    def blocks(self, features: Tensor) -> Float[Tensor, "n k h2 w2"]:
        """The same guesses, with the pixels of each block as channels."""
        if len(features) < 2:
            raise DataError(
                f"expected a batch of 2 images or more for an adversary, got {len(features)}; raise batch_size"
            )
        if features.ndim != 4:
            features = features.flatten(1)
        x = self.enter(F.batch_norm(features, None, None, training=True))
        if x.shape[2:] != torch.Size(self.grid):
            x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        for first, second in zip(self.body[::2], self.body[1::2], strict=True):
            x = x + second(F.relu(first(F.relu(x))))
        return torch.sigmoid(self.leave(F.relu(x)).float())


def _entrance(feature_shape: tuple[int, ...], grid: tuple[int, int], width: int) -> nn.Module:
    """From features to `width` channels on about `grid`: by patches where finer, by painting blocks where coarser."""
    if len(feature_shape) == 3:
        channels, height, feature_width = feature_shape
        patch = max(1, min(height // grid[0], feature_width // grid[1]))
        if patch > 1:
            return nn.Conv2d(channels, width, patch, stride=patch)
        growth = max(grid[0] / height, grid[1] / feature_width)
        if growth <= 4:
            up = max(1, round(growth))
            enter = nn.Conv2d(channels, width * up**2, 3, padding=1)
            return nn.Sequential(enter, nn.PixelShuffle(up)) if up > 1 else enter
    coarse = (-(-grid[0] // 2), -(-grid[1] // 2))
    spread = nn.Linear(math.prod(feature_shape), width * coarse[0] * coarse[1])
    return nn.Sequential(nn.Flatten(), spread, nn.Unflatten(1, (width, *coarse)))


class Adversary(nn.Module):
    """An inverter and its Adam. `step` trains it; `error` says how far it is off, and teaches the edge, not it.

    measure: "mse", the mean squared error; "ssim", 1 - SSIM, at half size for pictures of 48 pixels or more, since SSIM
    of whole ones would cost more than the networks; "relative", the squared error as a share of the batch's
    variance around its mean picture: 1 is knowing nothing, whatever the pictures.

    Raises:
        ConfigError: a knob outside its range, or SSIM for pictures without a whole window.
    """

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        *,
        width: int = 32,
        measure: Literal["mse", "ssim", "relative"] = "mse",
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if measure not in ("mse", "ssim", "relative"):
            raise ConfigError(f"adversary: no measure {measure!r}; legal: mse, ssim, relative")
        if measure == "ssim" and min(image_shape[1:]) < SSIM_MIN_SIDE:
            raise ConfigError(
                f"adversary: SSIM needs pictures of {SSIM_MIN_SIDE} pixels a side, got {image_shape[1:]}; take mse"
            )
        if not 0 < learning_rate < math.inf:
            raise ConfigError(f"adversary: expected a learning_rate above 0, got {learning_rate}")
        self.measure = measure
        channels, height, image_width = image_shape
        self.shrink = 2 if measure == "ssim" and min(height, image_width) >= _HALVED_SIDE else 1
        image_shape = (channels, height // self.shrink, image_width // self.shrink)
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        with drawing_from(seed):
            self.inverter = Inverter(feature_shape, image_shape, width=width)
        self.optimizer = torch.optim.Adam(self.inverter.parameters(), lr=learning_rate)

    def step(
        self,
        images: Float[Tensor, "n c h w"],
        features: Tensor,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Float[Tensor, ""]:
        """The error on this batch, without gradients, after which the inverter has taken one step to lower it."""
        with torch.enable_grad():
            loss = self._error(images, features.detach(), autocast)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.inverter.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def error(
        self,
        images: Float[Tensor, "n c h w"],
        features: Tensor,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Float[Tensor, ""]:
        """How far the inverter is off, mean over the batch; gradients reach the features, never the inverter."""
        self.inverter.requires_grad_(False)
        try:
            return self._error(images, features, autocast)
        finally:
            self.inverter.requires_grad_(True)

    def _error(
        self, images: Tensor, features: Tensor, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Tensor:
        target, variance = self._target(images)
        with autocast():
            guess = self.inverter.blocks(features) if self._is_blockwise(images) else self.inverter(features)
        if self.measure == "ssim":
            return 1 - ssim(target, guess).mean()
        error = F.mse_loss(guess, target)
        return error / variance if self.measure == "relative" else error

    def _target(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures as guesses are compared to them, and their variance; made once for a batch's two uses."""
        if self._seen is None or self._seen[0] is not images:
            target = F.avg_pool2d(images, self.shrink) if self.shrink > 1 else images
            if self._is_blockwise(images):
                # Blocks of the pictures, not pictures of the blocks: these need no gradients.
                target = F.pixel_unshuffle(images, self.inverter.block).contiguous(memory_format=torch.channels_last)
            variance = (target - target.mean(0)).square().mean().clamp_min(1e-6)
            self._seen = images, target, variance
        return self._seen[1:]

    def _is_blockwise(self, images: Tensor) -> bool:
        block = self.inverter.block
        return self.measure != "ssim" and images.shape[2] % block == 0 and images.shape[3] % block == 0

    def held(self) -> dict[str, Tensor]:
        """The moments of Adam, as "index/slot"; empty before the first step."""
        state = self.optimizer.state_dict()["state"]
        return {f"{index}/{slot}": value for index, slots in state.items() for slot, value in slots.items()}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `held` gave."""
        parameters = list(self.inverter.parameters())
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, slot = name.partition("/")
            like = parameters[int(index)]
            # In the memory order of its parameter: a kernel for another order may round differently.
            is_alike = value.shape == like.shape and slot != "step"
            state.setdefault(int(index), {})[slot] = torch.empty_like(like).copy_(value) if is_alike else value.clone()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


class LaterAdversary:
    """An adversary that is made at the first batch, which shows the sizes, and is carried whole through checkpoints.

    No module, on purpose: as one, it would stand in a pressure's `state_dict` from the first batch on, and not before.
    The options are those of `Adversary`.
    """

    def __init__(self, *, width: int, measure: Literal["mse", "ssim", "relative"], seed: int) -> None:
        self._width, self._measure, self._seed = width, measure, seed
        self._made: Adversary | None = None
        self._waiting: dict[str, Tensor] = {}

    def on(self, images: Float[Tensor, "n c h w"], features: Tensor) -> Adversary:
        """The adversary, for images and features of these shapes."""
        if self._made is None:
            _, c, h, w = images.shape
            made = Adversary(
                tuple(features.shape[1:]), (c, h, w), width=self._width, measure=self._measure, seed=self._seed
            ).to(images.device)
            if self._waiting:
                made.load_state_dict(_under("weights/", self._waiting))
                made.hold(_under("moments/", self._waiting))
                self._waiting = {}
            self._made = made
        return self._made

    def held(self) -> dict[str, Tensor]:
        """Weights and moments; empty before the first batch."""
        if self._made is None:
            return dict(self._waiting)
        weights = {f"weights/{name}": value for name, value in self._made.state_dict().items()}
        return weights | {f"moments/{name}": value for name, value in self._made.held().items()}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `held` gave; other names are left aside."""
        self._made = None
        self._waiting = {name: value for name, value in tensors.items() if name.startswith(("weights/", "moments/"))}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
