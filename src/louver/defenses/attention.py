"""Attention that rescales features: squeeze-excitation, triplet attention, CBAM; made cheap to train.

Every gate here is 2·sigmoid, so that it is 1 where its last layer says 0: put into a trained network, a block starts
as the identity, and learns from there.

Training computes what use computes by other ways, since on a CPU most of the time goes into gradients that autograd
makes at the input's size, in different memory orders, and adds.
"""

from __future__ import annotations

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
        out: Tensor = _Scaled.apply(x, self._gate(mean))
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
        seen = torch.stack((x.amax((2, 3)), x.mean((2, 3))))
        x = x * (2 * torch.sigmoid(self.up(F.silu(self.down(seen))).sum(0)))[:, :, None, None]
        return x * (2 * torch.sigmoid(self.space(torch.stack((x.max(1).values, x.mean(1)), 1))))


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
        columns, radius = torch.arange(x.shape[3]), self.kernel_size[1] // 2
        offset = columns - columns[:, None] + radius
        is_inside = (offset >= 0) & (offset <= 2 * radius)
        band = self.weight[0][:, :, offset.clamp(0, 2 * radius)] * is_inside
        band = band.permute(2, 0, 3, 1).flatten(1, 2)
        out = F.conv1d(x.transpose(2, 3).flatten(1, 2), band, self.bias.expand(len(columns)), padding=radius)
        return out.transpose(1, 2).unsqueeze(1)


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
        return x.view_as(x), F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)

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
        height, width = x.shape[2:]
        of_gate = F.avg_pool2d(gradient * x, (height, width)).flatten(1) * (height * width)
        return gradient * gate.to(gradient.dtype)[:, :, None, None], of_gate.to(gate.dtype)


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
        out = torch.empty((n, c, h, w), device=mean_c.device, memory_format=torch.channels_last)
        torch.add((mean_w / w).unsqueeze(3), (mean_h / h).unsqueeze(2), out=out)
        out += (mean_c / c).unsqueeze(1)
        # Indices of pooling count within the plane that was pooled.
        flat = (
            out.view(n, c, h * w) if out.is_contiguous() else out.permute(0, 2, 3, 1).view(n, h * w, c).transpose(1, 2)
        )
        flat.scatter_add_(2, where_w.view(n, c, h), max_w)
        flat.scatter_add_(2, where_h.view(n, c, w), max_h)
        flat.scatter_add_(1, where_c.view(n, 1, h * w), max_c.reshape(n, 1, h * w))
        return out.to(ctx.dtype)


class _Gated(torch.autograd.Function):
    """x · (a + b + c) with gates that each miss one axis; their gradients are summed by pooling, which is fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, over_c: Tensor, over_w: Tensor, over_h: Tensor) -> Tensor:  # noqa: ANN401
        gate = torch.empty(x.shape, device=x.device, memory_format=torch.channels_last)
        torch.add(over_w.float(), over_h.float(), out=gate)
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
