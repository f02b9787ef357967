"""Layers that draw by chance whenever they run, in training and in use: the noise of a defended edge.

They draw from torch's global generator of the device. On a real device noise comes fresh from the operating system
(see the export); here a seed set by the caller makes an audit repeatable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from louver.errors import ConfigError

__all__ = ["Noise", "RandomMask", "Stochastic", "drawing_from", "laplace_like", "silenced", "stochastic_layers"]


class Stochastic(nn.Module):
    """A layer that draws by chance; `is_silent` turns it into what it does on average, for an attacker's gradients."""

    is_silent: bool = False


class Noise(Stochastic):
    """z + n, n drawn anew for every element of every input, with standard deviation `std`.

    Raises:
        ConfigError: a negative or infinite `std`, or an unknown `kind`.
    """

    std: Tensor

    def __init__(self, std: float, kind: Literal["gaussian", "laplace"] = "gaussian") -> None:
        super().__init__()
        if not 0 <= std < float("inf"):
            raise ConfigError(f"noise: expected a standard deviation of 0 or more, got {std}")
        if kind not in ("gaussian", "laplace"):
            raise ConfigError(f"noise: unknown kind {kind!r}; legal: gaussian, laplace")
        self.kind = kind
        self.register_buffer("std", torch.tensor(float(std)))

    def extra_repr(self) -> str:
        """Kind and strength, for a person and for the keys of an audit."""
        return f"std={float(self.std):g}, kind={self.kind}"

    def forward(self, z: Tensor) -> Tensor:
        """The input with fresh noise, of the same shape."""
        if self.is_silent:
            return z
        if self.kind == "gaussian":
            return z + self.std * torch.randn_like(z)
        noisy: Tensor = z + self.std * laplace_like(z)
        return noisy


class RandomMask(Stochastic):
    """Each element kept with chance 1 - `rate` and scaled by 1 / (1 - `rate`), else 0: dropout that stays on in use.

    Raises:
        ConfigError: a `rate` outside [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ConfigError(f"random mask: expected a rate from 0 to below 1, got {rate}")
        self.rate = rate

    def extra_repr(self) -> str:
        """The rate, for a person and for the keys of an audit."""
        return f"rate={self.rate:g}"

    def forward(self, z: Tensor) -> Tensor:
        """The input with fresh holes, of the same shape."""
        if self.is_silent:
            return z
        kept: Tensor = z * (torch.rand_like(z) >= self.rate) / (1 - self.rate)
        return kept


def laplace_like(z: Tensor) -> Tensor:
    """Laplace noise of deviation 1 in the shape of `z`: the difference of two exponentials has variance 2."""
    left, right = (-torch.log1p(-torch.rand_like(z)) for _ in range(2))
    noise: Tensor = (left - right) * 0.5**0.5
    return noise


def stochastic_layers(module: nn.Module) -> list[Stochastic]:
    """The layers of `module` that draw by chance."""
    return [layer for layer in module.modules() if isinstance(layer, Stochastic)]


def silenced(module: nn.Module) -> nn.Module:
    """A copy without chance: what an attacker searches through who knows the defense."""
    quiet = copy.deepcopy(module)
    for layer in stochastic_layers(quiet):
        layer.is_silent = True
    return quiet


@contextmanager
def drawing_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """What draws by chance, on the processor or `device`, draws from `seed` in here.

    Torch's global generators go on as they were outside.
    """
    is_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        # Not torch.manual_seed: it would set the generators of other devices too, and leave them so.
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
