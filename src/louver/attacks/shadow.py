"""Query-free inversion: train a substitute for the edge that the cloud half accepts, then invert the substitute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from louver.attacks.base import Auxiliary, Inverter, View
from louver.attacks.decoder import Decoder
from louver.attacks.linear import feature_statistics, standardization
from louver.errors import AttackError, ConfigError, DataError, ThreatError
from louver.stochastic import drawing_from
from louver.types import Progress, share_of

__all__ = ["Shadow"]

_ENOUGH_TO_ALIGN = 8
"""Fewer features than this have no statistics worth the name."""


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """Fits a substitute edge so that the true cloud half labels auxiliary images rightly, then trains `decoder` on it.

    Needs labels of the auxiliary images, and neither the edge nor one query to it. The substitute's features are also
    drawn to the means and variances that the cloud's batch normalisation remembers, where it has any: they describe
    the features that the cloud was trained on.

    Raises:
        ConfigError: a knob outside its range.
        ThreatError: (from `prepare`) no auxiliary images or no labels for them.
        AttackError: (from `prepare`) the substitute diverged.

    Source: query-free attack of He et al., "Model inversion attacks against collaborative inference" (ACSAC 2019),
    section 6; we differ: the statistics of batch normalisation are matched too, and the true features are brought
    to the substitute's scale before they are inverted.
    """

    width: int = 64
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-3
    statistics_weight: float = 0.1
    decoder: Decoder = field(default_factory=lambda: Decoder(restarts=1, epochs=12))

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Shadow: expected {name} of 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0 or self.statistics_weight < 0:
            raise ConfigError(
                "Shadow: expected a positive learning_rate and a statistics_weight of 0 or more, "
                f"got {self.learning_rate} and {self.statistics_weight}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Labelled images; no access to the edge."""
        return frozenset({"auxiliary"})

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        """Train the substitute, then the decoder against it."""
        train, validation = view.need_auxiliary("Shadow")
        if train.labels is None:
            raise ThreatError(
                "Shadow needs labels of the auxiliary images: name the label column of the task, or drop the attack"
            )
        with drawing_from(seed):
            substitute = _Substitute(view.image_shape, view.feature_shape, self.width).to(view.device)
        self._fit(substitute, view, train, seed, share_of(progress, 0.0, 0.3))
        substitute.eval().requires_grad_(False)

        def seen(auxiliary: Auxiliary) -> Auxiliary:
            return replace(auxiliary, features=_SubstituteRows(substitute, auxiliary, view.device))

        shadow_view = replace(view, train=seen(train), validation=seen(validation), edge=None)
        mean, scale = feature_statistics(seen(train))
        inner = self.decoder.prepare(shadow_view, seed=seed, progress=share_of(progress, 0.3, 1.0))
        return _Aligned(inner, mean, scale)

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The decoder of the substitute again."""
        inner = {name.removeprefix("decoder."): state[name] for name in state if name.startswith("decoder.")}
        return _Aligned(self.decoder.restore(view, inner), state["substitute.mean"], state["substitute.scale"])

    def _fit(self, substitute: nn.Module, view: View, train: Auxiliary, seed: int, progress: Progress) -> None:
        assert train.labels is not None
        cloud = copy.deepcopy(view.cloud).eval().requires_grad_(False).to(view.device)
        optimizer = torch.optim.AdamW(substitute.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        shuffle, n = np.random.default_rng(seed), len(train.images)
        steps_per_epoch = max(1, n // self.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=self.epochs * steps_per_epoch
        )
        with _Statistics(cloud) as statistics:
            for epoch in range(self.epochs):
                order = shuffle.permutation(n)
                for i in range(steps_per_epoch):
                    index = np.sort(order[i * self.batch_size : (i + 1) * self.batch_size])
                    images = train.images.rows(index).to(view.device)
                    labels = train.labels[torch.from_numpy(index)].to(view.device)
                    statistics.clear()
                    outputs = cloud(substitute(images))
                    if outputs.ndim != 2 or int(labels.max()) >= outputs.shape[1] or int(labels.min()) < 0:
                        raise DataError(
                            f"Shadow: expected labels in 0..{outputs.shape[-1] - 1}, the classes of the cloud half, "
                            f"got {int(labels.min())}..{int(labels.max())}; name the column it was trained on"
                        )
                    loss = F.cross_entropy(outputs, labels) + self.statistics_weight * statistics.mismatch()
                    if not bool(loss.isfinite()):
                        raise AttackError(f"Shadow: the substitute diverged in epoch {epoch + 1}; lower learning_rate")
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                progress(f"substitute, epoch {epoch + 1}/{self.epochs}", (epoch + 1) / self.epochs)


@dataclass(frozen=True)
class _Aligned:
    """A decoder of the substitute's features, fed with true ones brought to the same mean and deviation per channel.

    The attacker sees the features that it inverts, so their statistics are its own to take; the substitute's features
    agree with them in kind at best, not in scale.
    """

    decoder: Inverter
    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        if len(features) >= _ENOUGH_TO_ALIGN:
            mean, scale = standardization(iter([features]))
            deviation = torch.where(self.scale > 0, 1 / self.scale.clamp(min=1e-30), 0.0)
            features = (features - mean) * scale * deviation + self.mean
        return self.decoder(features, progress=progress)

    def state(self) -> dict[str, Tensor]:
        own = {"substitute.mean": self.mean, "substitute.scale": self.scale}
        return own | {f"decoder.{name}": tensor for name, tensor in self.decoder.state().items()}


class _Statistics:
    """How far a batch strays from what the batch normalisation layers of a network remember."""

    def __init__(self, network: nn.Module) -> None:
        self._layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        self._terms: list[Tensor] = []

    def __enter__(self) -> _Statistics:
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        if layer.running_mean is None or layer.running_var is None:
            return
        columns = inputs[0].transpose(0, 1).flatten(1)
        deviation = (layer.running_var + layer.eps).sqrt()
        shift = ((columns.mean(1) - layer.running_mean) / deviation).square().mean()
        spread = ((columns.var(1) + layer.eps).sqrt() / deviation - 1).square().mean()
        self._terms.append(shift + spread)

    def clear(self) -> None:
        """Forget the last batch."""
        self._terms = []

    def mismatch(self) -> Tensor:
        """Mean over the layers; 0 where there are none."""
        return torch.stack(self._terms).mean() if self._terms else torch.tensor(0.0)


class _Substitute(nn.Module):
    """An image-to-feature network of no particular architecture: strided convolutions, then a fit to the shape."""

    def __init__(self, image_shape: tuple[int, int, int], feature_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        height = image_shape[1]
        target = feature_shape[1] if len(feature_shape) == 3 else 4
        while height >= 2 * target and height > 1:
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            height = -(-height // 2)
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        if len(feature_shape) == 3:
            self.head: nn.Module = nn.Conv2d(width, feature_shape[0], 3, padding=1)
        else:
            self.head = nn.Linear(width * 16, int(np.prod(feature_shape)))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """Features of the shape that the cloud half takes."""
        x = self.body(x)
        if len(self.feature_shape) == 3:
            if x.shape[2:] != self.feature_shape[1:]:
                x = F.adaptive_avg_pool2d(x, self.feature_shape[1:])
            out: Tensor = self.head(x)
            return out
        flat: Tensor = self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return flat.view(-1, *self.feature_shape)


@dataclass(frozen=True)
class _SubstituteRows:
    """Features of the substitute, computed as they are asked for: it is small, and holds no secret to keep."""

    substitute: nn.Module
    auxiliary: Auxiliary
    device: torch.device

    def __len__(self) -> int:
        return len(self.auxiliary.images)

    def rows(self, index: np.ndarray) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.substitute(self.auxiliary.images.rows(index).to(self.device)).cpu()
        return out
