"""The learned inverter: a wide residual network from features to pictures, trained anew against every edge."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.attacks.base import Auxiliary, Inverter, View
from louver.attacks.linear import (
    Layout,
    LinearInverse,
    block_size,
    feature_batches,
    feature_statistics,
    fit_flat,
    fit_local,
    to_grid,
)
from louver.attacks.mean_image import Constant, mean_image
from louver.devices import has_fast_bfloat16
from louver.errors import AttackError, ConfigError
from louver.measures.image import SSIM_MIN_SIDE, ssim
from louver.stochastic import drawing_from
from louver.types import Progress, share_of

__all__ = ["Decoder"]

_MOST_PIXELS = 2**18
"""Positions of the half-size grid in one batch: bounds the memory of training at large pictures."""
_MOST_GUESS_FLOATS = 2**27
"""Half a gigabyte of first guesses is kept; beyond it they are computed for each batch."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Trains a decoder on (feature, auxiliary image) pairs and keeps the epoch that is best on auxiliary validation.

    It starts from the best linear inverse in closed form and learns what that misses; there is no bottleneck: `width`
    channels at every layer, at least 64. Features are standardised per channel, so a contractive edge hides nothing.
    `layout` "local" keeps the spatial order of features, "flat" knows none; "auto" tries both where the flat linear
    inverse is the better one. `restarts` networks of each layout train for `trial_steps` batches; the one that is best
    on auxiliary validation goes on for `epochs` under a falling learning rate; `patience` epochs without a better one
    end it early.

    Raises:
        ConfigError: a knob outside its range.
        ThreatError: (from `prepare`) the threat model grants no auxiliary images, or no features of them.
        AttackError: (from `prepare`) training broke in every restart.

    Source: ours, after He et al., "Model inversion attacks against collaborative inference" (ACSAC 2019), section 5:
    theirs is narrower, has no closed-form start and uses the squared error alone.
    """

    width: int = 96
    blocks: int = 3
    epochs: int = 20
    trial_steps: int = 100
    restarts: int = 3
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    loss: Literal["mse", "ssim", "mixed"] = "mixed"
    layout: Literal["auto", "local", "flat"] = "auto"
    patience: int = 8

    def __post_init__(self) -> None:
        if self.width < 64 or self.width % 4:
            raise ConfigError(
                f"Decoder: expected width of 64 or more, a multiple of 4, got {self.width}; "
                "a narrow decoder makes a weak defense look strong"
            )
        for name in ("blocks", "epochs", "trial_steps", "restarts", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Decoder: expected {name} of 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"Decoder: expected a positive learning_rate, got {self.learning_rate}")

    @property
    def needs(self) -> frozenset[str]:
        """Auxiliary images and their features."""
        return frozenset({"auxiliary", "query"})

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        """Fit to the edge behind `view`."""
        train, validation = view.need_features("Decoder")
        runs: list[_Run] = []
        starts = _starts(train, validation, view.image_shape, self.layout)
        n_trials = len(starts) * self.restarts
        trials, epochs = share_of(progress, 0.0, 0.2), share_of(progress, 0.2, 1.0)
        for base, mean, scale in starts:
            guesses = (
                # Of features that are drawn anew at each look nothing can be known before.
                _first_guesses(base, train, mean, scale, view.device) if train.fresh is None else None,
                _first_guesses(base, validation, mean, scale, view.device),
            )
            for restart in range(self.restarts):
                network = _build(self, view, base, mean, scale, seed=seed + restart)
                run = _Run(self, network, train, validation, guesses=guesses, device=view.device, seed=seed + restart)
                runs.append(run)
                if n_trials > 1:
                    run.epoch(0, most_steps=self.trial_steps)
                    trials(f"trial {len(runs)}/{n_trials}, {base.layout}", len(runs) / n_trials)
        run = min(runs, key=lambda r: r.last_error)
        for epoch in range(self.epochs):
            run.epoch(epoch)
            if run.stale >= self.patience:
                break
            epochs(f"epoch {epoch + 1}/{self.epochs}, validation loss {run.best_error:.5f}", (epoch + 1) / self.epochs)
        if not math.isfinite(run.last_error):
            raise AttackError(
                f"Decoder: training diverged in the best of {self.restarts} restarts; lower learning_rate"
            )
        trained = run.best()
        return trained if _listens(trained, validation) else Constant(mean_image(train))

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The trained decoder again."""
        if "image" in state:
            return Constant(state["image"])
        is_flat = state["base.weight"].ndim == 2
        grid = tuple(int(side) for side in state["grid"])
        base = LinearInverse(
            layout="flat" if is_flat else "local",
            weight=state["base.weight"],
            bias=state["base.bias"],
            image_shape=view.image_shape,
            grid=(grid[0], grid[1]),
        )
        network = _build(self, view, base, state["mean"], state["scale"], seed=0)
        network.load_state_dict({name: tensor for name, tensor in state.items() if name != "grid"})
        return _Trained(network, view.device)


