"""Utility against leakage as inline SVG: points with whiskers, sweeps as curves, Pareto fronts, names beside them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from louver.report.figures import Point, marker_path, nice_ticks, path_through, text_at

__all__ = ["Group", "Spot", "front_key", "group_key", "scatter_chart"]

_WIDTH, _HEIGHT = 900, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, _WIDTH - 22, 26, _HEIGHT - 58
_N_COLORS = 6
_N_MARKERS = 6
_DASHES = ("", "9 5", "3 4")
_WHISKER = 1.5

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One split: leakage across, utility up. `text` stands beside it where there is room, `told` says it in full."""

    label: str
    x: Point
    y: Point
    text: str
    told: str
    is_on_front: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    """Splits that share a name, a color and a marker; `number` is that of their defense, 0 for none at all.

    `is_joined` draws a curve through the spots in their order, `is_hollow` empty markers. Texts of the group without
    defense are always written.
    """

    name: str
    number: int
    spots: tuple[Spot, ...]
    is_joined: bool
    is_hollow: bool = False


def _style(group: Group) -> tuple[str, int]:
    """(class, marker): color and marker go around at different times, so that 36 defenses differ."""
    if group.number == 0:
        return "s0", 0
    index = group.number - 1
    return f"s{index % _N_COLORS + 1}", (1 + index + index // _N_COLORS) % _N_MARKERS


def _mark(group: Group, x: float, y: float, size: float = 4.6) -> str:
    name, marker = _style(group)
    hollow = " hollow" if group.is_hollow else ""
    shape = marker_path(marker, x, y, size) if group.number else _star(x, y, 1.6 * size)
    return f'<path class="mark {name}{hollow}" d="{shape}"/>'


def _star(x: float, y: float, size: float) -> str:
    turns = [math.pi * (k / 5 - 0.5) for k in range(10)]
    reach = [size if k % 2 == 0 else 0.42 * size for k in range(10)]
    return path_through([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, turns, strict=True)]) + "z"


def group_key(group: Group) -> Markup:
    """The marker of a group for tables and legends; decoration, so hidden from screen readers."""
    return Markup(
        '<svg class="key" viewBox="0 0 16 14" width="16" height="14" aria-hidden="true" focusable="false">'
        f"{_mark(group, 8, 7)}</svg>"
    )


