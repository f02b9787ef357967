"""Features as whole numbers of 8 or 4 bits, each channel by a scale of its own, and back.

The scale is found on features of auxiliary images. Elements beyond it are cut off; how much of the range is worth its
coarser steps is chosen channel by channel, by the squared error on those features.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.errors import ConfigError, DataError

__all__ = ["Dequantize", "Quantize", "channel_dimension", "fit_quantization", "rounded"]

Bits = Literal[4, 8]

_SHARES = tuple(1 - i / 20 for i in range(17))
"""Shares of a channel's range that are tried: from all of it down to a fifth."""
_MOST_PER_CHANNEL = 2**16


def channel_dimension(shape: tuple[int, ...]) -> int:
    """Which dimension of a feature (batch left out) has scales of its own: channels first, of tokens the last."""
    return len(shape) - 1 if len(shape) == 2 else 0


def fit_quantization(features: Float[Tensor, "n ..."], bits: Bits) -> tuple[Quantize, Dequantize]:
    """The pair of modules that sends features like these (n, *shape) as whole numbers and reads them again.

    Raises:
        DataError: fewer than 2 features, or NaN or infinity among them.
        ConfigError: other than 4 or 8 bits.
    """
    if bits not in (4, 8):
        raise ConfigError(f"expected 4 or 8 bits an element, got {bits}")
    if len(features) < 2 or not bool(features.isfinite().all()):
        raise DataError("quantization: expected 2 finite features or more to find scales on; mend the edge")
    shape = tuple(features.shape[1:])
    dimension = channel_dimension(shape)
    rows = features.detach().float().movedim(dimension + 1, 0).flatten(1)
    if rows.shape[1] > _MOST_PER_CHANNEL:
        rows = rows[:, :: -(-rows.shape[1] // _MOST_PER_CHANNEL)]
    levels = 2**bits - 1
    low, high = rows.amin(1), rows.amax(1)
    best_low, best_step = low, (high - low) / levels
    least = torch.full_like(low, torch.inf)
    for share in _SHARES:
        # What has one sign keeps its end at 0: there most elements lie.
        tried_low = torch.where(low >= 0, low, share * low)
        tried_high = torch.where(high <= 0, high, share * high)
        step = ((tried_high - tried_low) / levels).clamp(min=1e-30)
        sent = ((rows - tried_low[:, None]) / step[:, None]).round().clamp(0, levels)
        error = (sent * step[:, None] + tried_low[:, None] - rows).square().mean(1)
        is_better = error < least
        best_low, best_step = torch.where(is_better, tried_low, best_low), torch.where(is_better, step, best_step)
        least = torch.where(is_better, error, least)
    # A channel that never changes has no step; any will do.
    best_step = torch.where(high > low, best_step, torch.ones_like(best_step))
    view = [1] * len(shape)
    view[dimension] = -1
    low, step = best_low.view(1, *view), best_step.view(1, *view)
    return Quantize(low, step, bits), Dequantize(low, step, bits, shape)


class _Scaled(nn.Module):
    low: Tensor
    step: Tensor

    def __init__(self, low: Tensor, step: Tensor, bits: Bits) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", low.clone())
        self.register_buffer("step", step.clone())

    def extra_repr(self) -> str:
        """The bits, for a person and for the keys of an audit."""
        return f"bits={self.bits}"


class Quantize(_Scaled):
    """(n, *shape) float features as uint8: of 8 bits (n, *shape); of 4 bits (n, half as many), two to a byte."""

    def forward(self, features: Tensor) -> Tensor:
        """The nearest whole number of steps, the first of a pair in the low half of its byte."""
        sent = ((features - self.low) / self.step).round().clamp(0, 2**self.bits - 1)
        if self.bits == 4:
            flat = sent.flatten(1)
            if flat.shape[1] % 2:
                flat = nn.functional.pad(flat, (0, 1))
            sent = flat[:, 0::2] + 16 * flat[:, 1::2]
        return sent.to(torch.uint8)


class Dequantize(_Scaled):
    """What `Quantize` sent, as float32 features (n, *shape) again."""

    def __init__(self, low: Tensor, step: Tensor, bits: Bits, shape: tuple[int, ...]) -> None:
        super().__init__(low, step, bits)
        self.shape = shape

    def forward(self, sent: Tensor) -> Tensor:
        """The features in the middle of each step."""
        numbers = sent.to(torch.float32)
        if self.bits == 4:
            second = (numbers / 16).floor()
            numbers = torch.stack([numbers - 16 * second, second], 2).flatten(1)
            count = torch.Size(self.shape).numel()
            numbers = numbers[:, :count].unflatten(1, self.shape)
        features: Tensor = numbers * self.step + self.low
        return features


def rounded(features: Tensor, quantize: Quantize, dequantize: Dequantize) -> Tensor:
    """Features as they arrive, with the gradient that they would have unrounded: how an attacker searches through."""
    arrived: Tensor = features + (dequantize(quantize(features)) - features).detach()
    return arrived
