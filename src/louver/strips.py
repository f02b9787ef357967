"""Reconstructions of the same few test images, split by split, for a comparison's page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from louver.comparison import UNDEFENDED, Comparison, Entry
from louver.errors import DataError
from louver.facts import read_arrays
from louver.storage import DAMAGED, unit_folder

__all__ = ["Pictures", "Strip", "pictures"]

N_PICTURES = 6
"""Test images in a strip."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """What the attack of one split made of the chosen images, uint8 (k, h, w, c), with the score of each."""

    label: str
    attack: str
    pictures: NDArray[np.uint8]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The same few test images for every split: true ones, their places in the test role, and a strip per split.

    They are spread evenly from the least to the most leaked by the split `chosen_by`.
    """

    truth: NDArray[np.uint8]
    index: tuple[int, ...]
    chosen_by: str
    strips: tuple[Strip, ...]


def pictures(found: Comparison) -> Pictures:
    """Reconstructions of the same test images by the attack that each entry is judged by, in the order of entries.

    Images are chosen on the undefended split that leaks most (on the split that leaks most, where all are defended).

    Raises:
        DataError: a run folder lacks pictures or scores of its study.
    """
    undefended = [one for one in found.entries if one.facts.defense == UNDEFENDED]
    base = max(undefended or found.entries, key=lambda one: one.leak.amount)
    count = min(one.leak.n_images for one in found.entries)
    sign = 1.0 if found.leaks_when == "high" else -1.0
    order = np.argsort(sign * _scores(base, found.measure)[:count], kind="stable")
    chosen = order[np.linspace(0, count - 1, min(N_PICTURES, count)).round().astype(int)]
    truth, index = read_arrays(base.facts.folder / "truth.npz", "images", "index")
    strips = []
    for one in found.entries:
        (rebuilt,) = read_arrays(_unit(one) / "pictures.npz", "images")
        scores = _scores(one, found.measure)
        if len(rebuilt) < count or len(scores) < count:
            raise DataError(f"{_unit(one)}: expected {count} pictures and scores or more; run the study again")
        strips.append(
            Strip(
                label=one.label,
                attack=one.leak.attack,
                pictures=rebuilt[chosen].transpose(0, 2, 3, 1),
                scores=tuple(float(value) for value in scores[chosen]),
            )
        )
    places = tuple(int(place) for place in index[chosen])
    return Pictures(truth=truth[chosen].transpose(0, 2, 3, 1), index=places, chosen_by=base.label, strips=tuple(strips))


def _unit(one: Entry) -> Path:
    return unit_folder(one.facts.folder, one.facts.cut, one.leak.attack)


def _scores(one: Entry, measure: str) -> NDArray[np.float64]:
    path = _unit(one) / "unit.json"
    try:
        return np.array(json.loads(path.read_text(encoding="utf-8"))["values"][measure], np.float64)
    except DAMAGED as error:
        raise DataError(f"{path} is missing or damaged ({error}); run the study again") from error
