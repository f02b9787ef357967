"""The threat model, the measures and the numbers of an audit, in words for a person who is no specialist."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from louver.types import Audit, Row, Threat, Verdict

__all__ = [
    "STATUS_WORDS",
    "TERMS",
    "Measure",
    "Status",
    "by_importance",
    "bytes_in_words",
    "count_in_words",
    "limits",
    "measure_words",
    "seconds_in_words",
    "status_of",
    "threat_grants",
    "threat_withholds",
    "utility_in_words",
    "value_in_words",
]

Status = Literal["passed", "broken", "not shown", "nothing judged"]

NARROW = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


# ---------------------------------------------------------------- verdict

STATUS_WORDS: dict[Status, tuple[str, str]] = {
    "passed": (
        "Passed",
        "Every threshold holds, for the attacker, the attacks and the pictures described on this page.",
    ),
    "broken": (
        "Broken",
        "At least one threshold is broken: the features give away more than this audit allows.",
    ),
    "not shown": (
        "Not shown",
        "This is not a pass. The evidence does not settle whether the features keep the pictures private.",
    ),
    "nothing judged": (
        "Nothing judged",
        "No threshold was set, so nothing passed and nothing failed. The numbers below stand alone.",
    ),
}


def status_of(verdict: Verdict) -> Status:
    """One word for the whole verdict, never kinder than its least kind part.

    `passed` is believed only where checks exist and all of them hold; a verdict that contradicts its own checks reads
    as the worse of the two.
    """
    statuses = {check.status for check in verdict.checks}
    if "broken" in statuses:
        return "broken"
    if not statuses:
        return "nothing judged"
    if "not shown" in statuses or not verdict.passed:
        return "not shown"
    return "passed"


# ---------------------------------------------------------------- measures


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How one measure is named, explained and printed."""

    label: str
    sentence: str
    style: Literal["share", "unit", "decibel", "free"] = "free"
    importance: int = 50


_MEASURES: dict[str, Measure] = {
    "ssim": Measure(
        label="SSIM",
        sentence=(
            "Structural similarity: how well local brightness, contrast and texture of the rebuilt picture agree with "
            "the true one. 1 is a perfect copy; about 0 is nothing in common."
        ),
        style="unit",
        importance=0,
    ),
    "psnr": Measure(
        label="PSNR",
        sentence=(
            "Peak signal-to-noise ratio: how small the pixel errors are, in decibels. Every 10 dB is ten times less "
            "squared error; above 30 dB the eye sees little difference."
        ),
        style="decibel",
        importance=1,
    ),
    "recognized": Measure(
        label="Recognized",
        sentence=(
            "The share of rebuilt pictures that the audited network still recognizes: it gives them the right answer, "
            "that of the true picture. So the content survives, whatever the picture looks like."
        ),
        style="share",
        importance=2,
    ),
    "reidentified": Measure(
        label="Re-identified",
        sentence=(
            "The share of rebuilt pictures whose nearest neighbor among the test pictures is the very picture they "
            "were rebuilt from: whether a person or a vehicle could be picked out of the crowd."
        ),
        style="share",
        importance=3,
    ),
    "lpips": Measure(
        label="LPIPS",
        sentence=(
            "Learned perceptual distance: how different two pictures look to a network tuned on human judgments. "
            "0 is the same picture."
        ),
        style="unit",
        importance=5,
    ),
    "ms_ssim": Measure(
        label="MS-SSIM",
        sentence="Structural similarity at several scales at once, from fine texture to rough layout. 1 is a copy.",
        style="unit",
        importance=6,
    ),
    "mse": Measure(
        label="MSE",
        sentence="Mean squared error of the pixels, on a scale where black is 0 and white is 1. 0 is a perfect copy.",
        importance=7,
    ),
    "mae": Measure(
        label="MAE",
        sentence="Mean absolute error of the pixels, on a scale where black is 0 and white is 1. 0 is a perfect copy.",
        importance=8,
    ),
}

_NETWORKS = {"squeezenet": "SqueezeNet"}

_PERCEPTUAL = (
    "Perceptual distance on the features of a stock network ({network}): how different two pictures look to it. "
    "0 is the same picture. It is not LPIPS, and its values compare only with themselves."
)


def measure_words(name: str) -> Measure:
    """Label, sentence and number style of the measure `name`; one that is not known is said to be so.

    >>> measure_words("psnr").label
    'PSNR'
    """
    key = re.sub(r"[\s-]+", "_", name.strip().lower())
    if key in _MEASURES:
        return _MEASURES[key]
    if key.endswith("_distance"):
        network = _NETWORKS.get(key.removesuffix("_distance"), key.removesuffix("_distance"))
        sentence = _PERCEPTUAL.format(network=network)
        return Measure(label=f"{network} distance", sentence=sentence, style="unit", importance=4)
    return Measure(
        label=name,
        sentence="This report has no description of this measure: read it only with its direction, unit and floor.",
    )


