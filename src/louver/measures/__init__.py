"""What a reconstruction gives away, one number per image.

`MEASURES` is the table that the command line, experiment files and thresholds read. To add a measure: write a plain
function of `(truth, guess)` in one of the files here, and add its line to the table at the end of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from louver.errors import ConfigError, InputError, nearest
from louver.measures import image, perceptual, recognition
from louver.measures.image import ms_ssim, mse, psnr, ssim
from louver.measures.perceptual import (
    lpips_distance,
    perceptual_distance,
    squeezenet_distance,
)
from louver.measures.recognition import recognized, reidentified
from louver.measures.statistics import Summary, row, summarize

__all__ = [
    "MEASURES",
    "Measure",
    "MeasureContext",
    "Summary",
    "lpips_distance",
    "ms_ssim",
    "mse",
    "perceptual_distance",
    "psnr",
    "recognized",
    "reidentified",
    "resolve_measures",
    "row",
    "squeezenet_distance",
    "ssim",
    "summarize",
]

_CHUNK = 128  # images scored at once: bounds memory, and the test set may be large


@dataclass(frozen=True, kw_only=True)
class MeasureContext:
    """What some measures need besides the images.

    `model` is the victim, whole and undefended or as deployed, as the audit chooses; `labels` are the true labels of
    the test images, in its classes (without them, the model's own predictions on the true images stand in).
    """

    model: nn.Module | None = None
    labels: NDArray[np.int64] | None = None
    lpips_weights: Path | None = None
    device: str = "cpu"


Compute = Callable[[Tensor, Tensor, MeasureContext], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of `MEASURES`. `bounds` are the least and the greatest value there can be.

    `needs` names what must be in the context: "model" (the victim), "lpips_weights" (a file of the user's) or
    "shared_weights" (found through LOUVER_DATA).
    """

    name: str
    unit: str
    leaks_when: Literal["high", "low"]
    description: str
    bounds: tuple[float, float]
    compute: Compute
    needs: frozenset[str] = frozenset()
    min_side: int = 1

    def missing(self, image_shape: tuple[int, int, int], context: MeasureContext) -> str | None:
        """Why this measure is not available for images of (c, h, w) in this context; None if it is."""
        if min(image_shape[1:]) < self.min_side:
            return f"images are {image_shape[1]}×{image_shape[2]}, and it needs {self.min_side} pixels a side"
        if "model" in self.needs and context.model is None:
            return "it needs the victim model"
        if "lpips_weights" in self.needs and context.lpips_weights is None:
            return "it needs a file of LPIPS weights, which Louver does not ship"
        if "shared_weights" in self.needs:
            return _missing_backbone(self.name)
        return None

    def available(self, image_shape: tuple[int, int, int], context: MeasureContext | None = None) -> bool:
        """Whether this measure exists for images of (c, h, w) in this context."""
        return self.missing(image_shape, context or MeasureContext()) is None


def resolve_measures(
    names: Sequence[str] | None,
    image_shape: tuple[int, int, int],
    context: MeasureContext | None = None,
) -> list[Measure]:
    """The measures called `names`, in that order; without names, those of the default set that are available.

    Default: mse, psnr, ssim, recognized, reidentified, squeezenet_distance if its weights are found, ms_ssim if the
    images are large enough. A measure that is asked for by name is never left out in silence.

    Raises:
        ConfigError: an unknown name, one named twice, or one that is not available here; the message says why.

    Example:
        >>> [measure.name for measure in resolve_measures(["psnr", "ssim"], (3, 32, 32))]
        ['psnr', 'ssim']
    """
    context = context or MeasureContext()
    if names is None:
        defaults = [MEASURES[name] for name in _DEFAULT]
        return [measure for measure in defaults if measure.available(image_shape, context)]
    chosen = []
    for name in names:
        if name not in MEASURES:
            raise ConfigError(f"unknown measure {name!r}; {nearest(name, sorted(MEASURES))}")
        reason = MEASURES[name].missing(image_shape, context)
        if reason is not None:
            raise ConfigError(f"measure {name!r} is not available: {reason}; leave it out or provide it")
        if MEASURES[name] in chosen:
            raise ConfigError(f"measure {name!r} is named twice; name it once")
        chosen.append(MEASURES[name])
    return chosen


def _by_image(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Compute:
    """`function` over chunks, on the context's device, in `dtype`."""

    def compute(truth: Tensor, guess: Tensor, context: MeasureContext) -> NDArray[np.float64]:
        image.check_pair(truth, guess)
        parts = []
        with torch.no_grad():
            for start in range(0, len(truth), _CHUNK):
                pair = (images[start : start + _CHUNK].to(context.device, dtype) for images in (truth, guess))
                parts.append(function(*pair).cpu())
        return _as_array(torch.cat(parts))

    return compute


def _lpips(truth: Tensor, guess: Tensor, context: MeasureContext) -> NDArray[np.float64]:
    if context.lpips_weights is None:
        raise ConfigError("lpips needs a file of weights, backbone and heads; give one or leave lpips out")
    return _by_image(_loaded_lpips(context.lpips_weights, context.device), torch.float32)(truth, guess, context)


def _recognized(truth: Tensor, guess: Tensor, context: MeasureContext) -> NDArray[np.float64]:
    if context.model is None:
        raise ConfigError("recognized needs the victim model; give one or leave recognized out")
    image.check_pair(truth, guess)
    device = context.device
    if context.labels is None:
        labels, _ = recognition.predicted(context.model, truth, device=device)
    else:
        labels = torch.from_numpy(np.asarray(context.labels, dtype=np.int64))
    return _as_array(recognition.recognized(context.model, labels, guess, device=device))


def _reidentified(truth: Tensor, guess: Tensor, context: MeasureContext) -> NDArray[np.float64]:
    hits, _ = recognition.reidentified(truth, guess, device=context.device)
    return _as_array(hits)


@lru_cache(maxsize=1)
def _loaded_lpips(path: Path, device: str) -> perceptual.Distance:
    return perceptual.load_lpips(path, device)


def _missing_backbone(name: str) -> str | None:
    backbone = {"squeezenet_distance": "squeezenet1_0"}[name]
    try:
        perceptual.shared_distance(backbone, torch.device("cpu"))
    except InputError as error:
        return f"its weights were not loaded ({error})"
    return None


def _as_array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().numpy().astype(np.float64)


def _table(*measures: Measure) -> Mapping[str, Measure]:
    return {measure.name: measure for measure in measures}


# float64 where the arithmetic is ours; networks run in the float32 that they were trained in.
MEASURES: Mapping[str, Measure] = _table(
    Measure(
        name="mse",
        unit="",
        leaks_when="low",
        description="Mean squared error of pixels in [0,1]; 0 is the true image.",
        bounds=(0.0, 1.0),
        compute=_by_image(mse, torch.float64),
    ),
    Measure(
        name="psnr",
        unit="dB",
        leaks_when="high",
        description="Peak signal-to-noise ratio per image, peak 1.0, capped at 100 dB, which is the true image.",
        bounds=(0.0, image.PSNR_CAP_DB),
        compute=_by_image(psnr, torch.float64),
    ),
    Measure(
        name="ssim",
        unit="",
        leaks_when="high",
        description="Structural similarity (11×11 Gaussian window); 1 is the true image, below 0.3 little is seen.",
        bounds=(-1.0, 1.0),
        compute=_by_image(ssim, torch.float64),
        min_side=image.SSIM_MIN_SIDE,
    ),
    Measure(
        name="ms_ssim",
        unit="",
        leaks_when="high",
        description="Structural similarity over five scales; 1 is the true image.",
        bounds=(0.0, 1.0),
        compute=_by_image(ms_ssim, torch.float64),
        min_side=image.MS_SSIM_MIN_SIDE,
    ),
    Measure(
        name="squeezenet_distance",
        unit="",
        leaks_when="low",
        description="Distance between SqueezeNet 1.0 features (not LPIPS); 0 looks the same to that network.",
        bounds=(0.0, 4.0),
        compute=_by_image(squeezenet_distance, torch.float32),
        needs=frozenset({"shared_weights"}),
        min_side=perceptual.PERCEPTUAL_MIN_SIDE,
    ),
    Measure(
        name="lpips",
        unit="",
        leaks_when="low",
        description="LPIPS v0.1 on the weights that the user gave; 0 looks the same to that network.",
        bounds=(0.0, math.inf),
        compute=_lpips,
        needs=frozenset({"lpips_weights"}),
        min_side=perceptual.PERCEPTUAL_MIN_SIDE,
    ),
    Measure(
        name="recognized",
        unit="share",
        leaks_when="high",
        description="Share of reconstructions that the victim's own model gives the true label.",
        bounds=(0.0, 1.0),
        compute=_recognized,
        needs=frozenset({"model"}),
    ),
    Measure(
        name="reidentified",
        unit="share",
        leaks_when="high",
        description="Share of reconstructions whose nearest test image is the true one; chance is one in n.",
        bounds=(0.0, 1.0),
        compute=_reidentified,
    ),
)

_DEFAULT = ("mse", "psnr", "ssim", "ms_ssim", "squeezenet_distance", "recognized", "reidentified")
