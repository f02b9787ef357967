"""Drawings as inline SVG and pictures as data URIs. Numbers come in; only pixels are computed here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from louver.errors import DataError

__all__ = [
    "Point",
    "Series",
    "line_chart",
    "marker_path",
    "nice_ticks",
    "path_through",
    "picture_size",
    "picture_uri",
    "series_key",
    "text_at",
]

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4")
_N_COLORS = 6

MARK_LENGTH = 18
"""A name under a drawing is cut to this many characters."""

NARROW_UP_TO = 8
"""Up to this many cuts a chart takes half the page."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a line; `low` and `high` are its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: a point for every place on the horizontal axis, None where there is none."""

    name: str
    points: tuple[Point | None, ...]


# ---------------------------------------------------------------- pictures


def picture_uri(pixels: NDArray[np.uint8]) -> str:
    """A (h, w, 1 or 3) uint8 picture as a PNG data URI.

    Raises:
        DataError: another shape or type.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype != np.uint8:
        raise DataError(f"expected a uint8 picture of shape (h, w, 1 or 3), got {pixels.dtype} {pixels.shape}")
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    held = io.BytesIO()
    picture.save(held, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def picture_size(height: int, width: int, *, wish: int = 112, most: int = 256) -> tuple[int, int]:
    """(height, width) at which to show a picture: whole multiples of its pixels near `wish`, never wider than `most`.

    >>> picture_size(32, 32)
    (96, 96)
    """
    scale: float = max(1, wish // max(height, width))
    scale = min(scale, most / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


# ---------------------------------------------------------------- charts


def nice_ticks(low: float, high: float, *, base: int = 1000, about: int = 4) -> tuple[float, ...]:
    """Round values from at or below `low` to at or above `high`, round after division by the power of `base` below."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    largest = max(abs(low), abs(high))
    unit = float(base) ** math.floor(math.log(largest, base)) if largest >= base else 1.0
    raw = (high - low) / unit / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / unit / step + 1e-9), math.ceil(high / unit / step - 1e-9)
    return tuple(index * step * unit for index in range(first, last + 1))


def marker_path(kind: int, x: float, y: float, size: float = 4.2) -> str:
    """One of six shapes, so that lines differ without color."""
    s, d = size, 1.3 * size
    shapes = {
        0: f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        1: f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        2: f"M{x:.1f} {y - 1.2 * s:.1f}l{1.2 * s:.1f} {2.1 * s:.1f}h{-2.4 * s:.1f}z",
        3: f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z",
        4: f"M{x:.1f} {y + 1.2 * s:.1f}l{1.2 * s:.1f} {-2.1 * s:.1f}h{-2.4 * s:.1f}z",
        5: f"M{x - s:.1f} {y - s:.1f}l{2 * s} {2 * s}M{x + s:.1f} {y - s:.1f}l{-2 * s} {2 * s}",
    }
    return shapes[kind % len(shapes)]