def by_importance(names: Sequence[str]) -> list[str]:
    """Distinct measure names, those that tell a reader most first; ties keep the order they came in."""
    distinct = list(dict.fromkeys(names))
    return sorted(distinct, key=lambda name: measure_words(name).importance)


TERMS: tuple[tuple[str, str], ...] = (
    ("Edge and cloud", "The two halves of the network. The edge half runs on the device, the cloud half on a server."),
    ("Cut", "The place where the network is parted. Exactly one block of numbers crosses it for every picture."),
    ("Feature", "That block of numbers: what leaves the device instead of the picture, and what the attacker reads."),
    ("Attack", "A method that turns features back into pictures. It never sees the pictures that it is scored on."),
    (
        "Floor",
        "What a guess scores that knows nothing about the picture: always the same average picture. Leakage is what an "
        "attack gains over it, so no number here stands without it.",
    ),
    (
        f"95{NARROW}% interval",
        "Had other pictures of the same kind been drawn, the mean would usually fall in this range. It does not cover "
        "a better attack.",
    ),
    (
        f"Worst 5{NARROW}%",
        "The mean over the twentieth of the pictures that leak most. A mean can look safe while some people are "
        "exposed; this says by how much.",
    ),
    (
        "Beats the floor",
        "Whether the attack leaks more than the floor on the same pictures, beyond what chance explains.",
    ),
    ("Time", "How long the attack worked at that cut, for all of its pictures together."),
    ("MACs", "Multiply-accumulates: the arithmetic that one picture costs, whatever the processor."),
    ("Peak activation memory", "The most working memory that one picture needs at once, weights not counted."),
    ("Auxiliary pictures", "Pictures of the attacker's own, on which attacks are trained and tuned."),
)
"""Words that the page uses, each explained once."""


# ---------------------------------------------------------------- threat model


def threat_grants(threat: Threat) -> list[tuple[str, str]]:
    """What the attacker has, as (name, sentence) pairs, the most telling first."""
    told = [
        (
            "Every feature that is sent",
            "The attacker reads whatever a device sends to the cloud, and owns the cloud half of the network. This is "
            "always granted: it is the one whom the features are kept private from.",
        )
    ]
    if "edge" in threat.grants:
        told.append(
            (
                "The edge half, weights and all",
                "As if the attacker had bought one device and taken it apart. Specialists call this a white box.",
            )
        )
    if "query" in threat.grants:
        limit = "as many as it likes" if threat.query_budget is None else f"at most {threat.query_budget:,}"
        told.append(
            (
                "The edge half as a sealed box",
                f"The attacker may feed it pictures of its own choice and read the features that come out: {limit}.",
            )
        )
    if "auxiliary" in threat.grants:
        limit = (
            "all that this experiment sets aside for the attacker"
            if threat.n_auxiliary is None
            else f"at most {threat.n_auxiliary:,}"
        )
        told.append(
            (
                "Pictures like the victim's",
                f"A collection of its own to train and tune attacks on: {limit}. None of them is among the pictures "
                "that the attacks are scored on.",
            )
        )
    if threat.knows_defense:
        told.append(
            (
                "Knowledge of the defense",
                "The attacker knows how the features are protected, and may train its attacks against exactly that. "
                "Specialists call this an adaptive attacker.",
            )
        )
    return told


def threat_withholds(threat: Threat) -> list[tuple[str, str]]:
    """What the attacker was not given, as (name, sentence) pairs: an attacker who has it may do better."""
    told = []
    if "edge" not in threat.grants:
        told.append(
            (
                "The weights of the edge half",
                "Whoever copies them from a device is stronger than the attacker of this audit.",
            )
        )
    if "query" not in threat.grants and "edge" not in threat.grants:
        told.append(
            (
                "Running the edge half on pictures of its own",
                "Whoever can use a device as a sealed box is stronger than the attacker of this audit.",
            )
        )
    if "auxiliary" not in threat.grants:
        told.append(
            (
                "Pictures like the victim's",
                "Whoever has some, and collections of street scenes or faces are easy to come by, is stronger.",
            )
        )
    if not threat.knows_defense:
        told.append(
            (
                "Knowledge of the defense",
                "The attacks were fitted to the protected features all the same, which can only make them stronger. A "
                "defense that works only while secret should not be relied on.",
            )
        )
    return [
        *told,
        ("The true pictures", "No attack saw the pictures that it had to rebuild, nor any picture of the test set."),
    ]


