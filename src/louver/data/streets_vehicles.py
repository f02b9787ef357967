"""The vehicles of `streets`: body types, colors and liveries, and which vehicle has which.

The tables are in the coordinates of a vehicle's sprite: x to the right, where its front is, y upward from the road.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from louver.data.streets_drawing import Color, Floats, Integers, Points, box, capsule, disk, inside, over, polygon
from louver.data.streets_figures import Bitmaps, Figure, Sprite, to_bitmap

__all__ = [
    "BODIES",
    "COLORS",
    "LIVERIES",
    "MAX_IDENTITIES",
    "VEHICLE_SPRITE",
    "Body",
    "Livery",
    "draw_vehicles",
    "vehicle_of",
]

VEHICLE_SPRITE = Sprite(left=-0.48, right=0.48, bottom=-0.04, top=0.42)


@dataclass(frozen=True, kw_only=True)
class Body:
    """A body type as a side view. `wheels` are (x, radius); `roof` is the height above which the roof color begins."""

    name: str
    outline: tuple[Points, ...]
    glass: tuple[Points, ...]
    wheels: tuple[tuple[float, float], ...]
    roof: float
    mark: tuple[float, float]
    seams: tuple[Points, ...] = ()
    dark: tuple[Points, ...] = ()
    lamps: tuple[tuple[float, float], tuple[float, float]]


def _path(points: str) -> Points:
    """A polygon written as an SVG path is: "x,y x,y …"."""
    pairs = (point.split(",") for point in points.split())
    return tuple((float(x), float(y)) for x, y in pairs)


def _pane(left: float, right: float, bottom: float = 0.2, top: float = 0.285) -> Points:
    return ((left, bottom), (right, bottom), (right, top), (left, top))


BODIES = (
    Body(
        name="sedan",
        outline=(
            _path(
                "-0.33,0.055 -0.335,0.13 -0.31,0.155 -0.2,0.165 -0.13,0.235 "
                "0.05,0.24 0.14,0.168 0.27,0.15 0.325,0.12 0.335,0.055"
            ),
        ),
        glass=(
            _path("-0.165,0.172 -0.115,0.222 -0.045,0.224 -0.045,0.172"),
            _path("-0.025,0.172 -0.025,0.224 0.042,0.224 0.11,0.172"),
        ),
        wheels=((-0.205, 0.062), (0.21, 0.062)),
        roof=0.172,
        mark=(0.035, 0.115),
        seams=(_path("-0.035,0.07 -0.035,0.17"), _path("0.105,0.08 0.105,0.165")),
        lamps=((-0.325, 0.135), (0.31, 0.125)),
    ),
    Body(
        name="hatchback",
        outline=(
            _path(
                "-0.25,0.055 -0.26,0.15 -0.235,0.2 -0.17,0.262 0.03,0.265 0.12,0.18 0.22,0.158 0.255,0.125 0.26,0.055"
            ),
        ),
        glass=(
            _path("-0.195,0.185 -0.15,0.245 -0.06,0.248 -0.06,0.185"),
            _path("-0.04,0.185 -0.04,0.248 0.02,0.248 0.09,0.185"),
        ),
        wheels=((-0.16, 0.062), (0.165, 0.062)),
        roof=0.185,
        mark=(0.02, 0.122),
        seams=(_path("-0.05,0.07 -0.05,0.18"), _path("0.085,0.08 0.085,0.175")),
        lamps=((-0.25, 0.165), (0.24, 0.135)),
    ),
    Body(
        name="van",
        outline=(_path("-0.34,0.055 -0.345,0.3 -0.325,0.325 0.13,0.325 0.2,0.225 0.3,0.185 0.335,0.14 0.34,0.055"),),
        glass=(_path("0.04,0.205 0.04,0.295 0.12,0.295 0.18,0.205"),),
        wheels=((-0.22, 0.065), (0.21, 0.065)),
        roof=0.27,
        mark=(-0.15, 0.2),
        seams=(_path("0.02,0.07 0.02,0.31"), _path("-0.31,0.17 0.02,0.17")),
        lamps=((-0.338, 0.16), (0.318, 0.145)),
    ),
    Body(
        name="pickup",
        outline=(
            _path(
                "-0.36,0.07 -0.36,0.165 -0.085,0.165 -0.07,0.255 0.06,0.26 0.145,0.178 0.3,0.165 0.345,0.13 0.35,0.07"
            ),
        ),
        glass=(_path("-0.045,0.178 -0.038,0.24 0.05,0.243 0.115,0.178"),),
        wheels=((-0.225, 0.072), (0.225, 0.072)),
        roof=0.182,
        mark=(0.04, 0.125),
        seams=(_path("-0.085,0.075 -0.085,0.165"), _path("0.12,0.085 0.12,0.172")),
        dark=(_path("-0.345,0.155 -0.1,0.155 -0.1,0.17 -0.345,0.17"),),
        lamps=((-0.352, 0.14), (0.328, 0.14)),
    ),
    Body(
        name="bus",
        outline=(_path("-0.43,0.055 -0.43,0.33 -0.41,0.355 0.4,0.355 0.43,0.32 0.435,0.055"),),
        glass=(
            *(_pane(left, left + 0.095) for left in (-0.4, -0.29, -0.18, -0.07, 0.04)),
            _pane(0.165, 0.25, 0.09),
            _path("0.3,0.17 0.3,0.3 0.415,0.3 0.42,0.17"),
        ),
        wheels=((-0.26, 0.062), (0.285, 0.062)),
        roof=0.298,
        mark=(-0.12, 0.145),
        lamps=((-0.428, 0.13), (0.42, 0.11)),
    ),
    Body(
        name="truck",
        outline=(
            _path("-0.42,0.105 -0.42,0.37 0.15,0.37 0.15,0.105"),
            _path("0.19,0.06 0.19,0.285 0.21,0.3 0.32,0.3 0.375,0.2 0.4,0.185 0.405,0.06"),
        ),
        glass=(_path("0.235,0.2 0.235,0.275 0.31,0.275 0.35,0.2"),),
        wheels=((-0.32, 0.068), (-0.17, 0.068), (0.285, 0.068)),
        roof=0.325,
        mark=(-0.13, 0.235),
        seams=(_path("-0.2,0.105 -0.2,0.37"), _path("0.215,0.07 0.215,0.28")),
        dark=(_path("-0.41,0.06 0.3,0.06 0.3,0.105 -0.41,0.105"),),
        lamps=((-0.41, 0.09), (0.388, 0.13)),
    ),
)

COLORS: tuple[tuple[str, Color], ...] = (
    ("white", (0.95, 0.95, 0.93)),
    ("black", (0.13, 0.13, 0.15)),
    ("silver", (0.62, 0.65, 0.68)),
    ("red", (0.82, 0.1, 0.1)),
    ("yellow", (0.97, 0.78, 0.08)),
    ("green", (0.1, 0.5, 0.24)),
    ("blue", (0.1, 0.27, 0.75)),
    ("purple", (0.52, 0.2, 0.6)),
)

# Stripes and marks are signed distances. Stripes lie on the flank that every body has, at this height, and are thin
# enough that the main paint still rules.
_FLANK = 0.108


def _nothing(x: Floats, y: Floats) -> Floats:
    return np.full(np.broadcast_shapes(x.shape, y.shape), 9, np.float32)


def _band(x: Floats, y: Floats) -> Floats:
    return box(x, y - np.float32(_FLANK), (9.0, 0.017))


def _double(x: Floats, y: Floats) -> Floats:
    return box(x, np.abs(y - np.float32(_FLANK)) - np.float32(0.02), (9.0, 0.007))


def _slash(x: Floats, y: Floats) -> Floats:
    return box(x + np.float32(0.03) - (y - np.float32(_FLANK)) * np.float32(0.8), y, (0.05, 9.0))


def _rear(x: Floats, y: Floats) -> Floats:
    return box(x + np.float32(9.14), y, (9.0, 9.0))


def _checks(x: Floats, y: Floats) -> Floats:
    is_dark = (np.floor(x * 25) + np.floor((y - np.float32(_FLANK)) * 50)) % 2
    gaps: Floats = np.float32(0.04) - is_dark * np.float32(0.08)
    return np.maximum(box(x, y - np.float32(_FLANK), (9.0, 0.02)), gaps)


def _disk(x: Floats, y: Floats) -> Floats:
    return disk(x, y, 0.042)


def _diamond(x: Floats, y: Floats) -> Floats:
    distance: Floats = (np.abs(x) + np.abs(y) - np.float32(0.052)) * np.float32(0.7)
    return distance


def _bar(x: Floats, y: Floats) -> Floats:
    return box(x, y, (0.02, 0.06))


Emblem = Callable[[Floats, Floats], Floats]

STRIPES: tuple[Emblem, ...] = (_nothing, _band, _double, _slash, _rear, _checks)
MARKS: tuple[Emblem, ...] = (_nothing, _disk, _diamond, _bar)


@dataclass(frozen=True)
class Livery:
    """What tells apart two vehicles of one body and color; `accent` counts on from the body's color."""

    stripe: Emblem
    mark: Emblem
    is_two_tone: bool
    accent: int


