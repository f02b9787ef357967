"""Channels of an edge: how much each tells of the class and of the image, what a choice of them costs, one kept file.

A characterization is made once, on public images, and used by everyone who starts from the same network.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from louver.attacks.base import Auxiliary
from louver.attacks.linear import feature_statistics, fit_flat, fit_local, to_grid
from louver.cut import split
from louver.defenses.pca import feature_chunks
from louver.errors import ConfigError, CutError, DataError, StorageError, nearest
from louver.measures.image import psnr
from louver.points import half_cost
from louver.storage import write_json
from louver.types import Images

__all__ = [
    "ChannelScore",
    "Characterization",
    "Choice",
    "Release",
    "channel_scores",
    "characterize",
    "edge_digest",
    "fisher_scores",
    "linear_psnr",
    "need_channels",
    "released",
    "select",
]

_MOST_FLOATS = 2**26
"""Features held at once (256 MiB)."""
_FEWEST_IMAGES = 10
_POOLED_SIDE = 4
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ChannelScore:
    """One channel: `fisher` (0 or more, higher tells more of the class), `psnr` in dB (higher tells more of the image).

    `psnr` is that of the best linear reconstruction from this channel alone; None where it was not asked for.
    """

    fisher: float
    psnr: float | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`n_channels` released at cut `cut`: how well they classify, how much they leak, what they cost per image.

    `accuracy` (0 to 1) is that of a softmax head on pooled features, lower than what a trained cloud reaches, the more
    so the earlier the cut. `psnr` in dB is that of the best linear inverse: at least so much leaks. Both are over
    random sets of channels: the mean accuracy, the highest PSNR.
    """

    cut: str
    n_channels: int
    accuracy: float
    psnr: float
    macs: int
    weight_bytes: int
    feature_bytes: int


@dataclass(frozen=True, kw_only=True)
class Characterization:
    """What `characterize` found: the `choices`, and for each cut the scores of all its channels.

    `edges` holds the digest of each cut's edge half: the figures are of these weights and no others.
    """

    network: str
    images: str
    n_images: int
    seed: int
    choices: tuple[Choice, ...]
    channels: dict[str, tuple[ChannelScore, ...]]
    edges: dict[str, str]
    format: int = _FORMAT

    def save(self, path: Path) -> Path:
        """Writes it as JSON, whole or not at all.

        Raises:
            StorageError: the disk refuses.
        """
        return write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Characterization:
        """What `save` wrote.

        Raises:
            DataError: the file is something else, or damaged.
            StorageError: it cannot be read.
        """
        try:
            found = pydantic.TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except OSError as error:
            raise StorageError(
                f"cannot read {path}: {error.strerror or error}; name a characterization file"
            ) from error
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise DataError(
                f"{path}: not a characterization, or damaged ({where}: {first['msg']}); make it again"
            ) from None
        if found.format != _FORMAT:
            raise DataError(f"{path}: expected characterization format {_FORMAT}, got {found.format}; make it again")
        return found

    def scores(self, cut: str, edge: nn.Module) -> tuple[ChannelScore, ...]:
        """The scores of the channels of `edge` at `cut`.

        Raises:
            ConfigError: the cut was not characterized, or the edge has other weights than the one that was.
        """
        if cut not in self.channels:
            raise ConfigError(f"the characterization has no cut {cut!r}; {nearest(cut, sorted(self.channels))}")
        if self.edges[cut] != edge_digest(edge):
            raise ConfigError(
                f"the characterization at cut {cut!r} is of another network or of other weights than this edge; "
                f"it was made of {self.network}: start from that, or characterize this one"
            )
        return self.channels[cut]


