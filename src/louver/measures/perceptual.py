"""How alike two images look to a network: distances between its inner features, one value per image.

Two kinds, never to be confused. `squeezenet_distance` weighs all channels alike and needs no calibration: it is NOT
LPIPS, and its values compare only with themselves. `lpips_distance` is LPIPS, and runs
only on weights that the user brings, backbone and linear heads both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.errors import DataError, WeightsError
from louver.measures.image import check_pair

__all__ = [
    "PERCEPTUAL_MIN_SIDE",
    "load_lpips",
    "lpips_distance",
    "perceptual_distance",
    "shared_distance",
    "squeezenet_distance",
]

PERCEPTUAL_MIN_SIDE = 32
"""Smallest height and width: below it the deepest maps are a single pixel, or none."""

Distance = Callable[[Tensor, Tensor], Tensor]

_LPIPS_LAYOUTS = {
    "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "squeezenet1_1": {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
    "vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
}
"""By torchvision network: the layers of `features` after which LPIPS compares, and their channels."""

# LPIPS normalizes images in [-1,1] with these; ours are in [0,1], hence 2x - 1 first.
_LPIPS_SHIFT = (-0.030, -0.088, -0.188)
_LPIPS_SCALE = (0.458, 0.448, 0.450)


def perceptual_distance(backbone: nn.Module) -> Distance:
    """A measure `(truth, guess) -> (n,)` on the feature maps of `backbone`; 0 (alike to the network) to 4.

    `backbone` maps images in [0,1] to a list of feature maps. At each position the channels are scaled to unit length,
    squared differences are summed over channels, then averaged over positions and over maps. Gray images are repeated
    to three channels.

    Raises:
        DataError: on use, as `check_pair`, or images below 32 pixels a side.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, eq. 1;
    we differ: all channels weigh 1 and maps are averaged, so this is not LPIPS.

    Example:
        >>> class Pyramid(nn.Module):
        ...     def forward(self, images):
        ...         return [images, nn.functional.avg_pool2d(images, 4)]
        >>> perceptual_distance(Pyramid())(torch.rand(7, 3, 36, 40), torch.rand(7, 3, 36, 40)).shape
        torch.Size([7])
    """

    def distance(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        check_pair(truth, guess, min_side=PERCEPTUAL_MIN_SIDE)
        pairs = zip(backbone(_three_channels(truth)), backbone(_three_channels(guess)), strict=True)
        maps = [(_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(maps).mean(dim=0)

    return distance


def squeezenet_distance(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Distance of each pair on SqueezeNet 1.0 features (ImageNet weights of the shared data); 0 to 4. NOT LPIPS.

    Raises:
        DataError: as in `perceptual_distance`.
        WeightsError: the weights are not there.
    """
    return shared_distance("squeezenet1_0", truth.device)(truth, guess)


@lru_cache(maxsize=4)
def shared_distance(name: str, device: torch.device) -> Distance:
    """`perceptual_distance` on the backbone called `name` (see `louver.models.perceptual_backbone`), kept loaded."""
    from louver.models import perceptual_backbone  # late: the weights are optional

    backbone = perceptual_backbone(name).to(device).eval()
    backbone.requires_grad_(False)
    return perceptual_distance(backbone)


