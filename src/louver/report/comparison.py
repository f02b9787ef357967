"""A comparison as one HTML page: `render_comparison` makes the text, `write_comparison` puts it on disk whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from louver.comparison import STRONGEST, UNDEFENDED, Comparison, Curve, Entry
from louver.report import comparison_words as wording
from louver.report import figures, scatter, words
from louver.report.html import Picture, environment
from louver.storage import write_bytes
from louver.strips import Pictures

__all__ = ["render_comparison", "write_comparison"]

_SIDES = {
    "utility": {"better": "more useful", "worse": "less useful", "not told apart": "not told apart"},
    "leakage": {"better": "leaks less", "worse": "leaks more", "not told apart": "not told apart"},
}

_INFORMATION = {
    "mine": "Mutual information",
    "entropy": "Entropy",
    "effective_volume": "Effective volume",
    "effective_dimensions": "Effective dimensions",
    "distance_correlation": "Distance correlation",
    "intra_class_radius": "Intra-class radius",
    "rank_privacy": "Rank privacy",
    "log_rank_privacy": "Log-rank privacy",
    "explained_variance": "Explained variance",
    "difficulty": "Inversion difficulty",
}


# ---------------------------------------------------------------- drawings


def _numbers(found: Comparison) -> dict[str, int]:
    """The number of each defense, for its color and marker; 0 for none at all."""
    defended = [one.facts.defense for one in found.entries if one.facts.defense != UNDEFENDED]
    return {UNDEFENDED: 0} | {name: index for index, name in enumerate(dict.fromkeys(defended), start=1)}


def _groups(found: Comparison, names: Mapping[str, str]) -> list[scatter.Group]:
    """A group for each sweep, and one for each defense and variant of what is left."""
    numbers = _numbers(found)
    main: dict[str, str] = {}
    for one in found.entries:
        if one.facts.defense not in main or one.facts.variant in ("", "full"):
            main[one.facts.defense] = one.facts.variant

    def group(defense: str, variant: str, labels: Sequence[str], curve: Curve | None) -> scatter.Group:
        knob = f", {wording.knob_in_words(curve.knob)}" if curve else ""
        return scatter.Group(
            name=wording.family_in_words(defense, variant) + knob,
            number=numbers[defense],
            spots=tuple(_spot(found, label, names, is_swept=curve is not None) for label in labels),
            is_joined=curve is not None,
            is_hollow=defense != UNDEFENDED and variant != main[defense],
        )

    groups = [group(curve.defense, curve.variant, curve.labels, curve) for curve in found.curves]
    swept = {label for curve in found.curves for label in curve.labels}
    alone: dict[tuple[str, str], list[str]] = {}
    for one in found.entries:
        if one.label not in swept:
            family = (one.facts.defense, "" if one.facts.defense == UNDEFENDED else one.facts.variant)
            alone.setdefault(family, []).append(one.label)
    groups += [group(defense, variant, labels, None) for (defense, variant), labels in alone.items()]
    return sorted(groups, key=lambda one: one.number)


def _spot(found: Comparison, label: str, names: Mapping[str, str], *, is_swept: bool) -> scatter.Spot:
    one = found.entry(label)
    if one.facts.defense == UNDEFENDED:
        text = names[label]
    else:
        text = f"{one.facts.strength:g}" if is_swept and one.facts.strength is not None else ""
    use, leak = wording.use_in_words(found, one.utility), wording.leak_in_words(one.leak)
    return scatter.Spot(
        label=label,
        x=figures.Point(value=one.leak.mean, low=one.leak.low, high=one.leak.high),
        y=figures.Point(value=one.utility.mean, low=one.utility.low, high=one.utility.high),
        text=text,
        told=f"{names[label]}: {leak} by {one.leak.attack}, {found.utility} {use}",
        is_on_front=one.is_on_front,
    )


def _scatter(found: Comparison, groups: Sequence[scatter.Group]) -> Markup:
    whom = "the strongest attack" if found.attack == STRONGEST else found.attack
    return scatter.scatter_chart(
        identifier="front",
        title=f"{found.utility} against {wording.measure(found)}",
        description=f"One mark for each of {len(found.entries)} splits with 95 % intervals, a curve for each of "
        f"{len(found.curves)} sweeps, the floor and the Pareto front. The table below holds the same numbers.",
        groups=groups,
        x_title=f"Leakage: mean {wording.measure(found)} of {whom}; {wording.direction(found)}",
        y_title=f"Utility: {found.utility}; higher is better",
        x_number=partial(words.value_in_words, found.measure, found.unit),
        y_number=partial(words.utility_in_words, found.utility),
        floor=found.floor,
        fronts=[
            [(found.entry(label).leak.mean, found.entry(label).utility.mean) for label in front.labels]
            for front in found.fronts
        ],
        leaks_right=found.leaks_when == "high",
    )


def _fronts(found: Comparison) -> list[tuple[Markup, str]]:
    if len(found.fronts) == 1 and found.fronts[0].budget_macs is None:
        return [(scatter.front_key(0), "Pareto front")]
    return [
        (
            scatter.front_key(index),
            "front at any edge cost"
            if front.budget_macs is None
            else f"front up to {words.count_in_words(front.budget_macs)} edge MACs and {wording.PERCENT} more",
        )
        for index, front in enumerate(found.fronts)
    ]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One knob: its leakage and its utility, drawn side by side."""

    heading: str
    leakage: Markup
    utility: Markup