def _starts(
    train: Auxiliary, validation: Auxiliary, image_shape: tuple[int, int, int], layout: str
) -> list[tuple[LinearInverse, Tensor, Tensor]]:
    """The linear inverses to start from, each with mean and scale of the features, of the layouts that are allowed.

    Both layouts are worth a trial where the flat inverse has the smaller error: it sees the whole picture, yet a
    network that keeps the order of features in space may end far better from a poorer start.
    """
    assert train.features is not None
    local: tuple[LinearInverse, float] | None = None
    starts: list[tuple[LinearInverse, Tensor, Tensor]] = []
    if layout != "flat":
        mean, scale = feature_statistics(train, on_grid=image_shape)
        local = fit_local(train, validation, mean, scale, image_shape)
        if local is not None:
            starts.append((local[0], mean, scale))
    # A flat inverse of large features takes a minute; it is tried where the local one leaves much unexplained.
    is_explained = local is not None and local[1] < 0.25 * _variance(validation)
    if layout == "flat" or (layout == "auto" and not is_explained):
        mean, scale = feature_statistics(train)
        flat = fit_flat(train, validation, mean, scale, image_shape)
        if flat is not None and (local is None or flat[1] < local[1]):
            starts.append((flat[0], mean, scale))
    return starts or [_mean_start(train, image_shape)]


def _first_guesses(
    base: LinearInverse, part: Auxiliary, mean: Tensor, scale: Tensor, device: torch.device
) -> Tensor | None:
    """A flat inverse never changes and is a large matrix: what it makes of each image is computed once, (n, c, h, w).

    None for a local inverse, which is cheap, and for more than memory should hold.
    """
    features = part.features
    assert features is not None
    if base.layout == "local" or len(part.images) * math.prod(base.image_shape) > _MOST_GUESS_FLOATS:
        return None
    there, mean, scale = copy.deepcopy(base).to(device), mean.to(device), scale.to(device)
    rows = (features.rows(index).to(device) for index in feature_batches(part))
    return torch.cat([there((batch - mean) * scale).cpu() for batch in rows])


def _variance(validation: Auxiliary) -> float:
    """Mean squared distance of validation pictures from their mean."""
    pictures = validation.images.rows(np.arange(min(len(validation.images), 512)))
    return float((pictures - pictures.mean(0)).square().mean())


def _listens(inverter: Inverter, validation: Auxiliary) -> bool:
    """Whether pictures come out better with their own features than with those of the next image.

    A decoder that hears nothing can still learn the one picture that scores best, which is not what the features gave
    away; where its own features help by less than two standard errors, it is replaced by the floor.
    """
    features = validation.features
    assert features is not None
    count = len(validation.images)
    gains = []
    for index in feature_batches(validation):
        truth = validation.images.rows(index)
        own, other = (inverter(features.rows(i % count)) for i in (index, index + 1))
        gains.append((other - truth).square().mean((1, 2, 3)) - (own - truth).square().mean((1, 2, 3)))
    gain = torch.cat(gains).double()
    return bool(gain.mean() > 2 * gain.std() / count**0.5)


def _mean_start(train: Auxiliary, image_shape: tuple[int, int, int]) -> tuple[LinearInverse, Tensor, Tensor]:
    """Features too large for a closed form: start local, from the mean auxiliary picture's color."""
    assert train.features is not None
    mean, scale = feature_statistics(train, on_grid=image_shape)
    probe = to_grid(train.features.rows(np.arange(1)), image_shape)
    grid = (probe.shape[2], probe.shape[3])
    size = block_size(image_shape, grid)
    color = train.images.rows(np.arange(min(len(train.images), 256))).mean((0, 2, 3))
    weight = torch.zeros(image_shape[0] * size * size, probe.shape[1], 1, 1)
    bias = color.repeat_interleave(size * size)
    return LinearInverse(layout="local", weight=weight, bias=bias, image_shape=image_shape, grid=grid), mean, scale