def load_lpips(path: Path, device: torch.device | str = "cpu") -> Distance:
    """LPIPS (v0.1) as a measure `(truth, guess) -> (n,)`, on the weights in the safetensors file `path`; 0 and up.

    The file holds both halves under their usual names: `features.<layer>…`, as in torchvision's alexnet, vgg16 or
    squeezenet1_1 (the keys tell which), and `lin<k>.model.1.weight` of shape (1, channels, 1, 1), as in the LPIPS
    release. Other keys (`classifier…`) are ignored. Gray images are repeated to three channels.

    Raises:
        WeightsError: no such file, not safetensors, or keys and shapes of none of the three layouts.
        DataError: on use, as in `perceptual_distance`.

    Source: Zhang et al., CVPR 2018, eq. 1, as released in version 0.1 (squared difference of unit-normalized channels,
    weighted by the heads, mean over positions, sum over layers).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"LPIPS weights {path}: cannot be read ({error}); give a safetensors file") from error
    return lpips_distance(*_lpips_parts(tensors, str(path)), device=device)


def lpips_distance(
    features: nn.Sequential, taps: Sequence[int], heads: Sequence[Tensor], device: torch.device | str = "cpu"
) -> Distance:
    """LPIPS on `features` tapped after the layers `taps`, with one (channels,) weight vector in `heads` for each.

    `features` itself is left as it is: its weights are copied.

    Raises:
        WeightsError: as many heads as taps are needed.
    """
    import copy

    if len(taps) != len(heads):
        raise WeightsError(f"LPIPS: expected one head for each of {len(taps)} tapped layers, got {len(heads)}")
    # What follows the last tap is not needed, and may not fit: AlexNet's last pooling has nothing to pool at 36 pixels.
    used = features[: max(taps) + 1]
    layers = copy.deepcopy(used).to(device).eval().requires_grad_(False)
    weights = [head.detach().to(device) for head in heads]
    shift = torch.tensor(_LPIPS_SHIFT, device=device).view(1, 3, 1, 1)
    scale = torch.tensor(_LPIPS_SCALE, device=device).view(1, 3, 1, 1)

    def maps(images: Tensor) -> list[Tensor]:
        images = (2 * _three_channels(images) - 1 - shift) / scale
        found = []
        for index, layer in enumerate(layers):
            images = layer(images)
            if index in taps:
                found.append(_unit(images))
        return found

    def distance(truth: Float[Tensor, "n c h w"], guess: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        check_pair(truth, guess, min_side=PERCEPTUAL_MIN_SIDE)
        total = truth.new_zeros(len(truth))
        for weight, a, b in zip(weights, maps(truth), maps(guess), strict=True):
            total = total + torch.einsum("nchw,c->nhw", (a - b).square(), weight).mean(dim=(1, 2))
        return total

    return distance


def _lpips_parts(tensors: dict[str, Tensor], where: str) -> tuple[nn.Sequential, tuple[int, ...], list[Tensor]]:
    """Layers, taps and heads out of the tensors of a file."""
    backbone = {key.removeprefix("features."): value for key, value in tensors.items() if key.startswith("features.")}
    layout, features = _lpips_layout({key: value.shape for key, value in backbone.items()}, where)
    features.load_state_dict(backbone, assign=True)
    heads = []
    for index, width in enumerate(_LPIPS_LAYOUTS[layout].values()):
        key = f"lin{index}.model.1.weight"
        shape = tuple(tensors[key].shape) if key in tensors else None
        if shape != (1, width, 1, 1):
            raise WeightsError(
                f"LPIPS weights {where}: expected {key} of shape (1, {width}, 1, 1) beside {layout}, "
                f"got {shape or 'no such key'}; take the linear heads of the same layout, version 0.1"
            )
        heads.append(tensors[key].flatten())
    if not all(bool(torch.isfinite(value).all()) for value in (*backbone.values(), *heads)):
        raise WeightsError(f"LPIPS weights {where}: NaN or infinity among them; fetch the file again")
    return features, tuple(_LPIPS_LAYOUTS[layout]), heads


def _lpips_layout(shapes: dict[str, torch.Size], where: str) -> tuple[str, nn.Sequential]:
    """The layout whose parameters have exactly these names and shapes, with its layers, not yet filled."""
    import torchvision

    for layout in _LPIPS_LAYOUTS:
        with torch.device("meta"):
            features = getattr(torchvision.models, layout)(weights=None).features
        assert isinstance(features, nn.Sequential)
        if shapes == {key: value.shape for key, value in features.state_dict().items()}:
            return layout, features
    raise WeightsError(
        f"LPIPS weights {where}: expected `features.…` of torchvision's {', '.join(_LPIPS_LAYOUTS)}, "
        f"got {len(shapes)} tensors that fit none of them; save the backbone's state dict beside the heads"
    )


def _unit(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Channels scaled to unit length at each position; 1e-10 as in the LPIPS release, so that dead positions stay 0."""
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _three_channels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h w"]:
    if images.shape[1] not in (1, 3):
        raise DataError(f"expected 1 or 3 channels for a perceptual distance, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
