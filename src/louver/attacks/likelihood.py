"""Maximum likelihood under the known edge: search for the picture whose features are the ones that came."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from louver.attacks.base import Auxiliary, Inverter, View
from louver.attacks.linear import feature_statistics
from louver.attacks.mean_image import Constant, mean_image
from louver.devices import has_fast_bfloat16
from louver.errors import AttackError, ConfigError
from louver.stochastic import Noise, RandomMask, silenced
from louver.types import Progress

__all__ = ["Likelihood"]

_COARSE_SHARE = 0.5
"""Share of the steps that compute in bfloat16 where it is fast; the rest, at small step sizes, are in float32."""

_SLOWER = 0.4
_SLOWEST = 0.02
"""An image whose objective stalls takes steps of 0.4 of the size, and is done below 0.02 of the first."""

_SOLVED = 1e-10
"""A misfit below this, in units of the features' variance, leaves nothing to search for."""

_ENOUGH = 2048
"""Auxiliary images that fix a mean and a deviation well."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Per image, minimises |E(x) − z|² / d + tv · TV(x) + l2 · |x − x₀|² / pixels by Adam, x kept in [0,1].

    Features are measured in units of their deviation per channel. `starts` are the pictures x₀ to search from: "mean"
    (the mean auxiliary image), "noise", and "earlier" (what each attack that ran before it, such as the decoder, made
    of z; passed over where there is none). `tv` and `l2` are swept, together with the starts, on
    `n_sweep` auxiliary validation images, whose truth the attacker knows; the best setting is then used for all, with
    `restarts` runs an image, of which the one with the smallest objective is kept. The step size falls from
    `learning_rate` along a cosine, and sooner for an image whose objective fell by less than `tolerance` (relative)
    over `check_every` steps; an image that stalls at small steps too is done and leaves the batch.

    Raises:
        ConfigError: a knob outside its range.
        ThreatError: (from `prepare`) the threat model does not grant the edge, or no auxiliary images.
        AttackError: (from the inverter) the search produced NaN.

    Source: rMLE of He et al., "Model inversion attacks against collaborative inference" (ACSAC 2019), section 4; we
    differ: batched, standardised features, swept weights, a warm start, a stop for each image, pixels projected.
    """

    steps: int = 400
    sweep_steps: int = 150
    learning_rate: float = 0.02
    tv: tuple[float, ...] = (0.0, 1e-2, 1e-1)
    l2: tuple[float, ...] = (0.0, 1e-1, 1.0)
    starts: tuple[str, ...] = ("earlier", "mean")
    restarts: int = 1
    n_sweep: int = 8
    check_every: int = 25
    tolerance: float = 0.02
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "sweep_steps", "restarts", "n_sweep", "check_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Likelihood: expected {name} of 1 or more, got {getattr(self, name)}")
        for name in ("tv", "l2", "starts"):
            if not getattr(self, name):
                raise ConfigError(f"Likelihood: expected at least one value to sweep in {name}, got none")
        if not self.learning_rate > 0 or not 0 <= self.tolerance < 1:
            raise ConfigError(
                "Likelihood: expected a positive learning_rate and a tolerance in [0,1), "
                f"got {self.learning_rate} and {self.tolerance}"
            )
        if min(self.tv) < 0 or min(self.l2) < 0:
            raise ConfigError(f"Likelihood: expected tv and l2 of 0 or more, got {self.tv} and {self.l2}")
        for start in self.starts:
            if start not in ("earlier", "mean", "noise"):
                raise ConfigError(f"Likelihood: unknown start {start!r}; legal: earlier, mean, noise")

    @property
    def needs(self) -> frozenset[str]:
        """The edge's weights, and images to tune on."""
        return frozenset({"edge", "auxiliary"})

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        """Tune the weights of the prior on auxiliary validation images."""
        edge = view.need_edge("Likelihood")
        train, validation = view.need_features("Likelihood")
        _, scale = feature_statistics(train, most=_ENOUGH)  # a difference of features needs no mean
        if not bool(scale.any()):
            return Constant(mean_image(train))  # features that never change say nothing; smoothing is no search
        if any(isinstance(layer, Noise) and bool(layer.std > 0) for layer in edge.modules()):
            scale = _one_scale(scale)
        search = _Search(self, edge, scale, mean_image(train, most=_ENOUGH), view, seed)
        settings = [_Setting(start, tv, l2) for start in search.usable(self.starts) for tv in self.tv for l2 in self.l2]
        if len(settings) > 1:
            search.choose(settings, validation, progress)
        else:
            search.setting = settings[0]
        return search

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        """The tuned search again."""
        if "image" in state:
            return Constant(state["image"])
        edge = view.need_edge("Likelihood")
        search = _Search(self, edge, state["scale"], state["mean_image"], view, int(state["seed"]))
        tv, l2 = (float(value) for value in state["weights"])
        search.setting = _Setting(bytes(state["start"].tolist()).decode(), tv, l2)
        return search


@dataclass(frozen=True)
class _Setting:
    start: str
    tv: float
    l2: float