LIVERIES = tuple(
    Livery(stripe, mark, is_two_tone, accent)
    for accent in range(1, len(COLORS))
    for stripe in STRIPES
    for is_two_tone in (False, True)
    for mark in MARKS
    if is_two_tone or (stripe, mark) != (_nothing, _nothing)  # else nothing shows the accent: seven twins
)

_TALL_FLANK = 0.15  # a mark set this high has room to be larger
_PAIRS = len(BODIES) * len(COLORS)
MAX_IDENTITIES = _PAIRS * 32


def vehicle_of(identity: Integers) -> tuple[Integers, Integers, Integers]:
    """Body, color and livery (indices) of each identity: the world's registry, the same for every seed.

    Bodies and colors go round so that 48 identities in a row hold each pair once; liveries walk by a step that is
    coprime to their number, so that no two of the `MAX_IDENTITIES` vehicles look the same.
    """
    body = identity % len(BODIES)
    color = (identity + identity // len(BODIES)) % len(COLORS)
    livery = (identity // _PAIRS * 59 + (identity % _PAIRS) * 101) % len(LIVERIES)
    return body, color, livery


def draw_vehicles(n_identities: int, *, scale: int, pixel: float) -> Bitmaps:
    """Sprites (n_identities, h, w, 4) of the first vehicles of the world."""
    drawn = [_body(body, scale, pixel) for body in BODIES]
    bodies, colors, liveries = (which.tolist() for which in vehicle_of(np.arange(n_identities)))
    height, width = VEHICLE_SPRITE.shape(scale)
    sprites = np.empty((n_identities, height, width, 4), np.uint8)
    for identity, (body, color, livery) in enumerate(zip(bodies, colors, liveries, strict=True)):
        figure = drawn[body]
        paint = _paint(figure, BODIES[body], color, LIVERIES[livery])
        sprites[identity] = to_bitmap(figure.rgb + paint * (figure.body * _shading(figure)), figure.cover)
    return sprites


def _body(body: Body, scale: int, pixel: float) -> Figure:
    """Everything about a body type that is the same in every color."""
    figure = Figure(VEHICLE_SPRITE, scale, pixel)
    x, y = figure.x, figure.y
    left = min(point[0] for shape in body.outline for point in shape)
    right = max(point[0] for shape in body.outline for point in shape)
    shadow = disk((x - np.float32((left + right) / 2)) * np.float32(0.06), y, (right - left) * 0.03 - 0.004)
    figure.paint(shadow, (0.02, 0.02, 0.03), opacity=0.55)
    for shape in body.dark:
        figure.paint(polygon(x, y, shape), (0.1, 0.1, 0.11))
    for shape in body.outline:
        figure.paint(polygon(x, y, shape, rounding=0.008), None)
    for shape in body.dark[: body.name == "pickup"]:  # the open bed is seen over the flank, a truck's chassis is not
        figure.paint(polygon(x, y, shape), (0.1, 0.1, 0.11))
    for ends in body.seams:
        figure.paint(capsule(x, y, ends, 0.003), (0.05, 0.05, 0.06), opacity=0.6)
    mirrored = np.clip(np.float32(0.35) + (y - np.float32(0.2)) * 3 + x * np.float32(0.5), 0.12, 0.75)
    sky = np.stack([mirrored * np.float32(0.75), mirrored * np.float32(0.9), mirrored])
    for shape in body.glass:
        figure.paint(polygon(x, y, shape, rounding=0.004), (0.06, 0.06, 0.07))
        figure.paint(polygon(x, y, shape, rounding=-0.003), sky)
    sill = np.maximum(abs(y - np.float32(0.06)) - np.float32(0.012), abs(x - (left + right) / 2) - (right - left) / 2)
    figure.paint(sill.astype(np.float32), (0.12, 0.12, 0.13), opacity=0.8)
    for across, radius in body.wheels:
        from_hub = x - np.float32(across)
        figure.paint(disk(from_hub, y - np.float32(radius), radius + 0.014), (0.04, 0.04, 0.05))
        figure.paint(disk(from_hub, y - np.float32(radius), radius), (0.11, 0.11, 0.12))
        figure.paint(disk(from_hub, y - np.float32(radius), radius * 0.55), (0.66, 0.67, 0.69))
        figure.paint(disk(from_hub, y - np.float32(radius), radius * 0.2), (0.25, 0.25, 0.27))
    (rear_x, rear_y), (front_x, front_y) = body.lamps
    figure.paint(box(x - np.float32(rear_x), y - np.float32(rear_y), (0.012, 0.018)), (0.85, 0.08, 0.06))
    figure.paint(box(x - np.float32(front_x), y - np.float32(front_y), (0.02, 0.014)), (1.0, 0.96, 0.75))
    return figure


def _shading(figure: Figure) -> Floats:
    """Light from above: bright roofs, a gleam along the shoulder, darkness toward the sill."""
    rise = np.clip(figure.y * np.float32(3.2), 0, 1)
    shoulder = np.clip(1 - abs(figure.y - np.float32(0.155)) * 45, 0, 1)
    shade: Floats = (
        np.float32(0.68) + rise * np.float32(0.32) + shoulder * np.float32(0.14) + figure.x * np.float32(0.08)
    )
    return shade


def _paint(figure: Figure, body: Body, color: int, livery: Livery) -> Floats:
    """The body's colors (3, h, w): base, roof, stripe, mark."""
    base, accent, third = (
        np.array(COLORS[(color + step) % len(COLORS)][1], np.float32).reshape(3, 1, 1)
        for step in (0, livery.accent, 1 + livery.accent % (len(COLORS) - 1))
    )
    has_stripe = livery.stripe is not _nothing
    roof = np.float32(body.roof) - figure.y if livery.is_two_tone else _nothing(figure.x, figure.y)
    emblem_x, emblem_y = figure.x - np.float32(body.mark[0]), figure.y - np.float32(body.mark[1])
    large = np.float32(1 if body.mark[1] < _TALL_FLANK else 1.5)
    planes = base + np.zeros_like(figure.cover)
    for distance, shade in (
        (roof, accent),
        (livery.stripe(figure.x, figure.y), accent),
        # In the stripe's own color a mark could vanish in the stripe.
        (livery.mark(emblem_x / large, emblem_y / large) * large, third if has_stripe else accent),
    ):
        planes = over(planes, inside(distance, figure.pixel), shade)
    return planes
