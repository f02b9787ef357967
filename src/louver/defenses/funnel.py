"""Layers that narrow features on the edge and widen them again in the cloud, and starts that keep a network working."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from louver.cut import Split, joined
from louver.defenses.attention import Cbam, SqueezeExcitation, TripletAttention
from louver.types import Images

__all__ = ["Funnel", "Widening", "fitted", "principal_axes", "sampled_features", "start_at_best"]

_START_SHIFT = 1.0
"""Projections start this many deviations above zero, so that the ReLU after them cuts little off."""

_MOST_POSITIONS = 2**16
_MOST_FLOATS = 2**24
_MOST_IMAGES = 1024
_EXACT_AXES = 4096


class Funnel(nn.Module):
    """(n, k, h/pool, w/pool), 0 or more, from (n, c, h, w): what the edge sends.

    Squeeze-excitation, triplet attention, 1×1 convolution to k channels, batch normalisation, ReLU, mean pooling,
    1×1, 3×3, SiLU, 1×1, 3×3, 5×5 convolutions, ReLU, squeeze-excitation, CBAM.

    Source: SiftFunnel (arXiv 2501.00824), order of layers as in its code; we differ: all attention blocks act, the
    convolutions at width k start as the identity, and gates start at 1.
    """

    def __init__(self, channels: int, sent: int, *, pool: int = 1) -> None:
        super().__init__()
        self.squeeze = SqueezeExcitation(channels)
        self.triplet = TripletAttention()
        self.reduce = nn.Conv2d(channels, sent, 1, bias=False)
        self.norm = nn.BatchNorm2d(sent)
        self.pool = nn.AvgPool2d(pool, ceil_mode=True) if pool > 1 else nn.Identity()
        self.body = nn.Sequential(
            _identity(sent, 1),
            _identity(sent, 3),
            nn.SiLU(),
            _identity(sent, 1),
            _identity(sent, 3),
            _identity(sent, 5),
        )
        self.last_squeeze = SqueezeExcitation(sent)
        self.last_attention = Cbam(sent)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """What is sent."""
        x = self.triplet(self.squeeze(x))
        x = self.pool(F.relu(self.norm(self.reduce(x))))
        # Few channels are gated faster with positions innermost in memory.
        x = F.relu(self.body(x)).float().contiguous()
        out: Tensor = self.last_attention(self.last_squeeze(x))
        return out


def _identity(channels: int, kernel: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    nn.init.dirac_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Widening(nn.Module):
    """(n, c, *size) again from what a `Funnel` sent: the first layers of the cloud.

    Two 3×3 convolutions, batch normalisation, ReLU (not where features are signed), squeeze-excitation; positions are
    interpolated where the funnel pooled. The first convolution goes to 2k channels, so that the second is cheap.

    Source: SiftFunnel (arXiv 2501.00824), "up-sampling"; ours: widths, signed features and the interpolation.
    """

    def __init__(self, sent: int, channels: int, size: tuple[int, int], *, is_signed: bool = False) -> None:
        super().__init__()
        self.size = size
        self.is_signed = is_signed
        if is_signed:
            # Tells `rebuild` apart what weights do not show.
            self.register_buffer("signed", torch.ones(1))
        self.spread = nn.Conv2d(sent, 2 * sent, 3, padding=1)
        self.widen = nn.Conv2d(2 * sent, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.attention = SqueezeExcitation(channels)

    def forward(self, z: Float[Tensor, "n k h2 w2"]) -> Float[Tensor, "n c h w"]:
        """What the rest of the cloud takes."""
        x = self.norm(self.widen(self.spread(z)))
        x = self.attention(x if self.is_signed else F.relu(x))
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        out: Tensor = x
        return out


def principal_axes(rows: Float[Tensor, "m d"], count: int) -> tuple[Float[Tensor, " d"], Float[Tensor, "d k"]]:
    """Mean and the `count` orthonormal directions of largest variance, largest first; each leans to its long tail."""
    rows = rows.double()
    mean = rows.mean(0)
    centered = rows - mean
    if rows.shape[1] <= _EXACT_AXES:
        axes = torch.linalg.eigh(centered.T @ centered)[1].flip(1)[:, :count]
    else:
        axes = torch.linalg.svd(centered, full_matrices=False)[2][:count].T
    lean = (centered @ axes).pow(3).sum(0)
    return mean.float(), (axes * torch.where(lean < 0, -1.0, 1.0)).float()


@torch.no_grad()
def start_at_best(funnel: Funnel, widening: Widening, features: Float[Tensor, "n c h w"]) -> None:
    """Sets both so that narrowing and widening comes close to `features` of the undefended network.

    The projection goes to the principal axes of the features' channels, each at deviation 1; the widening is the
    least-squares way back from what is then sent. Both are changed in place.
    """
    gated = funnel.triplet(funnel.squeeze(features))
    _, axes = principal_axes(_positions(gated), funnel.reduce.out_channels)
    funnel.reduce.weight.copy_(axes.T[:, :, None, None])
    _match(funnel.norm, funnel.reduce(gated))
    funnel.norm.weight.fill_(1)
    funnel.norm.bias.fill_(_START_SHIFT)

    count = max(8, _MOST_POSITIONS // max(1, features.shape[2] * features.shape[3]))
    features = features[:count]
    sent = funnel.eval()(features)
    nn.init.dirac_(widening.spread.weight[: sent.shape[1]])
    target = features if sent.shape[2:] == features.shape[2:] else F.adaptive_avg_pool2d(features, sent.shape[2:])
    spread = widening.spread(sent)
    weight, bias = _least_squares(F.unfold(spread, 3, padding=1), target.flatten(2))
    widening.widen.weight.copy_(weight.view_as(widening.widen.weight))
    widened = widening.widen(spread)
    _match(widening.norm, widened)
    assert widening.norm.running_mean is not None
    assert widening.norm.running_var is not None
    widening.norm.weight.copy_((widening.norm.running_var + widening.norm.eps).sqrt())
    widening.norm.bias.copy_(bias + widening.norm.running_mean)


def _positions(features: Tensor) -> Float[Tensor, "m c"]:
    return features.transpose(0, 1).flatten(1).T


def _match(norm: nn.BatchNorm2d, inputs: Tensor) -> None:
    """Running statistics as of these inputs."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(inputs.mean((0, 2, 3)))
    norm.running_var.copy_(inputs.var((0, 2, 3)))