class _Block(nn.Module):
    """x + conv(act(conv(x))); the last convolution starts at zero, so depth costs nothing at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(_bias(self.second))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


class _Network(nn.Module):
    """Linear inverse plus a residual: features and first guess in, a correction out.

    Works at half the picture's resolution and shuffles the last doubling out, where a convolution costs a quarter.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        attack: Decoder,
        base: LinearInverse,
        mean: Tensor,
        scale: Tensor,
        in_channels: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.layout: Layout = base.layout
        self.image_shape = image_shape
        channels, height, width = image_shape
        self.half_grid = (-(-height // 2), -(-width // 2))
        self.base = base
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        wide = attack.width
        grid = base.grid if base.layout == "local" else (-(-height // 8), -(-width // 8))
        self.grid = grid
        if base.layout == "flat":
            self.spread: nn.Module = nn.Linear(in_channels, 32 * grid[0] * grid[1])
            in_channels = 32
        doublings = max(0, round(math.log2(max(self.half_grid[0] / grid[0], self.half_grid[1] / grid[1]))))
        self.enter = nn.Conv2d(in_channels, wide, 3, padding=1)
        self.climb = nn.ModuleList(
            nn.ModuleList([*(_Block(wide) for _ in range(attack.blocks)), nn.Conv2d(wide, wide * 4, 1)])
            for _ in range(doublings)
        )
        self.meet = nn.Conv2d(channels * 4, wide, 3, padding=1)
        self.finish = nn.ModuleList(_Block(wide) for _ in range(attack.blocks))
        self.leave = nn.Conv2d(wide, channels * 4, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(_bias(self.leave))

    def rows_that_fit(self) -> int:
        """Pictures in one batch of bounded memory."""
        return max(1, _MOST_PIXELS // (self.half_grid[0] * self.half_grid[1]))

    def forward(
        self, features: Tensor, *, guess: Tensor | None = None, is_half_precision: bool = False
    ) -> Float[Tensor, "n c h w"]:
        """Pictures, not clamped, of raw features. The linear path stays in float32: bfloat16 ends at about 48 dB.

        `guess` is what the linear inverse makes of the same features, where that is known already.
        """
        if self.layout == "local":
            features = to_grid(features, self.image_shape)
        standardized = (features - self.mean) * self.scale
        if guess is None:
            guess = self.base(standardized)
        # A rare channel may reach far beyond its deviation; bounded, it cannot throw the trunk off.
        standardized = standardized.clamp(-10, 10)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=is_half_precision):
            correction = self._trunk(standardized, guess)
        _, height, width = self.image_shape
        picture: Tensor = guess + F.pixel_shuffle(correction.float(), 2)[:, :, :height, :width]
        return picture

    def _trunk(self, standardized: Tensor, guess: Tensor) -> Tensor:
        if self.layout == "flat":
            standardized = self.spread(standardized.flatten(1)).unflatten(1, (32, *self.grid))
        x = self.enter(standardized.contiguous(memory_format=torch.channels_last))
        for stage in self.climb:
            for layer in stage:  # type: ignore[attr-defined]
                x = layer(x)
            x = F.pixel_shuffle(x, 2)
        if x.shape[2:] != torch.Size(self.half_grid):
            x = F.interpolate(x, self.half_grid, mode="bilinear", align_corners=False)
        pad = (0, guess.shape[3] % 2, 0, guess.shape[2] % 2)
        x = x + self.meet(F.pixel_unshuffle(F.pad(guess, pad), 2) - 0.5)
        for block in self.finish:
            x = block(x)
        out: Tensor = self.leave(F.relu(x))
        return out


def _build(attack: Decoder, view: View, base: LinearInverse, mean: Tensor, scale: Tensor, *, seed: int) -> _Network:
    in_channels = mean.shape[1] if base.layout == "local" else int(np.prod(view.feature_shape))
    with drawing_from(seed):
        network = _Network(attack, base, mean, scale, in_channels, view.image_shape)
    return network.to(view.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class _Trained:
    """A decoder at its best epoch."""

    def __init__(self, network: _Network, device: torch.device) -> None:
        self._network = network.eval()
        self._device = device

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        network, device = self._network, self._device
        with torch.no_grad():
            parts = [network(part.to(device)).clamp(0, 1).cpu() for part in features.split(network.rows_that_fit())]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._network.state_dict().items()}
        return tensors | {"grid": torch.tensor(self._network.base.grid)}


class _Run:
    """One network in training, with the moving average of its weights that is judged and kept."""

    def __init__(
        self,
        attack: Decoder,
        network: _Network,
        train: Auxiliary,
        validation: Auxiliary,
        *,
        guesses: tuple[Tensor | None, Tensor | None] = (None, None),
        device: torch.device,
        seed: int,
    ) -> None:
        self._attack = attack
        self._network = network
        self._average = {name: p.detach().clone() for name, p in network.named_parameters()}
        self._train, self._validation = train, validation
        self._device = device
        self._batch_size = min(attack.batch_size, network.rows_that_fit())
        self._shuffle = np.random.default_rng(seed)
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=attack.learning_rate, weight_decay=1e-4)
        self._step = 0
        self._is_half = has_fast_bfloat16(device)
        self._train_guesses, self._validation_guesses = guesses
        self.stale = 0
        self._keep(self._judge())

    def _answer(self, part: Auxiliary, index: NDArray[np.int64]) -> Tensor:
        assert part.features is not None
        is_learning = part is self._train
        known = self._train_guesses if is_learning else self._validation_guesses
        features = part.fresh if is_learning and part.fresh is not None else part.features
        return self._network(  # type: ignore[no-any-return]
            features.rows(index).to(self._device),
            guess=None if known is None else known[torch.from_numpy(index)].to(self._device),
            is_half_precision=self._is_half,
        )

    def _keep(self, error: float) -> None:
        self.best_error = self.last_error = error
        self._best = {name: tensor.clone() for name, tensor in self._average.items()}

    def epoch(self, number: int, *, most_steps: int | None = None) -> None:
        """One pass over the auxiliary images, or the first `most_steps` of it, then a look at auxiliary validation."""
        attack, n = self._attack, len(self._train.images)
        order = self._shuffle.permutation(n)
        steps = max(1, n // self._batch_size)
        self._network.train()
        for i in range(min(steps, most_steps or steps)):
            index = np.sort(order[i * self._batch_size : (i + 1) * self._batch_size])
            for group in self._optimizer.param_groups:
                group["lr"] = attack.learning_rate * _schedule(number + i / steps, attack.epochs)
            truth = self._train.images.rows(index).to(self._device)
            guess = self._answer(self._train, index)
            loss = _loss(attack.loss, guess, truth)
            if not bool(loss.isfinite()):
                self.last_error = math.inf
                self.stale = attack.patience
                return
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
            self._optimizer.step()
            self._step += 1
            decay = min(0.995, (1 + self._step) / (10 + self._step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self._average.values()), [p.detach() for p in self._network.parameters()], 1 - decay
                )
        error = self._judge()
        self.last_error = error
        self.stale += 1
        if error < self.best_error:
            self.stale = 0
            self._keep(error)

    def _judge(self) -> float:
        """Validation error of the averaged weights, in the precision of training."""
        own = {name: p.detach().clone() for name, p in self._network.named_parameters()}
        self._load(self._average)
        self._network.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(self._validation.images), self._batch_size):
                index: NDArray[np.int64] = np.arange(start, min(start + self._batch_size, len(self._validation.images)))
                guess = self._answer(self._validation, index).clamp(0, 1)
                truth = self._validation.images.rows(index).to(self._device)
                total += float(_loss(self._attack.loss, guess, truth)) * len(index)
                count += len(index)
        self._load(own)
        return total / count

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(weights[name])

    def best(self) -> _Trained:
        """The decoder at its best epoch."""
        self._load(self._best)
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)
        return _Trained(self._network, self._device)


def _schedule(epoch: float, epochs: int) -> float:
    """A tenth of an epoch of warm-up, then a cosine to zero."""
    return min(1.0, epoch / 0.1 + 0.05) * 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))


def _loss(kind: str, guess: Tensor, truth: Tensor) -> Tensor:
    """Squared error, structural dissimilarity, or both: SSIM weighs what a person sees, MSE keeps colors in place.

    Pictures too small for a window of SSIM are judged by their squared error. NaN comes out as NaN.
    """
    squared = F.mse_loss(guess, truth)
    if kind == "mse" or min(truth.shape[2:]) < SSIM_MIN_SIDE or not bool(squared.isfinite()):
        return squared
    inside = guess.clamp(0, 1)
    # Beyond the range SSIM has no gradient; the excess brings such pixels back.
    dissimilarity = 1 - ssim(truth, inside).mean() + (guess - inside).square().mean()
    return dissimilarity if kind == "ssim" else squared + 0.02 * dissimilarity