def characterize(
    model: nn.Module,
    example: Float[Tensor, "n c h w"],
    images: Images,
    targets: Int[Tensor, " m"],
    *,
    cuts: Sequence[str],
    widths: Sequence[int],
    n_images: int = 1500,
    n_draws: int = 2,
    seed: int = 0,
) -> Characterization:
    """Accuracy, leakage and cost of releasing D channels at cut m, for all `cuts` and `widths`, and of each channel.

    `images` (at most `n_images` of them, drawn by `seed`) should be public and like those to come. Every (m, D) is
    measured on `n_draws` random sets of channels; a width above a cut's channels is left out there. Reconstructions
    are linear, in closed form: a lower bound of what leaks, cheap enough for a whole grid.

    Raises:
        ConfigError: no width fits any cut, or a count below 1.
        CutError: no such cut, or its features have no channels in front of height and width.
        DataError: fewer than 10 images, targets of another length, or one class only.

    Source: PrivyNet (arXiv 1709.06161), the characterization of privacy loss, utility and cost over m and D; we
    differ: the reconstruction is linear and accuracy that of a linear head, where a network was trained for each.
    """
    if not cuts or not widths or min(*widths, n_images, n_draws) < 1:
        raise ConfigError("characterize: expected cuts, widths of 1 or more, n_images and n_draws of 1 or more")
    _check(images, targets)
    choices, channels, edges = [], {}, {}
    for name in cuts:
        halves = split(model, name, example)
        need_channels(name, halves.cut.feature_shape)
        features, pixels, classes = _sample(halves.edge, images, targets, n_images, seed)
        n_channels = features.shape[1]
        channels[name] = _scores(features, pixels, classes, has_psnr=True)
        edges[name] = edge_digest(halves.edge)
        draw = np.random.default_rng(seed)
        for width in sorted(set(widths)):
            if width > n_channels:
                continue
            sets = [np.sort(draw.permutation(n_channels)[:width]) for _ in range(n_draws if width < n_channels else 1)]
            kept = [features[:, torch.from_numpy(chosen)] for chosen in sets]
            cost = half_cost(released(halves.edge, torch.from_numpy(sets[0])), example)
            choices.append(
                Choice(
                    cut=name,
                    n_channels=width,
                    accuracy=float(np.mean([_head_accuracy(z, classes) for z in kept])),
                    psnr=max(linear_psnr(z, pixels) for z in kept),
                    macs=cost.macs,
                    weight_bytes=cost.weight_bytes,
                    feature_bytes=kept[0][0].numel() * kept[0].element_size(),
                )
            )
    if not choices:
        most = max(len(scores) for scores in channels.values())
        raise ConfigError(
            f"characterize: expected a width of at most {most}, the most channels there are, got {widths}"
        )
    return Characterization(
        network=type(model).__name__,
        images=images.name,
        n_images=min(n_images, len(images)),
        seed=seed,
        choices=tuple(choices),
        channels=channels,
        edges=edges,
    )


def select(
    characterization: Characterization,
    *,
    max_psnr: float | None = None,
    max_macs: int | None = None,
    max_bytes: int | None = None,
) -> Choice:
    """The most accurate choice within all limits: PSNR in dB, MACs of the edge per image, bytes of its weights.

    Of equally accurate ones that which leaks less, then that which computes less.

    Raises:
        ConfigError: none is within the limits, and the message lists the nearest; or a limit that is not above 0.

    Source: PrivyNet (arXiv 1709.06161): topology under constraints on privacy loss, local computation and storage.
    """
    limits = {"psnr": max_psnr, "macs": max_macs, "weight_bytes": max_bytes}
    given = {what: limit for what, limit in limits.items() if limit is not None}
    if any(not limit > 0 for limit in given.values()):
        raise ConfigError(f"select: expected limits above 0, got {given}")

    def excess(choice: Choice) -> float:
        over = {what: float(getattr(choice, what)) / limit - 1 for what, limit in given.items()}
        return sum(max(0.0, share) for share in over.values())

    within = [choice for choice in characterization.choices if excess(choice) == 0]
    if not within:
        near = sorted(characterization.choices, key=excess)[:3]
        shown = "; ".join(
            f"{c.cut!r} with {c.n_channels} channels ({c.psnr:.1f} dB, {c.macs:,} MACs, {c.weight_bytes:,} bytes)"
            for c in near
        )
        asked = ", ".join(f"{what} up to {limit:g}" for what, limit in given.items())
        raise ConfigError(f"no choice has {asked}; nearest: {shown}. Raise a limit, or characterize more cuts")
    return max(within, key=lambda choice: (choice.accuracy, -choice.psnr, -choice.macs))


def channel_scores(
    edge: nn.Module, images: Images, targets: Tensor, *, has_psnr: bool, n_images: int = 1500, seed: int = 0
) -> tuple[ChannelScore, ...]:
    """The scores of each channel of `edge`, on at most `n_images` of `images`; the edge gives (n, c, h, w).

    Raises:
        DataError: fewer than 10 images, targets of another length, or one class only.
    """
    _check(images, targets)
    return _scores(*_sample(edge, images, targets, n_images, seed), has_psnr=has_psnr)