def _sweep(number: int, curve: Curve, found: Comparison) -> Sweep:
    entries = [found.entry(label) for label in curve.labels]
    heading = f"{wording.family_in_words(curve.defense, curve.variant)}: {wording.knob_in_words(curve.knob)}"
    places = [f"{one.facts.strength:g}" for one in entries]

    def drawn(what: Literal["leakage", "utility"]) -> Markup:
        is_leakage = what == "leakage"
        points = [
            figures.Point(value=value.mean, low=value.low, high=value.high)
            for value in ([one.leak for one in entries] if is_leakage else [one.utility for one in entries])
        ]
        say = partial(words.utility_in_words, found.utility)
        if is_leakage:
            say = partial(words.value_in_words, found.measure, found.unit)
        return figures.line_chart(
            identifier=f"sweep-{number}-{what}",
            title=f"{wording.measure(found) if is_leakage else found.utility} over {heading}",
            description=f"One line over {len(places)} strengths with 95 % intervals; the table of splits has the same.",
            places=places,
            series=[figures.Series(name=heading, points=tuple(points))],
            number=say,
            floor=[one.leak.floor for one in entries] if is_leakage else None,
            is_labeled=False,
        )

    return Sweep(heading=heading, leakage=drawn("leakage"), utility=drawn("utility"))


# ---------------------------------------------------------------- tables


Cell = tuple[str, str]
"""A value and its small print."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One split in the main table."""

    title: str
    key: Markup
    is_on_front: bool
    utility: Cell
    leakage: Cell
    worst: Cell
    floor: str
    beats_floor: bool
    macs: Cell
    sent: Cell
    parameters: str
    against: Cell