def _style(index: int) -> tuple[str, str]:
    """(class, dash attribute) of the line number `index`; past six lines color and dash no longer go together."""
    dash = _DASHES[(index + index // _N_COLORS) % len(_DASHES)]
    return f"s{index % _N_COLORS + 1}", f' stroke-dasharray="{dash}"' if dash else ""


def series_key(index: int) -> Markup:
    """The line number `index` as a small sample for a legend; decoration, so hidden from screen readers."""
    name, dash = _style(index)
    return Markup(
        f'<svg class="key {name}" viewBox="0 0 44 14" width="44" height="14" aria-hidden="true" focusable="false">'
        f'<path class="line" d="M1 7H43"{dash}/><path class="mark" d="{marker_path(index, 22, 7)}"/></svg>'
    )


def _short(text: str, most: int) -> str:
    """`text` cut in its middle: module paths differ at both ends."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return text[:head] + "…" + text[-(most - 1 - head) :]


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`wanted` heights pushed apart to at least `gap`, order kept, inside [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    above = low - gap
    for i in order:
        above = placed[i] = max(wanted[i], above + gap)
    below = high + gap
    for i in reversed(order):
        below = placed[i] = min(placed[i], below - gap)
    return placed


def _runs(points: Sequence[Point | None]) -> list[list[tuple[int, Point]]]:
    """Stretches of neighboring points that can be drawn: a gap in the numbers is a gap in the line."""
    runs: list[list[tuple[int, Point]]] = [[]]
    for index, point in enumerate(points):
        if point is None or not math.isfinite(point.value):
            runs.append([])
        else:
            runs[-1].append((index, point))
    return [run for run in runs if run]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where the drawing area lies, and which pixel a place or a value falls on."""

    left: float
    right: float
    top: float
    bottom: float
    n_places: int
    ticks: tuple[float, ...]

    def at_x(self, index: int) -> float:
        wide = self.right - self.left
        if self.n_places == 1:
            return self.left + wide / 2
        inset = wide * min(0.08, 0.5 / self.n_places)
        return self.left + inset + (wide - 2 * inset) * index / (self.n_places - 1)

    def at_y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        # An endless interval ends at the edge of the drawing, not outside it.
        inside = min(max(value, low), high)
        return self.bottom - (self.bottom - self.top) * (inside - low) / (high - low)


def path_through(points: Sequence[tuple[float, float]]) -> str:
    """A line through `points`, as path data."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _axes(frame: _Frame, places: Sequence[str], number: Callable[[float], str], *, is_slanted: bool) -> list[str]:
    parts = []
    for tick in frame.ticks:
        y = frame.at_y(tick)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(text_at("tick", frame.left - 7, y + 4, number(tick), anchor="end"))
    parts.append(f'<path class="axis" d="M{frame.left} {frame.bottom}H{frame.right}"/>')
    for index, place in enumerate(places):
        x = frame.at_x(index)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>')
        if is_slanted:
            turn = f' transform="translate({x + 4:.1f} {frame.bottom + 15}) rotate(-32)"'
            parts.append(f'<text class="tick" text-anchor="end"{turn}>{escape(_short(place, MARK_LENGTH))}</text>')
        else:
            parts.append(text_at("tick", x, frame.bottom + 19, _short(place, 24), anchor="middle"))
    return parts


def text_at(name: str, x: float, y: float, text: str, *, anchor: str = "start") -> str:
    """A line of text of the class `name`."""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _floor_line(frame: _Frame, floor: Sequence[float | None]) -> list[str]:
    parts = []
    for run in _runs([None if value is None else Point(value=value) for value in floor]):
        drawn = [(frame.at_x(i), frame.at_y(point.value)) for i, point in run]
        if len(drawn) == 1:
            # A single place has no line to draw: its floor is a short bar.
            ((x, y),) = drawn
            drawn = [(x - 22, y), (x + 22, y)]
        parts.append(f'<path class="floor" d="{path_through(drawn)}"/>')
    return parts


def _interval(frame: _Frame, run: Sequence[tuple[int, Point]], name: str) -> list[str]:
    """A band behind the line and a bar at each point."""
    known = [
        (frame.at_x(i), frame.at_y(point.low), frame.at_y(point.high))
        for i, point in run
        if point.low is not None and point.high is not None and not (math.isnan(point.low) or math.isnan(point.high))
    ]
    outline = [(x, high) for x, _, high in known] + [(x, low) for x, low, _ in reversed(known)]
    parts = [f'<path class="band {name}" d="{path_through(outline)}z"/>'] if len(known) > 1 else []
    for x, low, high in known:
        bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
        parts.append(f'<path class="whisker {name}" d="{bar}"/>')
    return parts


def _line(frame: _Frame, line: Series, index: int) -> tuple[list[str], list[str]]:
    """(bands and lines, markers): markers are drawn after all lines, so that none hides them."""
    name, dash = _style(index)
    under, over = [], []
    for run in _runs(line.points):
        drawn = [(frame.at_x(i), frame.at_y(point.value)) for i, point in run]
        under += _interval(frame, run, name)
        if len(drawn) > 1:
            under.append(f'<path class="line {name}" d="{path_through(drawn)}"{dash}/>')
        over += [f'<path class="mark {name}" d="{marker_path(index, x, y)}"/>' for x, y in drawn]
    return under, over


def _values(frame: _Frame, line: Series, number: Callable[[float], str]) -> list[str]:
    """The value at each point: above it, except at the top of the drawing, where it goes below."""
    parts = []
    for run in _runs(line.points):
        for index, point in run:
            y = frame.at_y(point.value)
            lift = -9 if y > frame.top + 14 else 18
            parts.append(text_at("value", frame.at_x(index), y + lift, number(point.value), anchor="middle"))
    return parts


def _end_labels(frame: _Frame, series: Sequence[Series], floor: Sequence[float | None] | None) -> list[str]:
    """Names at the ends of the lines, pushed apart."""
    ends = []
    lines = [(f"label {_style(i)[0]}", line.name, line.points) for i, line in enumerate(series)]
    if floor is not None:
        lines.append(("floor-label", "floor", tuple(None if v is None else Point(value=v) for v in floor)))
    for name, text, points in lines:
        if runs := _runs(points):
            ends.append((frame.at_y(runs[-1][-1][1].value), name, text))
    heights = _spread([y for y, _, _ in ends], 15, frame.top + 4, frame.bottom - 2)
    return [
        text_at(name, frame.right + 6, y + 4, _short(text, 13))
        for y, (_, name, text) in zip(heights, ends, strict=True)
    ]


def line_chart(
    *,
    identifier: str,
    title: str,
    description: str,
    places: Sequence[str],
    series: Sequence[Series],
    number: Callable[[float], str],
    floor: Sequence[float | None] | None = None,
    span: tuple[float, float] | None = None,
    base: int = 1000,
    is_labeled: bool = True,
) -> Markup:
    """Lines over `places` (cuts, in network order) as an SVG that names and describes itself.

    `span` is a range that the vertical axis always covers, `base` what its round numbers are round in (1024 for bytes).
    Values that are not finite leave a gap. `is_labeled` writes the name at the end of each line; without it the values
    are written at the points where there is room.
    """
    n = len(places)
    is_wide = n > NARROW_UP_TO
    width, height = (900, 330) if is_wide else (440, 290)
    longest = max((len(place) for place in places), default=0)
    is_slanted = n > 1 and longest > (4 if is_wide else max(6, 52 // n))
    values = [v for line in series for p in line.points if p for v in (p.value, p.low, p.high) if v is not None]
    values += [v for v in floor or () if v is not None] + list(span or ())
    drawable = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    frame = _Frame(
        left=70,
        right=width - (104 if is_labeled else 28),
        top=14,
        bottom=height - (90 if is_slanted else 34),
        n_places=n,
        ticks=nice_ticks(min(drawable), max(drawable), base=base),
    )

    parts = _axes(frame, places, number, is_slanted=is_slanted)
    parts += _floor_line(frame, floor or ())
    drawn = [_line(frame, line, index) for index, line in enumerate(series)]
    parts += [part for under, _ in drawn for part in under] + [part for _, over in drawn for part in over]
    if is_labeled:
        parts += _end_labels(frame, series, floor)
    elif not is_wide:
        parts += [part for line in series for part in _values(frame, line, number)]

    safe = escape(identifier)
    return Markup(
        f'<svg class="chart{" chart-wide" if is_wide else ""}" role="img" viewBox="0 0 {width} {height}" '
        f'aria-labelledby="{safe}-title {safe}-desc" focusable="false">'
        f'<title id="{safe}-title">{escape(title)}</title><desc id="{safe}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