def fisher_scores(
    responses: Float[Tensor, "n c d"], targets: Int[Tensor, " n"] | Int[Tensor, "n k"]
) -> Float[Tensor, " c"]:
    """tr(S_w⁺ S_b) of each channel's d pooled responses: 0 (classes have the same mean) or more, no unit.

    S_w and S_b are the scatter within and between classes. S_w⁺ is the pseudo-inverse: a direction in which no class
    varies adds nothing, so a dead channel scores 0, and repeated responses count once. Columns of targets (n, k) add.

    Raises:
        DataError: fewer than two classes in every column.

    Source: Fisher's linear discriminant as used by PrivyNet (arXiv 1709.06161); which form of it is our reading.

    Example:
        >>> spread = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1)
        >>> fisher_scores(spread, torch.tensor([0, 0, 1, 1]))
        tensor([4.], dtype=torch.float64)
    """
    centered = responses.double().transpose(0, 1)
    centered = centered - centered.mean(1, keepdim=True)
    total = torch.zeros(len(centered), dtype=torch.float64, device=responses.device)
    n_classes = 0
    for column in targets.reshape(len(targets), -1).T:
        classes, member = column.unique(return_inverse=True)
        n_classes = max(n_classes, len(classes))
        is_in = F.one_hot(member, len(classes)).double()
        counts = is_in.sum(0)
        means = (is_in.T @ centered) / counts[:, None]
        residual = centered - means[:, member]
        within = residual.transpose(1, 2) @ residual
        between = (means * counts[:, None]).transpose(1, 2) @ means
        inverse = torch.linalg.pinv(within, rtol=1e-10, hermitian=True)
        total += (inverse * between).sum((1, 2))
    if n_classes < 2:
        raise DataError(f"Fisher scores: expected 2 classes or more among {len(targets)} images, got {n_classes}")
    return total


def linear_psnr(features: Float[Tensor, "n ..."], images: Float[Tensor, "n c h w"]) -> float:
    """Mean PSNR in dB, over the last fifth of the images, of the best linear reconstruction: at least so much leaks.

    Fitted on the first three fifths; local or flat, and its ridge, are chosen on the fourth. Where neither is
    affordable, or the features are constant, the mean image stands in.
    """
    shape = (images.shape[1], images.shape[2], images.shape[3])
    n_train, n_seen = 3 * len(images) // 5, 4 * len(images) // 5
    train, validation = (
        Auxiliary(images=_Rows(images[part]), labels=None, features=_Rows(features[part]))
        for part in (slice(0, n_train), slice(n_train, n_seen))
    )
    truth, rest = images[n_seen:], features[n_seen:]
    best, guess = float("inf"), images[:n_train].mean(0).expand_as(truth)
    for fit, grid in ((fit_local, shape), (fit_flat, None)):
        mean, scale = feature_statistics(train, on_grid=grid)
        found = fit(train, validation, mean, scale, shape)
        if found is not None and found[1] < best:
            best = found[1]
            with torch.no_grad():
                guess = found[0](((to_grid(rest, shape) if grid else rest) - mean) * scale)
    return float(psnr(truth, guess.clamp(0, 1)).mean())


def edge_digest(edge: nn.Module) -> str:
    """A hash of an edge's weights: the same for two edges that were cut alike from the same network."""
    digest = hashlib.sha256()
    for value in edge.state_dict().values():
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Release(nn.Module):
    """An edge that sends some of its channels: those at `index`, which is the secret and is kept in this buffer only.

    With `is_removed` the body makes no others in the first place.
    """

    index: Tensor

    def __init__(self, body: nn.Module, index: Int[Tensor, " d"], *, is_removed: bool) -> None:
        super().__init__()
        self.body = body
        self.is_removed = is_removed
        self.register_buffer("index", index.clone())

    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """The released channels, (n, d, ...)."""
        z: Tensor = self.body(x)
        return z if self.is_removed else z.index_select(1, self.index)


def released(edge: nn.Module, index: Int[Tensor, " d"]) -> Release:
    """A copy of `edge` that sends the channels at `index`; `edge(x)[:, index]` up to rounding.

    Where a plain convolution makes the features (with batch normalization, activations and pooling after it, as they
    come), the filters of the other channels are removed, and their weights and MACs with them. Where features are a
    sum or anything else, all are computed and some are sent.
    """
    body = copy.deepcopy(edge)
    index = index.to(next((tensor.device for tensor in body.state_dict().values()), index.device))
    layers = _last_layers(body)
    for layer in layers:
        _keep(layer, index)
    return Release(body, index, is_removed=bool(layers))


_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_CHANNELWISE_FUNCTIONS = (F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, torch.relu, torch.sigmoid)


