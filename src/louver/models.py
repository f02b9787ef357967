"""Networks by name, with the normalisation inside: what comes out takes float32 NCHW images in [0,1].

The names are torchvision's and timm's, Louver's own (`OWN`), and `package.module:function` of the user. Naming a
function of one's own runs its code, as importing it would; nothing else here runs code from a file.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.errors import ConfigError, LouverError, WeightsError, nearest
from louver.networks import CifarResNet, StreetNet
from louver.stochastic import drawing_from
from louver.weights import fit_weights, read_weights, save_weights, weights_file

__all__ = ["OWN", "Normalized", "load_model", "perceptual_backbone", "save_weights"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_DEPTHS = {f"cifar_resnet{depth}": depth for depth in (20, 32, 44, 56)}
OWN = (*CIFAR_DEPTHS, "street_net")
"""Names of Louver's own networks."""
BACKBONES = {"squeezenet1_0": ("squeezenet1_0_imagenet", (1, 5, 10, 12))}
"""Weights, and the layers before each halving of the picture, counted in torchvision's `features`."""


class Normalize(nn.Module):
    """Subtracts a mean and divides by a spread, channel by channel. Both travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ConfigError(f"expected mean and std of one length, a value a channel, got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ConfigError(f"expected std above zero in every channel, got {tuple(std)}; for no scaling write 1")
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Images around zero, as the network was trained on."""
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """A network that takes images in [0,1] because its normalisation is inside.

    `transparent_child` tells the cutter to leave "network." out of the names that it shows.
    """

    transparent_child = "network"

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network

    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """What the network says of images in [0,1]."""
        out: Tensor = self.network(self.normalize(x))
        return out


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a builder is asked for; None leaves the choice to the network."""

    n_classes: int | None
    image_shape: tuple[int, int, int] | None
    is_pretrained: bool


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bare network and the normalisation that its library documents for it."""

    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]


