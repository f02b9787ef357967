"""Attention that rescales features: squeeze-excitation, triplet attention, CBAM; made cheap to train.

Every gate here is 2·sigmoid, so that it is 1 where its last layer says 0: put into a trained network, a block starts
as the identity, and learns from there.

Training computes what use computes by other ways, since on a CPU most of the time goes into gradients that autograd
makes at the input's size, in different memory orders, and adds.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Cbam", "SqueezeExcitation", "TripletAttention", "axis_extremes"]

_WIDEST_BAND = 64


class SqueezeExcitation(nn.Module):
    """Each channel scaled by a gate in (0,2) that looks at the means of all channels.

    Source: Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018), section 3; we differ: the gate is doubled, and
    SiLU stands for ReLU, all of whose few hidden units may be dead from the start.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.down = nn.Linear(channels, max(2, channels // reduction))
        self.up = nn.Linear(max(2, channels // reduction), channels)
        _start_small(self.up)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input, rescaled."""
        if not self.training:
            return x * self._gate(x.mean((2, 3)))[:, :, None, None]
        x, mean = _Squeezed.apply(x)
        with _in_full(mean):
            gate = self._gate(mean.to(self.up.weight.dtype))
        out: Tensor = _Scaled.apply(x, gate)
        return out

    def _gate(self, mean: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return 2 * torch.sigmoid(self.up(F.silu(self.down(mean))))


class TripletAttention(nn.Module):
    """The input times the mean of three gates in (0,2): one for each pair of its axes, seen along the third.

    Source: Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module" (WACV 2021), section 3.2; we
    differ: gates are doubled, their convolutions have a bias and no batch normalisation, and nothing is rotated in
    memory (the mean of three gated inputs is the input times the mean of the gates).
    """

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.planes = nn.ModuleList(_Plane(kernel) for _ in range(3))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input, rescaled."""
        gates = [
            torch.sigmoid(plane(extremes)) * (2 / 3)
            for plane, extremes in zip(self.planes, axis_extremes(x, is_training=self.training), strict=True)
        ]
        # Over (h, w), (c, h) and (c, w).
        across = gates[1].squeeze(1)[:, :, :, None], gates[2].squeeze(1)[:, :, None]
        if self.training:
            out: Tensor = _Gated.apply(x, gates[0], *across)
            return out
        return x * (gates[0] + (across[0] + across[1]))


class Cbam(nn.Module):
    """A gate for each channel, then a gate for each position, both in (0,2).

    Source: Woo et al., "CBAM: Convolutional Block Attention Module" (ECCV 2018), section 3; we differ: gates are
    doubled, and the spatial one has a bias.
    """

    def __init__(self, channels: int, reduction: int = 4, kernel: int = 7) -> None:
        super().__init__()
        self.down = nn.Linear(channels, max(2, channels // reduction))
        self.up = nn.Linear(max(2, channels // reduction), channels)
        self.space = _Plane(kernel)
        _start_small(self.up)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input, rescaled twice."""
        if not self.training:
            x = x * self._gate(torch.stack((x.amax((2, 3)), x.mean((2, 3)))))[:, :, None, None]
            return x * (2 * torch.sigmoid(self.space(torch.stack((x.amax(1), x.mean(1)), 1))))
        x, largest, mean = _PlaneExtremes.apply(x)
        with _in_full(mean):
            gate = self._gate(torch.stack((largest, mean)).to(self.up.weight.dtype))
        x, extremes = _ScaledExtremes.apply(x, gate)
        out: Tensor = _Masked.apply(x, 2 * torch.sigmoid(self.space(extremes)))
        return out

    def _gate(self, seen: Float[Tensor, "2 n c"]) -> Float[Tensor, "n c"]:
        return 2 * torch.sigmoid(self.up(F.silu(self.down(seen))).sum(0))


class _Plane(nn.Conv2d):
    """The wide convolution, from maximum and mean to one gate, of an attention over two axes."""

    def __init__(self, kernel: int) -> None:
        super().__init__(2, 1, kernel, padding=kernel // 2)
        _start_small(self)

    def forward(self, x: Float[Tensor, "n 2 a b"]) -> Float[Tensor, "n 1 a b"]:
        """Gates before the sigmoid."""
        if not self.training or x.device.type != "cpu" or x.shape[3] > _WIDEST_BAND:
            return super().forward(x)
        # Libraries are slow at one output channel. As a convolution along the rows, whose channels are the columns and
        # whose weights are banded, it takes a third of the time, though it computes many products with zero.
        assert self.bias is not None
        width = x.shape[3]
        band = (self.weight[0].flatten(0, 1) @ _band(width, self.kernel_size[1])).view(2, -1, width, width)
        band = band.permute(2, 0, 3, 1).flatten(1, 2)
        out = F.conv1d(x.transpose(2, 3).flatten(1, 2), band, self.bias.expand(width), padding=self.kernel_size[0] // 2)
        return out.transpose(1, 2).unsqueeze(1)


def _in_full(x: Tensor) -> AbstractContextManager[object]:
    """No half precision: so few products take less time than the conversions would."""
    return torch.autocast(x.device.type, enabled=False)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training whatever called first
def _band(width: int, taps: int) -> Float[Tensor, "taps pairs"]:
    """1 where a tap carries an input column to an output column: what spreads a row of weights over all pairs."""
    columns = torch.arange(width)
    offset = columns - columns[:, None] + taps // 2
    return (offset == torch.arange(taps)[:, None, None]).flatten(1).float()


def axis_extremes(
    x: Float[Tensor, "n c h w"], *, is_training: bool
) -> tuple[Float[Tensor, "n 2 h w"], Float[Tensor, "n 2 c h"], Float[Tensor, "n 2 c w"]]:
    """Maximum and mean along the channels, the columns and the rows."""
    if is_training:
        found = _Extremes.apply(x)
    else:
        found = tuple(statistic for axis in (1, 3, 2) for statistic in (x.amax(axis), x.mean(axis)))
    return torch.stack(found[:2], 1), torch.stack(found[2:4], 1), torch.stack(found[4:], 1)


class _Squeezed(torch.autograd.Function):
    """The input and its mean over positions, with one gradient for both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        ctx.positions = x.shape[2] * x.shape[3]
        return x.view_as(x), _plane_sums(x) / ctx.positions

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_mean: Tensor) -> Tensor:  # noqa: ANN401
        out: Tensor = of_x + (of_mean / ctx.positions).to(of_x.dtype)[:, :, None, None]
        return out


class _Scaled(torch.autograd.Function):
    """Channels times gates; the gradient of a gate is summed by pooling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gate)
        return x * gate.to(x.dtype)[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        x, gate = ctx.saved_tensors
        of_gate = _plane_sums(gradient * x)
        return gradient * gate.to(gradient.dtype)[:, :, None, None], of_gate.to(gate.dtype)


def _plane_sums(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
    """Sums over positions, by what is fast in the memory order of `x`."""
    if x.is_contiguous():
        return x.sum((2, 3))
    return F.avg_pool2d(x, x.shape[2:]).flatten(1) * (x.shape[2] * x.shape[3])


class _PlaneExtremes(torch.autograd.Function):
    """The input with each channel's maximum and mean over positions, with one gradient for the three.

    As in all of these, where a maximum is reached more than once, one place takes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        x = x.contiguous()
        # First the column: to look for the place of a maximum among all positions takes five times as long.
        largest, column = x.amax(2).max(2)
        of_column = x.gather(3, column[:, :, None, None].expand(-1, -1, x.shape[2], 1)).squeeze(3)
        ctx.save_for_backward(of_column.max(2).indices * x.shape[3] + column)
        return x.view_as(x), largest, x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_largest: Tensor, of_mean: Tensor) -> Tensor:  # noqa: ANN401
        (where,) = ctx.saved_tensors
        out = of_x.contiguous() + (of_mean / (of_x.shape[2] * of_x.shape[3]))[:, :, None, None]
        out.flatten(2).scatter_add_(2, where.unsqueeze(2), of_largest.unsqueeze(2))
        return out


class _ScaledExtremes(torch.autograd.Function):
    """Channels times gates, and maximum and mean of that along the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        n, c, h, w = x.shape
        out = x * gate.to(x.dtype)[:, :, None, None]
        # Positions stand for channels that are innermost in memory, along which pooling is fast.
        outward = out.view(n, c, 1, h * w).permute(0, 3, 1, 2)
        largest, where = F.max_pool2d(outward, (c, 1), return_indices=True)
        ctx.save_for_backward(x, gate, where)
        extremes = torch.stack((largest.view(n, h, w), F.avg_pool2d(outward, (c, 1)).view(n, h, w)), 1)
        return out, extremes

    @staticmethod
    def backward(ctx: Any, of_out: Tensor, of_extremes: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        x, gate, where = ctx.saved_tensors
        n, c, h, w = x.shape
        whole = of_out.contiguous() + of_extremes[:, 1:] / c
        whole.view(n, c, h * w).scatter_add_(1, where.view(n, 1, h * w), of_extremes[:, :1].flatten(2))
        return whole * gate.to(whole.dtype)[:, :, None, None], (whole * x).sum((2, 3)).to(gate.dtype)


class _Masked(torch.autograd.Function):
    """Positions times gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gate)
        return x * gate.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        x, gate = ctx.saved_tensors
        return gradient * gate.to(gradient.dtype), (gradient * x).sum(1, keepdim=True).to(gate.dtype)


class _Extremes(torch.autograd.Function):
    """Maxima and means along three axes with one gradient for all six.

    Left to autograd, six gradients of the input's size are made, laid out in different ways and added: five times the
    cost on a CPU. Where a maximum is reached more than once, the first takes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        n, c, h, w = x.shape
        ctx.dtype = x.dtype
        x = x.contiguous(memory_format=torch.channels_last)
        # Pooling is fast along an axis that is not the innermost in memory, so channels are moved outwards first.
        outward = x.contiguous().view(n, c, h * w).transpose(1, 2).unsqueeze(2)
        over_c, where_c = F.max_pool2d(outward, (1, c), return_indices=True)
        over_w, where_w = F.max_pool2d(x, (1, w), return_indices=True)
        over_h, where_h = F.max_pool2d(x, (h, 1), return_indices=True)
        ctx.save_for_backward(where_c, where_w, where_h)
        ctx.shape = (n, c, h, w)
        return (
            over_c.view(n, h, w),
            F.avg_pool2d(outward, (1, c)).view(n, h, w),
            over_w.squeeze(3),
            F.avg_pool2d(x, (1, w)).squeeze(3),
            over_h.squeeze(2),
            F.avg_pool2d(x, (h, 1)).squeeze(2),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        where_c, where_w, where_h = ctx.saved_tensors
        n, c, h, w = ctx.shape
        max_c, mean_c, max_w, mean_w, max_h, mean_h = (gradient.float() for gradient in gradients)
        out = _over_planes(mean_w / w, mean_h / h)
        out += (mean_c / c).unsqueeze(1)
        # Indices of pooling count within the plane that was pooled.
        flat = (
            out.view(n, c, h * w) if out.is_contiguous() else out.permute(0, 2, 3, 1).view(n, h * w, c).transpose(1, 2)
        )
        flat.scatter_add_(2, where_w.view(n, c, h), max_w)
        flat.scatter_add_(2, where_h.view(n, c, w), max_h)
        flat.scatter_add_(1, where_c.view(n, 1, h * w), max_c.reshape(n, 1, h * w))
        return out.to(ctx.dtype)


def _over_planes(of_rows: Float[Tensor, "n c h"], of_columns: Float[Tensor, "n c w"]) -> Float[Tensor, "n c h w"]:
    """Sums of all pairs, channels last: so must the two small ones lie, or the sum takes three times as long."""
    last = torch.channels_last
    return of_rows.unsqueeze(3).contiguous(memory_format=last) + of_columns.unsqueeze(2).contiguous(memory_format=last)


class _Gated(torch.autograd.Function):
    """x · (a + b + c) with gates that each miss one axis; their gradients are summed by pooling, which is fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, over_c: Tensor, over_w: Tensor, over_h: Tensor) -> Tensor:  # noqa: ANN401
        gate = _over_planes(over_w.float().squeeze(3), over_h.float().squeeze(2))
        gate += over_c.float()
        gate = gate.to(x.dtype)
        ctx.save_for_backward(x, gate)
        ctx.dtypes = over_c.dtype, over_w.dtype, over_h.dtype
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        x, gate = ctx.saved_tensors
        _, _, h, w = x.shape
        product = (gradient * x).contiguous(memory_format=torch.channels_last)
        dtypes = ctx.dtypes
        return (
            gradient * gate,
            product.sum(1, keepdim=True).to(dtypes[0]),
            (F.avg_pool2d(product, (1, w)) * w).to(dtypes[1]),
            (F.avg_pool2d(product, (h, 1)) * h).to(dtypes[2]),
        )


def _start_small(layer: nn.Module) -> None:
    """Near enough to nothing to leave the gate at 1, and far enough for gradients to pass."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    nn.init.normal_(layer.weight, std=0.02 * layer.weight[0].numel() ** -0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