def frozen(edge: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """A copy of the edge made for gradients with respect to its input alone.

    Weights take no gradients. Noise of a defense is off: the likeliest picture is the one closest without it. Batch
    normalisation is folded into the convolution before it where torch.fx can see both; the copy is kept only if its
    features are those of the edge.
    """
    copied = silenced(edge).eval().requires_grad_(False)
    copied = copied.to(memory_format=torch.channels_last)
    if not isinstance(copied, torch.fx.GraphModule):
        return copied
    from torch.fx.experimental.optimization import fuse

    folded: nn.Module = fuse(copied).eval().requires_grad_(False)
    with torch.no_grad():
        example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
        example = example.to(next(iter(edge.parameters()), torch.empty(0)).device)
        expected, got = copied(example), folded(example)
    is_same = expected.shape == got.shape and torch.allclose(
        expected, got, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    return folded if is_same else copied


def _kept_share(edge: nn.Module) -> float | None:
    """The share of elements that a mask at the end of the edge lets through; None where there is no such mask.

    What it dropped arrives as 0 and says nothing, and what it kept arrives enlarged; an attacker who knows the defense
    sees which is which.
    """
    last = list(edge.modules())[-1]
    return 1 - last.rate if isinstance(last, RandomMask) and last.rate > 0 else None


def _one_scale(scale: Tensor) -> Tensor:
    """One factor for all channels that are heard: under noise of one strength, likelihood weighs them alike.

    By its own deviation each, a channel of little but noise would count as much as one that says everything.
    """
    is_heard = scale > 0
    return is_heard * scale[is_heard].square().reciprocal().mean().rsqrt()


def _check_gradient(misfit: Tensor, x: Tensor) -> None:
    """Refuses an edge that no gradient passes: the search would return its start, and that would look like privacy."""
    if float(misfit.detach().max()) < _SOLVED:
        return
    found = (
        torch.autograd.grad(misfit.sum(), x, retain_graph=True, allow_unused=True) if misfit.requires_grad else (None,)
    )
    if found[0] is None or not bool(found[0].any()):
        raise AttackError(
            "Likelihood: no gradient comes through the edge (detached, rounded or constant around every start), so the "
            "search cannot move; use the decoder at this cut: a search that stands still is not a defense"
        )


def total_variation(x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean squared difference of neighboring pixels, per image."""
    vertical = (x[:, :, 1:] - x[:, :, :-1]).square().mean((1, 2, 3))
    horizontal = (x[:, :, :, 1:] - x[:, :, :, :-1]).square().mean((1, 2, 3))
    return vertical + horizontal


class _Search:
    """Adam on pixels, many images at a time."""

    setting: _Setting

    def __init__(
        self, attack: Likelihood, edge: nn.Module, scale: Tensor, mean_image: Tensor, view: View, seed: int
    ) -> None:
        self._attack = attack
        self._edge = frozen(edge, view.image_shape).to(view.device)
        self._kept = _kept_share(edge) if view.observations == 1 else None
        self._scale = scale
        self._mean_image = mean_image
        self._earlier = view.earlier
        self._device = view.device
        self._is_half = has_fast_bfloat16(view.device)
        self._seed = seed

    def usable(self, starts: tuple[str, ...]) -> list[str]:
        """The starts that exist here, "earlier" once for each attack; the mean image when none does."""
        found = [name for start in starts for name in (self._earlier if start == "earlier" else [start])]
        return found or ["mean"]

    def choose(self, settings: list[_Setting], validation: Auxiliary, progress: Progress | None) -> None:
        """Sets `setting` to the one that rebuilds auxiliary validation images best; all are searched as one batch."""
        assert validation.features is not None
        index = np.arange(min(self._attack.n_sweep, len(validation.images)))
        truth, features = validation.images.rows(index), validation.features.rows(index)
        guesses, _ = self._run(
            features.repeat(len(settings), *(1,) * (features.ndim - 1)),
            torch.cat([self._first(s.start, features, self._seed) for s in settings]),
            torch.tensor([s.tv for s in settings]).repeat_interleave(len(index)),
            torch.tensor([s.l2 for s in settings]).repeat_interleave(len(index)),
            self._attack.sweep_steps,
            lambda fraction: progress("sweep", fraction) if progress is not None else None,
        )
        errors = (guesses - truth.repeat(len(settings), 1, 1, 1)).square().mean((1, 2, 3)).view(len(settings), -1)
        # The mean of log errors is a mean of decibels: one hopeless image does not decide for all.
        self.setting = settings[int(errors.clamp(min=1e-12).log().mean(1).argmin())]

    def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Float[Tensor, "n c h w"]:
        best: Tensor | None = None
        lowest: Tensor | None = None
        for restart in range(self._attack.restarts):
            start = self.setting.start if restart == 0 else "noise"
            count = len(features)

            def told(fraction: float, restart: int = restart) -> None:
                if progress is not None:
                    progress(
                        f"search from {self.setting.start}, tv {self.setting.tv:g}, l2 {self.setting.l2:g}",
                        (restart + fraction) / self._attack.restarts,
                    )

            guesses, objective = self._run(
                features,
                self._first(start, features, self._seed + restart),
                torch.full((count,), self.setting.tv),
                torch.full((count,), self.setting.l2),
                self._attack.steps,
                told,
            )
            if best is None or lowest is None:
                best, lowest = guesses, objective
            else:
                is_better = objective < lowest
                best = torch.where(is_better[:, None, None, None], guesses, best)
                lowest = torch.minimum(objective, lowest)
        assert best is not None
        return best

    def state(self) -> dict[str, Tensor]:
        """What tuning chose."""
        setting = self.setting
        return {
            "scale": self._scale.cpu(),
            "mean_image": self._mean_image.cpu(),
            "start": torch.tensor(list(setting.start.encode()), dtype=torch.uint8),
            "weights": torch.tensor([setting.tv, setting.l2], dtype=torch.float64),
            "seed": torch.tensor(self._seed),
        }

    def _first(self, start: str, features: Tensor, seed: int) -> Float[Tensor, "n c h w"]:
        if start in self._earlier:
            return self._earlier[start](features)
        if start == "mean":
            return self._mean_image.expand(len(features), -1, -1, -1).clone()
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(features), *self._mean_image.shape, generator=generator)

    def _run(
        self, features: Tensor, first: Tensor, tv: Tensor, l2: Tensor, steps: int, told: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        guesses, objectives = [], []
        size = self._attack.batch_size
        for start in range(0, len(features), size):
            part = slice(start, start + size)

            def within(fraction: float, start: int = start) -> None:
                told(min(1.0, (start + fraction * size) / len(features)))

            guess, objective = self._search(features[part], first[part], tv[part], l2[part], steps, within)
            guesses.append(guess)
            objectives.append(objective)
        return torch.cat(guesses), torch.cat(objectives)

    def _search(
        self, features: Tensor, first: Tensor, tv: Tensor, l2: Tensor, steps: int, told: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        """Best picture and objective of each image; images that are done leave the batch."""
        attack, device = self._attack, self._device
        scale, anchor = self._scale.to(device), first.to(device)
        target, heard = features.to(device) * scale, None
        if self._kept is not None:
            target, heard = target * self._kept, (features.to(device) != 0) / self._kept
        tv, l2 = tv.to(device), l2.to(device)
        best, lowest = anchor.clone(), torch.full((len(anchor),), math.inf, device=device)
        alive = torch.arange(len(anchor), device=device)
        x = anchor.clone()
        first_moment, second_moment = torch.zeros_like(x), torch.zeros_like(x)
        previous, rate = lowest.clone(), torch.full((len(anchor), 1, 1, 1), attack.learning_rate, device=device)
        last_coarse = round(_COARSE_SHARE * steps) if self._is_half else 0
        for step in range(1, steps + 1):
            x.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=step <= last_coarse):
                found = self._edge(x)
            difference = (found.float() * scale - target).square()
            misfit = (difference if heard is None else difference * heard).flatten(1).mean(1)
            objective = misfit + tv * total_variation(x) + l2 * (x - anchor).square().mean((1, 2, 3))
            if step == 1:
                _check_gradient(misfit, x)
            (gradient,) = torch.autograd.grad(objective.sum(), x)
            with torch.no_grad():
                value = objective.detach()
                if not bool(value.isfinite().all()):
                    raise AttackError(
                        f"Likelihood: the objective became NaN at step {step}; the edge is not finite on some picture "
                        "in [0,1]. Look at its weights; a broken attack is not a defense"
                    )
                if step == last_coarse + 1:
                    lowest[alive] = math.inf  # a coarse objective is no record for an exact one to beat
                is_lower = value < lowest[alive]
                chosen = alive[is_lower]
                best[chosen] = x.detach()[is_lower]
                lowest[chosen] = value[is_lower]
                first_moment.lerp_(gradient, 0.1)
                second_moment.lerp_(gradient.square(), 0.01)
                fall = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
                update = (first_moment / (1 - 0.9**step)) / ((second_moment / (1 - 0.99**step)).sqrt() + 1e-12)
                x = (x.detach() - fall * rate * update).clamp_(0, 1)
                if step % attack.check_every == 0 and step < steps:
                    is_stalled = lowest[alive] >= (1 - attack.tolerance) * previous[alive]
                    previous = lowest.clone()
                    rate = torch.where(is_stalled[:, None, None, None], _SLOWER * rate, rate)
                    is_going = rate.flatten() >= _SLOWEST * attack.learning_rate
                    told(step / steps)
                    if not bool(is_going.any()):
                        break
                    if not bool(is_going.all()):
                        alive, x, rate = alive[is_going], x[is_going], rate[is_going]
                        first_moment, second_moment = first_moment[is_going], second_moment[is_going]
                        target, anchor = target[is_going], anchor[is_going]
                        heard = heard if heard is None else heard[is_going]
                        tv, l2 = tv[is_going], l2[is_going]
        return best.cpu(), lowest.cpu()