def front_key(index: int) -> Markup:
    """The line of the front number `index` for a legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 44 14" width="44" height="14" aria-hidden="true" focusable="false">'
        f'<path class="front"{_front_dash(index)} d="M1 7H43"/></svg>'
    )


def _front_dash(index: int) -> str:
    dash = _DASHES[index % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


@dataclass(frozen=True)
class _Scale:
    """Values to pixels along one axis, from `low` at `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    @property
    def ticks(self) -> list[float]:
        return [tick for tick in nice_ticks(self.low, self.high, about=7) if self.low <= tick <= self.high]

    def at(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (self.end - self.start) * (inside - self.low) / (self.high - self.low)


def _scale(points: Sequence[Point], more: Sequence[float], start: float, end: float) -> _Scale:
    values = [v for p in points for v in (p.value, p.low, p.high) if v is not None] + list(more)
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return _Scale(low - margin, high + margin, start, end)


def scatter_chart(
    *,
    identifier: str,
    title: str,
    description: str,
    groups: Sequence[Group],
    x_title: str,
    y_title: str,
    x_number: Callable[[float], str],
    y_number: Callable[[float], str],
    floor: float,
    fronts: Sequence[Sequence[tuple[float, float]]],
    leaks_right: bool,
) -> Markup:
    """Every spot of `groups` as an SVG that names and describes itself.

    `fronts` are points from the least to the most leaked; `leaks_right` says that leakage grows to the right.
    """
    spots = [spot for group in groups for spot in group.spots]
    across = _scale([spot.x for spot in spots], [floor], _LEFT, _RIGHT)
    up = _scale([spot.y for spot in spots], [], _BOTTOM, _TOP)

    parts = _axes(across, up, x_title, y_title, x_number, y_number)
    parts.append(f'<path class="floor" d="M{across.at(floor):.1f} {_TOP}V{_BOTTOM}"/>')
    stairs = [_stairs(front, across, up, leaks_right) for front in fronts]
    for index, steps in enumerate(stairs):
        parts.append(f'<path class="front"{_front_dash(index)} d="{path_through(steps)}"/>')
    for group in groups:
        parts += _curve(group, across, up)
    for group in groups:
        parts += _marks(group, across, up)
    parts += _names(groups, across, up, across.at(floor), stairs)

    safe = escape(identifier)
    return Markup(
        f'<svg class="chart chart-wide scatter" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'aria-labelledby="{safe}-title {safe}-desc" focusable="false">'
        f'<title id="{safe}-title">{escape(title)}</title><desc id="{safe}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _axes(
    across: _Scale,
    up: _Scale,
    x_title: str,
    y_title: str,
    x_number: Callable[[float], str],
    y_number: Callable[[float], str],
) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(text_at("tick", _LEFT - 8, y + 4, _bare(y_number(tick)), anchor="end"))
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(text_at("tick", x, _BOTTOM + 19, _bare(x_number(tick)), anchor="middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
    parts.append(text_at("title", (_LEFT + _RIGHT) / 2, _HEIGHT - 12, x_title, anchor="middle"))
    parts.append(text_at("title", 4, 13, y_title))
    return parts


def _bare(text: str) -> str:
    """A number without the zeros that end it."""
    return re.sub(r"(?<=\d)\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)", r"\1", text)


def _stairs(
    front: Sequence[tuple[float, float]], across: _Scale, up: _Scale, leaks_right: bool
) -> list[tuple[float, float]]:
    """What is reached at no more than this leakage: a line of steps, from the first point to the drawing's edge."""
    steps: list[tuple[float, float]] = []
    for x, y in front:
        steps += [(across.at(x), steps[-1][1] if steps else up.at(y)), (across.at(x), up.at(y))]
    return [*steps, (_RIGHT if leaks_right else _LEFT, steps[-1][1])]


def _curve(group: Group, across: _Scale, up: _Scale) -> list[str]:
    name, _ = _style(group)
    parts = []
    if group.is_joined and len(group.spots) > 1:
        drawn = [(across.at(spot.x.value), up.at(spot.y.value)) for spot in group.spots]
        parts.append(f'<path class="line {name}" d="{path_through(drawn)}"/>')
    for spot in group.spots:
        x, y = across.at(spot.x.value), up.at(spot.y.value)
        bars = ""
        if spot.x.low is not None and spot.x.high is not None:
            low, high = across.at(spot.x.low), across.at(spot.x.high)
            bars += f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6"
        if spot.y.low is not None and spot.y.high is not None:
            low, high = up.at(spot.y.low), up.at(spot.y.high)
            bars += f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
        if bars:
            parts.append(f'<path class="whisker {name}" d="{bars}"/>')
    return parts


def _marks(group: Group, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for spot in group.spots:
        x, y = across.at(spot.x.value), up.at(spot.y.value)
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>' if spot.is_on_front else ""
        parts.append(f"<g><title>{escape(spot.told)}</title>{ring}{_mark(group, x, y)}</g>")
    return parts


# ---------------------------------------------------------------- names beside the spots


def _places(x: float, y: float, width: float, height: float, radii: Sequence[float]) -> Iterator[tuple[Box, float]]:
    """Boxes around a spot, nearest first, each with its distance."""
    for radius in radii:
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            reach = radius if dx == 0 or dy == 0 else 0.7 * radius
            left = x + dx * reach - (0 if dx > 0 else width if dx < 0 else width / 2)
            top = y + dy * reach - (0 if dy > 0 else height if dy < 0 else height / 2)
            yield (left, top, left + width, top + height), radius


def _taken(groups: Sequence[Group], across: _Scale, up: _Scale) -> Iterator[Box]:
    """What a name should not cover: markers, whiskers, curves."""
    for group in groups:
        drawn = [(across.at(spot.x.value), up.at(spot.y.value)) for spot in group.spots]
        for spot, (x, y) in zip(group.spots, drawn, strict=True):
            around = 10 if spot.is_on_front else 7
            yield x - around, y - around, x + around, y + around
            if spot.x.low is not None and spot.x.high is not None:
                yield across.at(spot.x.low), y - _WHISKER, across.at(spot.x.high), y + _WHISKER
            if spot.y.low is not None and spot.y.high is not None:
                yield x - _WHISKER, up.at(spot.y.high), x + _WHISKER, up.at(spot.y.low)
        for (x1, y1), (x2, y2) in itertools.pairwise(drawn) if group.is_joined else ():
            n = max(2, int(math.dist((x1, y1), (x2, y2)) / 8))
            for step in range(1, n):
                x, y = x1 + (x2 - x1) * step / n, y1 + (y2 - y1) * step / n
                yield x - 2, y - 2, x + 2, y + 2


def _cost(box: Box, taken: NDArray[np.float64]) -> float:
    """The area that `box` covers of what is taken, and a great deal for leaving the drawing."""
    outside = max(0.0, _LEFT + 2 - box[0]) + max(0.0, box[2] - _WIDTH + 2)
    outside += max(0.0, _TOP - box[1]) + max(0.0, box[3] - _BOTTOM + 2)
    wide = np.minimum(box[2], taken[:, 2]) - np.maximum(box[0], taken[:, 0])
    high = np.minimum(box[3], taken[:, 3]) - np.maximum(box[1], taken[:, 1])
    return float((wide.clip(0) * high.clip(0)).sum()) + 1000 * outside


def _names(
    groups: Sequence[Group],
    across: _Scale,
    up: _Scale,
    floor: float,
    stairs: Sequence[Sequence[tuple[float, float]]],
) -> list[str]:
    """Each group's name at the spot where it covers least, then the spots' own texts where they cover nothing."""
    taken = list(_taken(groups, across, up))
    parts = [text_at("floor-label", floor + 5, _BOTTOM - 6, "floor")]
    for (x1, y1), (x2, y2) in (step for steps in stairs for step in itertools.pairwise(steps)):
        taken.append((min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))
    taken.append((floor - 2, _TOP, floor + 1, _BOTTOM))
    taken.append((floor, _BOTTOM - 18, floor + 34, _BOTTOM))

    def put(text: str, name: str, spots: Sequence[Spot], width: float, radii: Sequence[float], most: float) -> None:
        at = [(across.at(spot.x.value), up.at(spot.y.value)) for spot in spots]
        covered = np.array(taken)
        options = [
            (_cost(box, covered) + 0.4 * radius, box, radius, place)
            for place in at
            for box, radius in _places(*place, width, 14, radii)
        ]
        cost, box, radius, (x, y) = min(options)
        if cost > most:
            return
        taken.append(box)
        if radius > radii[0] + 8:
            near = min(max(x, box[0]), box[2]), min(max(y, box[1] + 2), box[3] - 2)
            parts.append(f'<path class="leader" d="{path_through([(x, y), near])}"/>')
        parts.append(text_at(name, box[0], box[3] - 3, text))

    for group in groups:
        color, _ = _style(group)
        if group.number == 0:
            for spot in group.spots:
                put(spot.text, f"label {color}", [spot], 7.0 * len(spot.text), (11, 22, 36, 52), math.inf)
        else:
            put(group.name, f"label {color}", group.spots, 7.0 * len(group.name), (11, 22, 36, 52, 70), math.inf)
    for group in groups:
        for spot in group.spots if group.number else ():
            if spot.text:
                put(spot.text, f"value {_style(group)[0]}", [spot], 6.4 * len(spot.text), (10, 15), 14)
    return parts