def _least_squares(
    inputs: Float[Tensor, "n a m"], targets: Float[Tensor, "n c m"]
) -> tuple[Float[Tensor, "c a"], Float[Tensor, " c"]]:
    """Weights and bias of the linear map from inputs to targets, with a ridge of a ten-thousandth."""
    x = inputs.transpose(0, 1).flatten(1).double()
    y = targets.transpose(0, 1).flatten(1).double()
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    x, y = x - x_mean, y - y_mean
    gram = x @ x.T
    gram.diagonal().add_(1e-4 * gram.diagonal().mean() + 1e-8)
    weight = torch.linalg.solve(gram, x @ y.T).T
    return weight.float(), (y_mean - weight @ x_mean).squeeze(1).float()


def sampled_features(edge: nn.Module, images: Images, feature_shape: tuple[int, ...], *, seed: int) -> Tensor:
    """What `edge` sends for up to 1024 of `images`, fewer where features are large; on the device of the edge."""
    floats = int(np.prod(feature_shape))
    count = min(len(images), _MOST_IMAGES, max(64, _MOST_FLOATS // floats))
    index = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
    device = next((parameter.device for parameter in edge.parameters()), torch.device("cpu"))
    with torch.no_grad():
        parts = [
            edge(torch.from_numpy(images.floats(index[start : start + 64])).to(device)).float()
            for start in range(0, count, 64)
        ]
    return torch.cat(parts)


def fitted(halves: Split, before: nn.Module, after: nn.Module | None, images: Images) -> Split:
    """`before` at the end of the edge and `after` at the start of the cloud, as a split, measured."""
    edge = nn.Sequential(halves.edge, before).eval()
    cloud = halves.cloud if after is None else nn.Sequential(after, halves.cloud).eval()
    device = next((parameter.device for parameter in edge.parameters()), torch.device("cpu"))
    example = torch.from_numpy(images.floats(slice(0, 2))).to(device)
    return joined(edge, cloud, example, name=halves.cut.name)
