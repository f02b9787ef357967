"""Penalties on the features of a batch: differentiable scalars that a defense adds to the task's loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from louver.measures.information import distance_correlation
from louver.measures.rows import gram

__all__ = ["channel_correlation", "image_correlation", "mean_magnitude"]


def image_correlation(images: Float[Tensor, "n c h w"], z: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Squared distance correlation of images and features; see `louver.measures.information.distance_correlation`.

    Rows are read in the order in which memory holds them, which distances do not see, and which spares a copy.
    """
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    return distance_correlation(images.permute(0, 2, 3, 1) if is_last else images, z)


def channel_correlation(z: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """How alike the channels of one picture are: mean squared Pearson correlation of two of its channels; 0 to 1.

    For each picture the c×c correlations over the h·w positions, squared and averaged over all pairs of different
    channels, then over pictures. A constant channel correlates with nothing; one channel alone gives 0. Computed in
    float32 whatever autocast says.

    Source: SiftFunnel (arXiv 2501.00824), P(z), as its code has it; we differ: a channel with itself is left out,
    which only adds a constant there.

    >>> z = torch.rand(7, 1, 8, 10)
    >>> round(float(channel_correlation(torch.cat([z, 1 - z], 1))), 4)
    1.0
    """
    channels = z.shape[1]
    with torch.autocast(z.device.type, enabled=False):
        rows = z.float().flatten(2)
        rows = rows - rows.mean(2, keepdim=True)
        products = gram(rows)
        squares = products.diagonal(dim1=1, dim2=2)
        # The smallest term that keeps the gradient of a constant channel finite; relative, a shrunk z would hide in it.
        scale = (squares + 1e-12).rsqrt()
        correlations = products * scale.unsqueeze(1) * scale.unsqueeze(2)
        found = correlations.square().sum() - correlations.diagonal(dim1=1, dim2=2).square().sum()
        return found / (len(z) * max(channels * (channels - 1), 1))


def mean_magnitude(z: Tensor) -> Float[Tensor, ""]:
    """Mean of |z| over everything, 0 or more: small where most of what is sent is zero. In float32."""
    return z.float().abs().mean()
