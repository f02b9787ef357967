"""The nouns that every part shares. No torch here: importing them is cheap.

Images are float32 NCHW in [0,1] wherever they are tensors. Sizes are in bytes, times in the unit their name ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from louver.errors import ConfigError, DataError, nearest

__all__ = [
    "GRANTS",
    "Audit",
    "Check",
    "Cost",
    "Cut",
    "Finding",
    "HalfCost",
    "Images",
    "Latency",
    "Log",
    "Panel",
    "Progress",
    "Roles",
    "Row",
    "Threat",
    "Verdict",
    "share_of",
]

GRANTS = ("auxiliary", "edge", "query")
"""What a threat model can grant. The cloud half and the features that reach it are always the attacker's."""

Progress = Callable[[str, float], None]
"""Called as `progress(what, fraction)` while long work goes on; `fraction` is the share that is done."""


def share_of(progress: Progress | None, low: float, high: float) -> Progress:
    """Progress of one part, as what lies between `low` and `high` of the whole; told to nobody where that is None."""

    def tell(what: str, fraction: float) -> None:
        if progress is not None:
            progress(what, low + (high - low) * fraction)

    return tell


Log = Callable[[int, Mapping[str, float]], None]
"""Called as `log(epoch, figures)` after each epoch, from 1."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one forward pass of a half, in milliseconds: median and the 10th and 90th percentile of `runs` passes."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class HalfCost:
    """What one half costs for one image: multiply-accumulates, parameters, bytes."""

    macs: int
    parameters: int
    weight_bytes: int
    peak_activation_bytes: int
    latency: Latency | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cut costs on the device, on the server and on the wire (uncompressed), for one image."""

    edge: HalfCost
    cloud: HalfCost
    feature_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place where exactly one tensor crosses from edge to cloud.

    `feature_shape` leaves out the batch; `aliases` are other names for the same place (module paths, graph nodes).
    """

    name: str
    feature_shape: tuple[int, ...]
    dtype: str
    cost: Cost
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of pictures with any number of label columns.

    `pixels` is (n, c, h, w), either uint8 in 0..255 or float32 in [0,1]; `labels` maps a column name to (n,) integers;
    `classes` names the values of a column, in order, where names are known.

    Raises:
        DataError: wrong rank, dtype or range, NaN, or a label column of another length.
    """

    pixels: NDArray[np.uint8] | NDArray[np.float32]
    labels: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = "images"

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise DataError(
                f"{self.name}: expected pixels of shape (n, 1 or 3, h, w), got {pixels.shape}; "
                "transpose to channels first and drop any alpha channel"
            )
        if pixels.dtype not in (np.uint8, np.float32):
            raise DataError(f"{self.name}: expected uint8 or float32 pixels, got {pixels.dtype}; convert them")
        if pixels.dtype == np.float32 and pixels.size:
            low, high = float(pixels.min()), float(pixels.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(f"{self.name}: expected finite pixels, got NaN or infinity; drop those images")
            if low < 0.0 or high > 1.0:
                raise DataError(
                    f"{self.name}: expected float pixels in [0,1], got [{low:g}, {high:g}]; "
                    "divide by 255, or undo the normalisation (a model normalises inside itself)"
                )
        for column, values in self.labels.items():
            if values.shape != (len(pixels),):
                raise DataError(
                    f"{self.name}: expected {len(pixels)} values in label column {column!r}, one an image, "
                    f"got shape {values.shape}; the label file does not match the images"
                )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one picture."""
        _, c, h, w = self.pixels.shape
        return c, h, w

    def take(self, index: NDArray[np.int64] | slice) -> Images:
        """The same set, restricted to (and ordered as) `index`."""
        return Images(
            pixels=self.pixels[index],
            labels={column: values[index] for column, values in self.labels.items()},
            classes=self.classes,
            name=self.name,
        )

    def floats(self, index: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """The pictures at `index` as float32 (n, c, h, w) in [0,1]."""
        chosen = self.pixels[index].astype(np.float32)
        return chosen if self.pixels.dtype == np.float32 else chosen / np.float32(255)

    def column(self, name: str) -> NDArray[np.int64]:
        """Label column `name`.

        Raises:
            DataError: there is no such column; the message lists those that exist.
        """
        if name not in self.labels:
            raise DataError(f"{self.name}: no label column {name!r}; {nearest(name, sorted(self.labels))}")
        return self.labels[name]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Who may see which images. Build it with `louver.data.assign_roles`, which refuses overlaps.

    train, validation: what the victim network is trained and tuned on (may be empty for a network that comes trained).
    test: what every number is measured on; nothing is trained or chosen on it.
    auxiliary: what the attacker owns.
    """

    train: Images
    validation: Images
    test: Images
    auxiliary: Images


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What the attacker has, besides the cloud half and the features that reach it.

    "edge": the weights of the edge half (white box). "query": the edge as a black box, on images of the attacker's
    choice, at most `query_budget` of them (None: no limit). "auxiliary": images like the victim's, `n_auxiliary` of
    them at most (None: all that the experiment sets aside). `knows_defense`: attacks may adapt to the defense.

    Raises:
        ConfigError: an unknown grant, or a budget below one.
    """

    name: str = "full access"
    grants: frozenset[str] = frozenset(GRANTS)
    n_auxiliary: int | None = None
    query_budget: int | None = None
    knows_defense: bool = True

    def __post_init__(self) -> None:
        for grant in sorted(self.grants):
            if grant not in GRANTS:
                raise ConfigError(f"threat {self.name!r}: unknown grant {grant!r}; {nearest(grant, list(GRANTS))}")
        for what in ("n_auxiliary", "query_budget"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(
                    f"threat {self.name!r}: expected {what} of 1 or more, got {value}; leave it out for no limit"
                )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How close one attack came, at one cut, by one measure: a value per test image beside the value of the floor.

    `leaks_when` says which way leakage points: "high" (SSIM, PSNR) or "low" (MSE, distances). `floor` holds the same
    measure of the know-nothing guess (mean auxiliary image) on the same images, in the same order.
    """

    cut: str
    attack: str
    measure: str
    unit: str
    leaks_when: Literal["high", "low"]
    per_image: NDArray[np.float64]
    floor: NDArray[np.float64]
    threat: str
    defense: str
    seed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finding in figures: what a table shows. `low` and `high` bound the mean (bootstrap, 95 %).

    `worst` is the mean over the 5 % of images that leak most, with its own interval. `floor` is the mean of the
    know-nothing guess, `beats_floor` says whether the attack leaks more than it beyond chance (paired bootstrap).
    """

    cut: str
    attack: str
    measure: str
    unit: str
    leaks_when: Literal["high", "low"]
    n_images: int
    mean: float
    low: float
    high: float
    worst: float
    worst_low: float
    worst_high: float
    floor: float
    floor_low: float
    floor_high: float
    floor_worst: float
    beats_floor: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """One threshold, judged. "not shown" means that the interval reaches across the threshold: not a pass."""

    rule: str
    status: Literal["holds", "broken", "not shown"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement: `passed` only if every check holds and the attacks are seen to work somewhere."""

    passed: bool
    headline: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A strip of pictures for one cut: the true images, and what each attack made of them, in the same order.

    All arrays are uint8 (k, h, w, c). `captions` holds a line under each column, such as "test image 17, SSIM 0.81".
    """

    cut: str
    title: str
    truth: NDArray[np.uint8]
    attacks: Mapping[str, NDArray[np.uint8]]
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found, whole. `cuts` are in network order; `config` and `environment` say how to run it again.

    `utility` holds what the network does for its user ("accuracy" and such) as measured on the test images.
    """

    name: str
    threat: Threat
    cuts: tuple[Cut, ...]
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    verdict: Verdict
    utility: Mapping[str, float]
    config: Mapping[str, object]
    environment: Mapping[str, str]
    seconds: float
