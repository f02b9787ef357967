"""PrivyNet: a frozen edge that releases few, well-chosen channels; only the cloud is trained."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from louver.cut import Split, joined
from louver.defenses.base import Defense, FrozenEdge, Pressure
from louver.defenses.channels import ChannelScore, Characterization, channel_scores, need_channels, released
from louver.defenses.pca import feature_chunks
from louver.errors import ConfigError, nearest
from louver.types import Images

__all__ = ["PrivyNet", "choose_channels"]

_CHOICES = ("fisher", "random", "all")
_RIDGE = 1e-6


@final
@dataclass(frozen=True, kw_only=True)
class PrivyNet(Defense):
    """An edge that stays as it came and sends `n_channels` of its channels to a cloud that guesses all and is trained.

    Channels are chosen in three steps: the share `drop_leaky` of them whose own reconstructions are best goes; of the
    rest the most discriminative `n_channels`·(1 + `spare`) stay; `n_channels` of these are drawn, and which is secret.
    choice: "random" skips the middle step, "all" sends everything. The secret is drawn from the operating system's
    entropy, or from `secret_seed` where a run must be repeatable. It is worth little against someone who knows the
    network: log2 of the number of possible sets, which is 9 bits for 8 of 12.

    characterization: a file made by `louver.defenses.channels.characterize` from the same network on public images, so
    that nothing is learned from private ones; None judges channels on the training images. The number of layers m is
    where the split is cut; `louver.defenses.channels.select` finds m and `n_channels` under constraints.

    Raises:
        ConfigError: a knob outside its range; (from `operate`) too few channels, or a characterization of another
            network.
        CutError: (from `operate`) features without channels in front of height and width.
        DataError: (from `operate`) fewer than 10 images or 2 classes to judge channels by, or a damaged file.

    Source: PrivyNet (arXiv 1709.06161): frozen pre-trained local network, number of layers and of channels, and which.
    We differ where the source is not known to us: the form of the Fisher score, privacy loss by linear reconstruction,
    and the convolution in front of the cloud that starts as the least squares guess of all channels.
    """

    n_channels: int | None = None
    choice: Literal["fisher", "random", "all"] = "fisher"
    drop_leaky: float = 0.25
    spare: float = 0.5
    characterization: Path | None = None
    secret_seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.choice not in _CHOICES:
            raise ConfigError(f"PrivyNet: no choice {self.choice!r}; {nearest(str(self.choice), list(_CHOICES))}")
        if (self.n_channels is None) != (self.choice == "all"):
            raise ConfigError(
                f'PrivyNet: expected n_channels with choice "fisher" or "random" and none with "all", '
                f"got n_channels = {self.n_channels} with {self.choice!r}"
            )
        rules = {
            "n_channels": ("1 or more", self.n_channels is None or self.n_channels >= 1),
            "drop_leaky": ("a share from 0 to below 1", 0 <= self.drop_leaky < 1),
            "spare": ("0 or more", 0 <= self.spare < math.inf),
        }
        for what, (expected, holds) in rules.items():
            if not holds:
                raise ConfigError(f"PrivyNet: expected {what} {expected}, got {getattr(self, what)}")

    def operate(self, split: Split, images: Images, targets: Tensor, *, seed: int) -> Split:
        """The split with fewer channels sent, and a 1×1 convolution in front of the cloud that guesses them all."""
        if self.n_channels is None:
            return split
        need_channels(split.cut.name, split.cut.feature_shape)
        n_all = split.cut.feature_shape[0]
        draw = random.SystemRandom() if self.secret_seed is None else random.Random(self.secret_seed)
        chosen = choose_channels(
            self._scores(split, images, targets, seed),
            self.n_channels,
            drop_leaky=self.drop_leaky,
            spare=self.spare if self.choice == "fisher" else math.inf,
            draw=draw,
        )
        widen = nn.Conv2d(self.n_channels, n_all, 1)
        weight, bias = _regression(split.edge, images, chosen)
        with torch.no_grad():
            widen.weight.copy_(weight[:, :, None, None])
            widen.bias = nn.Parameter(bias)
        device = next((tensor.device for tensor in split.state_dict().values()), torch.device("cpu"))
        example = torch.from_numpy(images.floats(slice(0, 2))).to(device)
        edge = released(split.edge, chosen).to(device)
        return joined(edge, _cloud(split, widen.to(device)), example, name=split.cut.name)

    def pressure(self, split: Split, *, is_mending: bool, seed: int) -> Pressure:
        """A frozen edge: the cloud is trained on the task alone."""
        return FrozenEdge()

    def rebuild(self, split: Split, state: Mapping[str, Tensor]) -> Split:
        """The undefended split with the channels that `state` names."""
        if self.n_channels is None:
            return split
        index, weight = state["edge.index"], state["cloud.widen.weight"]
        widen = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        shape = (len(index), *split.cut.feature_shape[1:])
        return Split(released(split.edge, index), _cloud(split, widen), replace(split.cut, feature_shape=shape))

    def _scores(self, split: Split, images: Images, targets: Tensor, seed: int) -> Sequence[ChannelScore]:
        if self.characterization is not None:
            return Characterization.load(Path(self.characterization)).scores(split.cut.name, split.edge)
        if self.choice == "random" and not self.drop_leaky:
            return [ChannelScore(fisher=0.0, psnr=None)] * split.cut.feature_shape[0]
        return channel_scores(split.edge, images, targets, has_psnr=self.drop_leaky > 0, seed=seed)


def choose_channels(
    scores: Sequence[ChannelScore], n_channels: int, *, drop_leaky: float, spare: float, draw: random.Random
) -> Int[Tensor, " d"]:
    """Indices of `n_channels` channels, rising: not the leakiest, of the most discriminative, and then by chance.

    The ceil of `drop_leaky` times their number goes first. With `spare` 0 nothing is left to chance; infinite, the
    Fisher scores have no say.

    Raises:
        ConfigError: fewer than `n_channels` are left, or the leakiest are asked for and were not measured.

    Example:
        >>> scores = [ChannelScore(fisher=f, psnr=p) for f, p in [(9, 40), (2, 12), (5, 14), (1, 10)]]
        >>> choose_channels(scores, 2, drop_leaky=0.25, spare=0, draw=random.Random(0))
        tensor([1, 2])
    """
    n_leaky = math.ceil(drop_leaky * len(scores) - 1e-9)
    n_left = len(scores) - n_leaky
    if n_channels > n_left:
        raise ConfigError(
            f"PrivyNet: expected n_channels of at most {n_left}, what drop_leaky = {drop_leaky:g} leaves of "
            f"{len(scores)} channels, got {n_channels}; ask for fewer or drop fewer"
        )
    left = list(range(len(scores)))
    if n_leaky:
        loss = [score.psnr for score in scores]
        if None in loss:
            raise ConfigError(
                "PrivyNet: drop_leaky needs the PSNR of every channel; characterize with it, or set it to 0"
            )
        left = sorted(left, key=lambda i: loss[i] or 0.0)[:n_left]
    pool = n_left if math.isinf(spare) else min(n_left, math.ceil(n_channels * (1 + spare) - 1e-9))
    best = sorted(left, key=lambda i: -scores[i].fisher)[:pool]
    return torch.tensor(sorted(draw.sample(best, n_channels)))


def _regression(
    edge: nn.Module, images: Images, chosen: Int[Tensor, " d"]
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Weight and bias by which the chosen channels of a position best give all of them, over all images."""
    count, pivot = 0, torch.zeros(0)
    total, squares = torch.zeros(0), torch.zeros(0)
    for features in feature_chunks(edge, images):
        columns = features.transpose(0, 1).flatten(1)
        if not count:
            pivot = columns.double().mean(1).float()
            total = torch.zeros(len(pivot), dtype=torch.float64)
            squares = torch.zeros(len(pivot), len(pivot), dtype=torch.float64)
        columns = columns - pivot[:, None]
        count += columns.shape[1]
        total += columns.sum(1, dtype=torch.float64)
        squares += (columns @ columns.T).double()
    shift = total / count
    covariance = squares / count - torch.outer(shift, shift)
    mean = pivot.double() + shift
    known = covariance[chosen][:, chosen]
    # A channel that never changes explains nothing; the ridge keeps the system solvable with it.
    ridge = _RIDGE * float(known.diagonal().mean()) + torch.finfo(torch.float32).tiny
    damped = known + ridge * torch.eye(len(chosen), dtype=torch.float64)
    weight = torch.linalg.solve(damped, covariance[chosen]).T
    return weight.float(), (mean - weight @ mean[chosen]).float()


def _cloud(split: Split, widen: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict(widen=widen, body=copy.deepcopy(split.cloud)))