def _last_layers(body: nn.Module) -> list[nn.Module]:
    """The convolution that makes the features and the normalizations after it; nothing where others have a say."""
    if not isinstance(body, fx.GraphModule):
        return []
    calls = [body.get_submodule(str(node.target)) for node in body.graph.nodes if node.op == "call_module"]
    read = [str(node.target) for node in body.graph.nodes if node.op == "get_attr"]
    node = next(iter(reversed(body.graph.nodes))).args[0]
    layers: list[nn.Module] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.op == "call_function" and node.target in _CHANNELWISE_FUNCTIONS:
            node = node.args[0]
            continue
        if node.op != "call_module":
            return []
        layer = body.get_submodule(str(node.target))
        mine = {id(weight) for weight in layer.parameters()}
        owners = [m for m in body.modules() if mine & {id(weight) for weight in m.parameters(recurse=False)}]
        is_used_once = sum(called is layer for called in calls) == 1 and len(owners) <= 1
        has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks)
        is_plain = is_used_once and not has_hooks and not any(name.startswith(f"{node.target}.") for name in read)
        if type(layer) is nn.Conv2d and layer.groups == 1 and is_plain:
            return [*layers, layer]
        if type(layer) is nn.BatchNorm2d and is_plain:
            layers.append(layer)
        elif not isinstance(layer, _CHANNELWISE):
            return []
        node = node.args[0]
    return []


def _keep(layer: nn.Module, index: Tensor) -> None:
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.ndim:
            kept = value.detach()[index].clone()
            if isinstance(value, nn.Parameter):
                kept = nn.Parameter(kept, requires_grad=value.requires_grad)
            setattr(layer, name, kept)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = len(index)
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = len(index)


def need_channels(name: str, feature_shape: tuple[int, ...]) -> None:
    """Passes features of shape (c, h, w).

    Raises:
        CutError: they have another shape.
    """
    if len(feature_shape) != 3:
        raise CutError(
            f"cut {name!r}: expected features of shape (c, h, w) to choose channels of, got {feature_shape}; "
            "cut before the features are flattened"
        )


@dataclass(frozen=True)
class _Rows:
    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def rows(self, index: NDArray[np.int64]) -> Tensor:
        return self.tensor[torch.from_numpy(index)]


def _check(images: Images, targets: Tensor) -> None:
    if len(images) < _FEWEST_IMAGES or len(targets) != len(images):
        raise DataError(
            f"{images.name}: expected {_FEWEST_IMAGES} images or more, with a target each, to judge channels by; "
            f"got {len(images)} images and {len(targets)} targets"
        )


def _sample(
    edge: nn.Module, images: Images, targets: Tensor, n_images: int, seed: int
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 3 y x"], Tensor]:
    """Features, pixels and targets of images in an order drawn by `seed`, as many as fit in memory."""
    order = np.random.default_rng(seed).permutation(len(images))[:n_images]
    one = dataclasses.replace(images, pixels=images.pixels[order[:1]], labels={})
    floats = next(feature_chunks(edge, one)).numel() + int(np.prod(images.image_shape))
    order = order[: max(_FEWEST_IMAGES, _MOST_FLOATS // floats)]
    some = dataclasses.replace(images, pixels=images.pixels[order], labels={})
    features = torch.cat(list(feature_chunks(edge, some)))
    return features, torch.from_numpy(some.floats(slice(None))), targets[torch.from_numpy(order)].cpu()


def _scores(features: Tensor, pixels: Tensor, targets: Tensor, *, has_psnr: bool) -> tuple[ChannelScore, ...]:
    fisher = fisher_scores(_pooled(features), targets).tolist()
    return tuple(
        ChannelScore(fisher=score, psnr=linear_psnr(features[:, i : i + 1], pixels) if has_psnr else None)
        for i, score in enumerate(fisher)
    )


def _pooled(features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c d"]:
    height, width = features.shape[2:]
    return F.adaptive_avg_pool2d(features, (min(height, _POOLED_SIDE), min(width, _POOLED_SIDE))).flatten(2)


def _head_accuracy(features: Tensor, targets: Tensor) -> float:
    """Accuracy on the last two fifths of a softmax head that was fitted to the rest."""
    inputs, n_train = _pooled(features).flatten(1), 3 * len(features) // 5
    train = inputs[:n_train]
    inputs = (inputs - train.mean(0)) / (train.std(0) + 1e-6 * train.std() + 1e-12) / inputs.shape[1] ** 0.5
    classes, member = targets.unique(return_inverse=True)
    weight = torch.zeros(len(classes), inputs.shape[1], requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = F.linear(inputs[:n_train], weight, bias)
        loss = F.cross_entropy(scores, member[:n_train]) + 1e-3 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        right = F.linear(inputs[n_train:], weight, bias).argmax(1) == member[n_train:]
    return float(right.float().mean())