def limits(audit: Audit) -> list[tuple[str, str]]:
    """What the audit does not show, as (claim, sentence) pairs; some hold only for this one."""
    attacks = list(dict.fromkeys(row.attack for row in audit.rows))
    counts = sorted({row.n_images for row in audit.rows})
    told = [
        (
            "It is no guarantee.",
            "An attack shows that at least so much leaks. That an attack fails shows only that this attack failed: "
            "the true leakage is at or above what is printed here.",
        ),
        (
            "Only these attacks were tried.",
            (f"They are: {', '.join(attacks)}. " if attacks else "None is on record. ")
            + "A stronger one may exist today or be found tomorrow, and features kept until then can be attacked then.",
        ),
        (
            "Only these pictures were used.",
            (
                f"Attacks were scored on {' or '.join(f'{n:,}' for n in counts)} test pictures. "
                if counts
                else "No attack was scored. "
            )
            + "Pictures from another camera, place or season may leak more.",
        ),
        (
            "Only this attacker was considered.",
            "Another who holds more than the threat model grants may do better.",
        ),
        (
            "A mean is not a person.",
            f"Single pictures can leak far more than the mean, and than the worst 5{NARROW}%. Look at the pictures.",
        ),
        (
            "Only what was measured is judged.",
            "A rebuilt picture is one way to lose privacy. What can be read from the features without any picture, "
            "such as a place, an identity or a habit, needs an audit of its own.",
        ),
        (
            "Only features are judged.",
            "When a device sends, how often, from where, and what the server answers can tell things too.",
        ),
    ]
    if any(row.measure.lower() == "ssim" for row in audit.rows):
        told.append(
            (
                "SSIM below 0.3 is not safety.",
                "It is the bar of one paper for “unrecognizable”. A picture under it can still show what matters.",
            )
        )
    if counts and counts[0] < 100:
        told.append(
            (
                "Few pictures were scored.",
                f"With {counts[0]:,} of them the worst 5{NARROW}% are very few, and rare cases may be missing.",
            )
        )
    return told


# ---------------------------------------------------------------- numbers


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    # A rounded negative zero would read as a sign that is not there.
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def _odd(value: float) -> str | None:
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    return None


def _significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 8:
        mantissa = f"{value:.{digits - 1}e}"
        base, power = mantissa.split("e")
        return f"{base.replace('-', MINUS)}×10^{int(power)}".replace("^-", "^" + MINUS)
    return _fixed(value, max(0, digits - 1 - exponent))


def value_in_words(measure: str, unit: str, value: float) -> str:
    """A value of `measure` with the digits that it deserves, unit left to the heading except for percent.

    >>> value_in_words("ssim", "", 0.81234), value_in_words("psnr", "dB", 19.46)
    ('0.812', '19.5')
    """
    odd = _odd(value)
    if odd is not None:
        return odd
    style = measure_words(measure).style
    if style == "share" or unit.lower() in {"share", "rate", "fraction"}:
        return f"{_fixed(100 * value, 1)}{NARROW}%"
    if style == "decibel" or unit == "dB":
        return _fixed(value, 1)
    if style == "unit":
        return _fixed(value, 3)
    return _significant(value)


_SHARES = re.compile(r"acc|top|rank|map|recall|precision|f1|auc|share|rate", re.IGNORECASE)


def utility_in_words(name: str, value: float) -> str:
    """A utility such as accuracy: percent where its name and range say that it is a share."""
    odd = _odd(value)
    if odd is not None:
        return odd
    if 0 <= value <= 1 and _SHARES.search(name):
        return f"{_fixed(100 * value, 1)}{NARROW}%"
    return _significant(value, 4)


def _scaled(value: float, step: float, units: Sequence[str]) -> str:
    power = 0
    # 999.5 would print as 1,000 of the smaller unit.
    while power < len(units) - 1 and abs(value) >= step * 0.9995:
        value /= step
        power += 1
    is_whole = power == 0 and float(value).is_integer()
    digits = 0 if is_whole or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{_fixed(value, digits)} {units[power]}".rstrip()


def count_in_words(value: float) -> str:
    """A count in thousands (k), millions (M) and so on.

    >>> count_in_words(272474)
    '272 k'
    """
    return _odd(value) or _scaled(value, 1000, ("", "k", "M", "G", "T"))


def bytes_in_words(value: float) -> str:
    """A size in bytes.

    >>> bytes_in_words(16384)
    '16.0 KiB'
    """
    return _odd(value) or _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def seconds_in_words(value: float) -> str:
    """A duration.

    >>> seconds_in_words(192.4)
    '3 min 12 s'
    """
    odd = _odd(value)
    if odd is not None:
        return odd
    if value < 9.95:
        return f"{_fixed(value, 1)} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def direction_in_words(row: Row) -> str:
    """Which way leakage points."""
    return "higher leaks more" if row.leaks_when == "high" else "lower leaks more"