def load_model(
    name: str,
    *,
    n_classes: int | None = None,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    image_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """A network in eval mode that takes float32 (n, c, h, w) images in [0,1].

    name: `torchvision:resnet18` or `timm:vit_tiny_patch16_224`, the bare name of either (torchvision first), one of
    `OWN`, or `package.module:function`, which is called with those of n_classes and image_shape that it accepts.

    weights: None leaves the network random, drawn from `seed`. "pretrained" lets torchvision or timm download their
    published ones; nothing is downloaded otherwise. Else a `.safetensors`, `.npz`, `.pt` or `.pth` file, or the name of
    one in the weights folder of the shared data.

    mean, std: one value a channel. Left out, they are those that were saved with the weights, else those that
    torchvision or timm document for the pre-trained network, Louver's own for its own networks, and none (images go in
    as they are) for the user's functions and wherever images have another number of channels than the documented ones.

    image_shape: (c, h, w) for networks that are built for a size or a number of channels.

    Raises:
        ConfigError: an unknown name, or an argument that this network cannot take.
        WeightsError: the weights are not there, not safe to open, do not fit, or cannot be downloaded.
    """
    if (mean is None) != (std is None):
        raise ConfigError("expected both of mean and std, or neither, got one")
    if n_classes is not None and n_classes < 1:
        raise ConfigError(f"expected n_classes of 1 or more, got {n_classes}")
    source, builder = _builder(name)
    is_pretrained = weights == "pretrained"
    if is_pretrained and source not in ("torchvision", "timm"):
        raise WeightsError(f'{name}: weights="pretrained" is for torchvision and timm networks; give a file instead')
    request = Request(n_classes=n_classes, image_shape=image_shape, is_pretrained=is_pretrained)
    with drawing_from(seed):
        try:
            built = builder(request)
        except LouverError:
            raise
        # A builder is the user's code or a library's: it may raise anything.
        except Exception as error:
            raise ConfigError(
                f"{name}: the network cannot be built for n_classes {n_classes} and images {image_shape}: "
                f"{type(error).__name__}: {error}; try another size, or mend the function"
            ) from error
    default_mean, default_std = built.mean, built.std
    if image_shape is not None and len(default_mean) not in (1, image_shape[0]):
        default_mean, default_std = (0.0,), (1.0,)
    state: dict[str, Tensor] = {}
    if weights is not None and not is_pretrained:
        path = weights_file(weights)
        state = read_weights(path)
        if all(key.startswith(("network.", "normalize.")) for key in state):
            stored_mean, stored_std = state.pop("normalize.mean", None), state.pop("normalize.std", None)
            if stored_mean is not None and stored_std is not None:
                default_mean, default_std = stored_mean.flatten().tolist(), stored_std.flatten().tolist()
            state = {key.removeprefix("network."): value for key, value in state.items()}
        fit_weights(built.network, state, source=f"{path.name} for {name}")
    return Normalized(built.network, mean or default_mean, std or default_std).eval()


def _builder(name: str) -> tuple[str, Callable[[Request], Built]]:
    """Where a network comes from, and the function that builds it.

    Raises:
        ConfigError: nothing has this name.
    """
    prefix, _, rest = name.partition(":")
    if rest and not prefix:
        raise ConfigError(f"{name!r} names no module; your own network: package.module:function")
    if name in OWN:
        return "own", lambda request: _build_own(name, request)
    if prefix == "torchvision" or (not rest and name in _torchvision_names()):
        return "torchvision", lambda request: _build_torchvision(rest or name, request)
    if prefix == "timm" or (not rest and _is_timm_name(name)):
        return "timm", lambda request: _build_timm(rest or name, request)
    if rest:
        return "function", lambda request: _build_from_function(name, request)
    from timm import list_models

    known = [*OWN, *_torchvision_names(), *list_models()]
    raise ConfigError(f"no network is named {name!r}; {nearest(name, known)}; your own: package.module:function")


def _build_own(name: str, request: Request) -> Built:
    channels = request.image_shape[0] if request.image_shape else 3
    if name in CIFAR_DEPTHS:
        cifar = CifarResNet(CIFAR_DEPTHS[name], n_classes=request.n_classes or 10, in_channels=channels)
        return Built(network=cifar, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if request.n_classes is None:
        raise ConfigError(f"{name}: expected n_classes, the number of classes in the label column, got none")
    street = StreetNet(n_classes=request.n_classes, in_channels=channels)
    return Built(network=street, mean=(0.5,), std=(0.25,))


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _build_torchvision(name: str, request: Request) -> Built:
    from torchvision import models

    if name not in _torchvision_names():
        raise ConfigError(f"torchvision has no classifier {name!r}; {nearest(name, _torchvision_names())}")
    published = models.get_model_weights(name).DEFAULT
    preset = published.transforms()
    options: dict[str, object] = {}
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    if name in ("googlenet", "inception_v3"):
        # Their published weights expect another normalisation than the documented one and undo it themselves.
        options |= {"init_weights": True, "transform_input": request.is_pretrained}
    if request.image_shape is not None:
        channels, height, width = request.image_shape
        if channels != 3:
            raise ConfigError(
                f"torchvision:{name} takes images of 3 channels, got image_shape {request.image_shape}; "
                "most timm networks take any number: name one as timm:…"
            )
        if name.startswith("vit_"):
            if height != width:
                raise ConfigError(f"torchvision:{name} takes square images, got {height}×{width}; name a timm network")
            options["image_size"] = height
    network: nn.Module = models.get_model(name, weights=None, **options)
    if request.is_pretrained:
        _download_torchvision(network, published, name)
    return Built(network=network, mean=tuple(preset.mean), std=tuple(preset.std))


def _download_torchvision(network: nn.Module, published: object, name: str) -> None:
    """Published weights into `network`; a last layer for another number of classes stays as drawn from the seed."""
    try:
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        raise _failed_download(f"torchvision:{name}", error) from error
    n_published = len(published.meta["categories"])  # type: ignore[attr-defined]
    own = network.state_dict()
    for key, value in state.items():
        if key in own and own[key].shape != value.shape and value.shape[0] == n_published:
            state[key] = own[key]
    fit_weights(network, state, source=f"published weights of torchvision:{name}")


def _is_timm_name(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def _build_timm(name: str, request: Request) -> Built:
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"timm has no network {name!r}; {nearest(name, timm.list_models())}")
    options: dict[str, Any] = {"pretrained": request.is_pretrained}
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    if request.image_shape is not None:
        options |= {"in_chans": request.image_shape[0], "img_size": request.image_shape[1:]}
    try:
        network = _create_timm(name, options)
    except (OSError, RuntimeError) as error:
        if not request.is_pretrained:
            raise
        raise _failed_download(f"timm:{name}", error) from error
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"timm:{name} cannot be built for image_shape {request.image_shape} ({error})") from error
    documented: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    return Built(network=network, mean=tuple(documented["mean"]), std=tuple(documented["std"]))


def _create_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        network: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        # Only networks tied to one size take img_size, and timm keeps no list of them; convolutional ones refuse it.
        if "img_size" not in options or "img_size" not in str(error):
            raise
        network = timm.create_model(name, **{key: value for key, value in options.items() if key != "img_size"})
    return network


def _failed_download(name: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"{name}: the published weights could not be downloaded ({error}); check the network, or download them "
        "elsewhere and give the file as weights, or leave weights out for a random network"
    )


def _build_from_function(name: str, request: Request) -> Built:
    module_name, _, function_name = name.partition(":")
    offered = {"n_classes": request.n_classes, "image_shape": request.image_shape}
    with _importing_from_here():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                f"{name}: module {module_name!r} cannot be imported ({error}); it is looked for where Python looks, "
                f"and in {Path.cwd()}; names with a library read torchvision:… or timm:…"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            callables = sorted(
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            )
            raise ConfigError(f"{module_name} has no function {function_name!r}; {nearest(function_name, callables)}")
        try:
            accepted = set(inspect.signature(function).parameters)
        except ValueError:  # something built in, which does not say
            accepted = set()
        network = function(**{key: value for key, value in offered.items() if key in accepted and value is not None})
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name}: expected a torch.nn.Module back, got {type(network).__name__}")
    return Built(network=network, mean=(0.0,), std=(1.0,))


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """Lets the working folder be imported from, last of all, as `python -m` would; an installed command does not."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


class PerceptualBackbone(nn.Module):
    """Inner features of a network, from shallow to deep; its weights take no gradients, its input does."""

    def __init__(self, layers: nn.Sequential, taps: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.layers = layers[: max(taps) + 1]
        self.taps = frozenset(taps)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        """Feature maps (n, c, h, w) of images in [0,1], one a tap."""
        features = []
        x = self.normalize(x)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                features.append(x)
        return features


def perceptual_backbone(name: str = "squeezenet1_0") -> nn.Module:
    """A network from images in [0,1], 32 pixels or more a side, to a list of four feature maps, shallow to deep.

    The weights are the ImageNet ones of the shared data. Distances on them are not LPIPS, which needs its own.

    Raises:
        ConfigError: no such backbone.
        WeightsError: the weights are not there.
    """
    if name not in BACKBONES:
        raise ConfigError(f"no perceptual backbone {name!r}; {nearest(name, sorted(BACKBONES))}")
    weights, taps = BACKBONES[name]
    model = load_model(f"torchvision:{name}", weights=weights)
    assert isinstance(model, Normalized)
    layers = model.network.features
    assert isinstance(layers, nn.Sequential)
    return PerceptualBackbone(layers, taps, IMAGENET_MEAN, IMAGENET_STD)