def _line(one: Entry, found: Comparison, names: Mapping[str, str], key: Markup) -> Line:
    facts, leak = one.facts, one.leak
    say = partial(words.value_in_words, leak.measure, leak.unit)
    use = partial(words.utility_in_words, found.utility)
    bounds = one.utility.low, one.utility.high
    against = ("–", "")
    if one.reference is not None and one.private is not None and one.useful is not None:
        against = (_SIDES["leakage"][one.private], f"{found.utility}: {_SIDES['utility'][one.useful]}")
    elif one.costs is not None:
        against = ("no equal", "")
    return Line(
        title=names[one.label],
        key=key,
        is_on_front=one.is_on_front,
        utility=(
            use(one.utility.mean),
            "" if None in bounds else f"{use(bounds[0] or 0.0)} to {use(bounds[1] or 0.0)}",
        ),
        leakage=(say(leak.mean), f"{say(leak.low)} to {say(leak.high)}; {leak.attack.replace('_', ' ')}"),
        worst=(say(leak.worst), f"{say(leak.worst_low)} to {say(leak.worst_high)}"),
        floor=say(leak.floor),
        beats_floor=leak.beats_floor,
        macs=(words.count_in_words(facts.edge_macs), "" if one.costs is None else f"{one.costs:.2f} of undefended"),
        sent=(words.bytes_in_words(facts.feature_bytes), "×".join(map(str, facts.feature_shape))),
        parameters=words.count_in_words(facts.edge_parameters),
        against=against,
    )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table with a line for every split that has something to say in it."""

    title: str
    note: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]


def _share(mean: float, low: float, high: float, chance: float) -> Cell:
    say = partial(words.value_in_words, "", "share")
    return say(mean), f"{say(low)} to {say(high)}; chance {say(chance)}"


def _table(title: str, note: str, rows: Mapping[str, Mapping[str, Cell]]) -> Grid:
    columns = tuple(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = tuple(
        (name, tuple(cells.get(column, ("–", "")) for column in columns)) for name, cells in rows.items() if cells
    )
    return Grid(title=title, note=note, columns=columns, lines=lines)


def _probes(found: Comparison, names: Mapping[str, str]) -> list[Grid]:
    private = dict.fromkeys(one.column for entry in found.entries for one in entry.facts.probes)
    tables = []
    for column in private:
        rows = {
            names[entry.label]: {
                f"{one.probe} on {one.on}": _share(one.accuracy, one.low, one.high, one.chance)
                for one in entry.facts.probes
                if one.column == column
            }
            for entry in found.entries
        }
        note = "share told right, 95 % interval, and what a guess that knows nothing tells right"
        tables.append(_table(f"Private label: {column.replace('_', ' ')}", note, rows))
    return tables


def _completion(found: Comparison, names: Mapping[str, str]) -> list[Grid]:
    rows = {
        names[entry.label]: {
            f"{one.count} examples a class": _share(one.accuracy, one.low, one.high, one.chance)
            for one in entry.facts.completion
        }
        for entry in found.entries
    }
    note = "accuracy at the split's own task of a tail that an attacker trains on so many labeled examples"
    table = _table("Model completion", note, rows)
    return [table] if table.columns else []


def _information(found: Comparison, names: Mapping[str, str]) -> list[Grid]:
    units: dict[str, str] = {}
    for entry in found.entries:
        for name, value in entry.facts.information.items():
            units.setdefault(name, value.unit)
    headings = {
        name: _INFORMATION.get(name, name.replace("_", " ")) + (f" ({unit})" if unit else "")
        for name, unit in units.items()
    }
    say = partial(words.value_in_words, "", "")
    rows = {
        names[entry.label]: {
            headings[name]: (
                say(value.mean),
                "" if value.low is None or value.high is None else f"{say(value.low)} to {say(value.high)}",
            )
            for name, value in entry.facts.information.items()
        }
        for entry in found.entries
    }
    table = _table("What the features hold", "with 95 % intervals where they were measured", rows)
    return [table] if table.columns else []


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """What was rebuilt from one split: pictures, each with its score."""

    title: str
    small: str
    cells: tuple[tuple[Picture, str], ...]


@dataclass(frozen=True, kw_only=True)
class PictureGrid:
    """Some of the splits, under the true pictures."""

    heading: str
    rows: tuple[PictureRow, ...]
    captions: tuple[str, ...]


def _picture(pixels: NDArray[np.uint8], alt: str) -> Picture:
    height, width = figures.picture_size(*pixels.shape[:2], wish=96)
    return Picture(
        uri=figures.picture_uri(pixels), alt=alt, width=width, height=height, is_enlarged=width > pixels.shape[1]
    )


def _pictures(held: Pictures, found: Comparison, names: Mapping[str, str]) -> list[PictureGrid]:
    """What matters in the open: undefended splits and those on the front; the others behind a fold."""
    captions = tuple(f"test image {place}" for place in held.index)
    label = words.measure_words(found.measure).label
    say = partial(words.value_in_words, found.measure, found.unit)
    truth = PictureRow(
        title="True picture",
        small="",
        cells=tuple(
            (_picture(pixels, f"True picture: {caption}"), "")
            for pixels, caption in zip(held.truth, captions, strict=True)
        ),
    )
    shown: list[PictureRow] = []
    folded: list[PictureRow] = []
    for strip in held.strips:
        one, title = found.entry(strip.label), names[strip.label]
        cells = tuple(
            (_picture(pixels, f"Rebuilt from {title} by {strip.attack}: {caption}, {label} {say(score)}"), say(score))
            for pixels, score, caption in zip(strip.pictures, strip.scores, captions, strict=True)
        )
        row = PictureRow(title=title, small=strip.attack.replace("_", " "), cells=cells)
        is_open = one.is_on_front or one.facts.defense == UNDEFENDED
        (shown if is_open else folded).append(row)
    grids = [PictureGrid(heading="Undefended splits and those on the front", rows=(truth, *shown), captions=captions)]
    if folded:
        grids.append(PictureGrid(heading="The other splits", rows=(truth, *folded), captions=captions))
    return grids


# ---------------------------------------------------------------- the whole


def _keys(groups: Sequence[scatter.Group]) -> dict[str, Markup]:
    return {spot.label: scatter.group_key(group) for group in groups for spot in group.spots}


def _made(one: Entry, names: Mapping[str, str]) -> tuple[str, str, str, str, dict[str, object]]:
    """(title, folder, cut, time, knobs) of a split."""
    taken = ", ".join(
        f"{part} {words.seconds_in_words(value)}" for part, value in one.facts.seconds.items() if part != "all"
    )
    return names[one.label], str(one.facts.folder), one.facts.cut, taken or "–", dict(one.facts.knobs)


def render_comparison(found: Comparison, held: Pictures | None = None) -> str:
    """The whole page, as text: one file that needs no other and runs no script.

    Every number comes from `found` and `held` as they stand.
    """
    names = wording.titles(found)
    groups = _groups(found, names)
    keys = _keys(groups)
    folder = resources.files("louver.report")
    return (
        environment()
        .get_template("comparison.html")
        .render(
            found=found,
            style=Markup((folder / "report.css").read_text(encoding="utf-8")),
            name=wording.joined(found.groups) if found.groups else found.task[:1].upper() + found.task[1:],
            headline=wording.headline(found),
            standings=[
                (
                    wording.family_in_words(one.defense, one.variant),
                    *wording.RESULTS[one.result],
                    wording.reason(one, found, names),
                )
                for one in found.standings
            ],
            n_defenses=len({one.facts.defense for one in found.entries if one.facts.defense != UNDEFENDED}),
            measure=wording.measure(found),
            direction=wording.direction(found),
            drawing=_scatter(found, groups),
            fronts=_fronts(found),
            legend=[(scatter.group_key(group), group.name) for group in groups],
            percent=wording.PERCENT,
            lines=[_line(one, found, names, keys[one.label]) for one in found.entries],
            sweeps=[_sweep(number, curve, found) for number, curve in enumerate(found.curves, start=1)],
            probes=[*_probes(found, names), *_completion(found, names)],
            information=_information(found, names),
            order=wording.order_in_words(found, names),
            pictures=_pictures(held, found, names) if held else [],
            chosen_by=names[held.chosen_by] if held else "",
            limits=wording.limits(found),
            made=[_made(one, names) for one in found.entries],
            glossary=wording.glossary(found),
        )
    )


def write_comparison(found: Comparison, held: Pictures | None, path: Path) -> Path:
    """`path`, once the page of `found` is there whole.

    Raises:
        DataError: a picture that is not uint8.
        StorageError: the disk refused; what was at `path` before is untouched.
    """
    return write_bytes(path, render_comparison(found, held).encode("utf-8", errors="backslashreplace"))
