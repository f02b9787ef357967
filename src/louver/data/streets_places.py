"""The places of `streets`: tables of parts, each a brush that repeats along the street.

Scene coordinates: a picture spans about 0..1 both ways, y downward. Buildings stand on `GROUND`, the road starts at
`CURB`. A place is a strip `STRIP` pictures long whose ends meet, so that any stretch of it can be the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from louver.data.streets_drawing import (
    Canvas,
    Color,
    Floats,
    Integers,
    Points,
    box,
    capsule,
    disk,
    mix,
    noise,
    pick,
    polygon,
    uniform,
)
from louver.data.streets_drawing import repeat as repeat_every

__all__ = ["CURB", "GROUND", "PLACES", "STRIP", "draw_place"]

GROUND, CURB, STRIP = 0.66, 0.72, 6.0

Part = Callable[[Canvas], object]
Palette = tuple[Color, ...]

repeat = partial(repeat_every, wrap=STRIP)


def _colors(palette: Palette, slot: Integers, key: int) -> Floats:
    """One color of the palette a slot, as planes (3, 1, w)."""
    return np.moveaxis(np.array(palette, np.float32)[pick(mix(slot, key), len(palette))], -1, 0)


def _grain(canvas: Canvas, cell: tuple[float, float], key: int, strength: float) -> Floats:
    """A factor about 1 that makes a flat color a surface."""
    coarse = noise(canvas.x, canvas.y, cell, key, wrap=STRIP)
    fine = noise(canvas.x, canvas.y, (cell[0] / 3, cell[1] / 3), key + 1, wrap=STRIP)
    return 1 + np.float32(strength) * (coarse + fine - 1)


# Wall textures: a factor (h, w) on the wall's color.


def bricks(canvas: Canvas) -> Floats:
    """Courses half a brick out of step, pale mortar between, each brick its own tone."""
    height, width = 0.05, 0.125
    course = np.floor(canvas.y / np.float32(height))
    in_course = canvas.y - (course + np.float32(0.5)) * np.float32(height)
    shifted = canvas.x + (course % 2) * np.float32(width / 2)
    in_brick, brick = repeat(shifted, width)
    mortar = 1 - canvas.inside(box(in_brick, in_course, (width / 2 - 0.007, height / 2 - 0.007)))
    tone = uniform(mix(brick + course.astype(np.int64) * 997 + 8192, 11), 0.72, 1.12)
    return tone + (np.float32(1.45) - tone) * mortar


def plaster(canvas: Canvas) -> Floats:
    """Blotched and a little streaked."""
    return _grain(canvas, (0.15, 0.3), 13, 0.22)


def planks(canvas: Canvas) -> Floats:
    """Horizontal boards, each with a shadow under its edge."""
    board = canvas.y / np.float32(0.047)
    shade: Floats = np.float32(0.78) + np.float32(0.3) * (board - np.floor(board))
    return _grain(canvas, (0.3, 0.05), 17, 0.12) * shade


def corrugated(canvas: Canvas) -> Floats:
    """Vertical ribs and rust."""
    rib, _ = repeat(canvas.x, 0.0625)
    return _grain(canvas, (0.25, 0.12), 19, 0.4) * (np.float32(1.15) - abs(rib) * np.float32(14))


def timber(canvas: Canvas) -> Floats:
    """White plaster crossed by dark beams, upright, level and slanting."""
    post, slot = repeat(canvas.x, 0.25)
    story = canvas.y - (np.floor(canvas.y / np.float32(0.22)) + np.float32(0.5)) * np.float32(0.22)
    slant = np.where(slot % 2 == 0, post, -post)
    beams = np.minimum(np.float32(0.125) - abs(post), np.float32(0.11) - abs(story))
    beams = np.minimum(beams, abs(slant + story) * np.float32(0.7)) - np.float32(0.014)
    return _grain(canvas, (0.1, 0.1), 23, 0.1) * (1 - np.float32(0.72) * canvas.inside(beams))


# Parts: what a place is made of.


def band(canvas: Canvas, *, top: float, bottom: float, color: Color, cell: tuple[float, float], rough: float) -> None:
    """A level stretch of one stuff: sea, sand, lawn, pavement."""
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    cover = canvas.inside(abs(canvas.y - np.float32(middle)) - np.float32(half))
    surface = np.array(color, np.float32).reshape(3, 1, 1) * _grain(canvas, cell, round(top * 1000) + 3, rough)
    canvas.paint(cover * np.ones_like(canvas.x), surface)


def skyline(canvas: Canvas, *, top: float, rise: float, cell: float, color: Color, key: int) -> None:
    """Far hills or treetops: one rough line against the sky, everything below it one color."""
    flat = np.zeros_like(canvas.y[:1])
    ridge = noise(canvas.x, flat, (cell, 1.0), key, wrap=STRIP) + noise(
        canvas.x, flat, (cell / 4, 1.0), key + 1, wrap=STRIP
    ) * np.float32(0.3)
    shade = np.array(color, np.float32).reshape(3, 1, 1) * _grain(canvas, (0.12, 0.06), key + 2, 0.3)
    canvas.paint(canvas.inside(np.float32(top) - np.float32(rise) * ridge - canvas.y), shade)


def houses(
    canvas: Canvas,
    *,
    period: float,
    width: float,
    top: float,
    vary: float,
    walls: Palette,
    texture: Callable[[Canvas], Floats],
    gable: float = 0.0,
    roof: Color = (0.3, 0.3, 0.32),
    key: int,
) -> None:
    """A row of houses: a textured wall a slot, a cornice or a gable with a roof on top."""
    x, slot = repeat(canvas.x, period)
    eaves = np.float32(top) + uniform(mix(slot, key), -vary, vary)
    slope = np.float32(gable) * (1 - abs(x) / np.float32(period / 2))
    sides = abs(x) - np.float32(width / 2)
    tile = canvas.y / np.float32(0.04)
    tiles = np.float32(0.8) + np.float32(0.3) * (tile - np.floor(tile))
    roof_top = canvas.inside(np.maximum(eaves - slope - np.float32(0.03) - canvas.y, sides - np.float32(0.03)))
    canvas.paint(roof_top, np.array(roof, np.float32).reshape(3, 1, 1) * tiles)
    shadow = np.clip((canvas.y - eaves) * 12, 0, 1) * np.float32(0.3) + np.float32(0.7)
    front = np.maximum(eaves - slope * np.float32(0.55) + np.float32(0.02) - canvas.y, sides)
    edge = np.clip((np.float32(width / 2) - abs(x)) * 30, 0, 1) * np.float32(0.2) + np.float32(0.8)
    canvas.paint(canvas.inside(front), _colors(walls, slot, key + 1) * (texture(canvas) * shadow * edge))


def windows(
    canvas: Canvas,
    *,
    spacing: float,
    rows: tuple[float, ...],
    half: tuple[float, float],
    frame: Color = (0.92, 0.92, 0.88),
    glass: Color = (0.25, 0.33, 0.42),
    lit: float = 0.45,
    key: int,
) -> None:
    """Windows at heights `rows`; a share `lit` of them is lit at night. Glass mirrors a little sky at its top."""
    x, slot = repeat(canvas.x, spacing)
    for number, row in enumerate(rows):
        y = canvas.y - np.float32(row)
        canvas.paint(canvas.inside(box(x, y, (half[0] + 0.016, half[1] + 0.016))), frame)
        pane = canvas.inside(box(x, y, half))
        gleam = 1 + np.clip(np.float32(0.25) - y / np.float32(half[1]) * np.float32(0.5) - x * 4, -0.3, 0.9)
        is_lit = (uniform(mix(slot + number * 512, key)) < np.float32(lit)).astype(np.float32)
        canvas.paint(pane, np.array(glass, np.float32).reshape(3, 1, 1) * gleam, lit=is_lit)
        canvas.paint(canvas.inside(box(x, y, (0.005, half[1]))), frame)


def towers(canvas: Canvas, *, period: float, width: float, top: float, vary: float, glasses: Palette, key: int) -> None:
    """Glass towers: a grid of panes in pale mullions, each pane mirroring its own bit of sky."""
    x, slot = repeat(canvas.x, period)
    height = np.float32(top) + uniform(mix(slot, key), -vary, vary)
    front = canvas.inside(np.maximum(height - canvas.y, abs(x) - np.float32(width / 2)))
    pane_x, column = repeat(canvas.x, 0.0625)
    row = np.floor(canvas.y / np.float32(0.08))
    pane_y = canvas.y - (row + np.float32(0.5)) * np.float32(0.08)
    pane = canvas.inside(box(pane_x, pane_y, (0.024, 0.03)))
    bits = mix(column + (row.astype(np.int64) + 64) * 512, key + 1)
    mirrored = uniform(bits, 0.65, 1.15) + np.float32(0.5) * noise(canvas.x, canvas.y, (0.5, 0.4), key + 2, wrap=STRIP)
    canvas.paint(front, _colors(glasses, slot, key + 3) * np.float32(0.55))
    lit = ((bits >> np.uint64(8)) % np.uint64(3) == 0).astype(np.float32)
    canvas.paint(front * pane, _colors(glasses, slot, key + 3) * mirrored, lit=lit)


def awnings(canvas: Canvas, *, period: float, top: float, drop: float, cloths: Palette, key: int) -> None:
    """Striped awnings with scalloped edges, a shop window below and a name board above."""
    x, slot = repeat(canvas.x, period)
    reach = period / 2 - 0.03
    y = canvas.y - np.float32(top)
    cloth = _colors(cloths, slot, key)
    board = canvas.inside(box(x, y + np.float32(0.06), (reach, 0.045)))
    canvas.paint(board, cloth * np.float32(0.45))
    letters = noise(canvas.x, canvas.y, (0.035, 0.06), key + 1, wrap=STRIP) > np.float32(0.5)
    words = canvas.inside(box(x, y + np.float32(0.06), (reach * 0.6, 0.022))) * letters
    canvas.paint(words, (0.98, 0.93, 0.75), lit=1.0)
    shop = canvas.inside(box(x, y - np.float32(drop + 0.11), (reach - 0.01, 0.13)))
    goods = noise(canvas.x, canvas.y, (0.06, 0.05), key + 2, wrap=STRIP)
    wares = np.array((0.8, 0.56, 0.32), np.float32).reshape(3, 1, 1) * goods + np.float32(0.12)
    canvas.paint(shop, wares, lit=0.3 + goods * np.float32(0.5))
    stripe_x, stripe = repeat(canvas.x, 0.0625)
    scallop = disk(stripe_x, y - np.float32(drop), 0.031)
    hanging = np.minimum(np.maximum(box(x, y - np.float32(drop / 2), (reach, drop / 2)), -y), scallop)
    is_white = (stripe % 2).astype(np.float32)
    shade = np.clip(np.float32(1.05) - y / np.float32(drop) * np.float32(0.3), 0.6, 1.1)
    outside = abs(x) - np.float32(reach)
    canvas.paint(canvas.inside(np.maximum(hanging, outside)), (cloth + (np.float32(0.95) - cloth) * is_white) * shade)


def trees(
    canvas: Canvas,
    *,
    spacing: float,
    foot: float,
    height: float,
    radius: float,
    leaves: Palette,
    share: float = 1.0,
    key: int,
) -> None:
    """Round-crowned trees, ragged at the edge and lighter to the upper left; a `share` of the slots has one."""
    x, slot = repeat(canvas.x, spacing)
    x = x - uniform(mix(slot, key), -0.2, 0.2) * np.float32(spacing)
    absent = (uniform(mix(slot, key + 1)) >= np.float32(share)) * np.float32(9)
    tall = np.float32(height) * uniform(mix(slot, key + 2), 0.85, 1.15)
    y = canvas.y - np.float32(foot)
    trunk = np.maximum(abs(x) - np.float32(0.02) + y * np.float32(0.03), np.maximum(y, -tall - y))
    canvas.paint(canvas.inside(trunk + absent), (0.33, 0.24, 0.17))
    ragged = noise(canvas.x, canvas.y, (0.07, 0.07), key + 3, wrap=STRIP) - np.float32(0.5)
    crown = disk(x, (y + tall) * np.float32(0.85), radius) + ragged * np.float32(0.12)
    light = np.float32(0.8) - (x + y + tall) * np.float32(1.6) + ragged * np.float32(0.9)
    canvas.paint(canvas.inside(crown + absent), _colors(leaves, slot, key + 4) * np.clip(light, 0.35, 1.5))


def figures(
    canvas: Canvas,
    *,
    spacing: float,
    foot: float,
    shapes: tuple[tuple[Color, Points], ...],
    share: float = 1.0,
    key: int,
) -> None:
    """Small polygons repeated along the street; each shape is in units of a picture, y upward from `foot`."""
    x, slot = repeat(canvas.x, spacing)
    absent = (uniform(mix(slot, key)) >= np.float32(share)) * np.float32(9)
    up = np.float32(foot) - canvas.y
    for color, points in shapes:
        canvas.paint(canvas.inside(polygon(x, up, points) + absent), color)


def rails(canvas: Canvas, *, spacing: float, foot: float, height: float, color: Color, levels: int) -> None:
    """A fence or a sea rail: posts and level rails."""
    x, _ = repeat(canvas.x, spacing)
    post = canvas.inside(capsule(x, canvas.y, ((0.0, foot), (0.0, foot - height)), spacing * 0.16))
    canvas.paint(post, color)
    for level in range(levels):
        y = canvas.y - np.float32(foot - height * (level + 0.6) / levels)
        canvas.paint(canvas.inside(abs(y) - np.float32(0.009)) * np.ones_like(canvas.x), color)


def shutters(canvas: Canvas, *, spacing: float, half: float, top: float, colors: Palette, key: int) -> None:
    """Roller doors under a striped yellow-and-black lintel."""
    x, slot = repeat(canvas.x, spacing)
    y = canvas.y - np.float32((top + GROUND) / 2)
    slat = canvas.y / np.float32(0.035)
    ribs = np.float32(0.75) + np.float32(0.35) * (slat - np.floor(slat))
    canvas.paint(canvas.inside(box(x, y, (half, (GROUND - top) / 2))), _colors(colors, slot, key) * ribs)
    hazard = ((canvas.x + canvas.y) / np.float32(0.06)) % 2 < 1
    yellow = np.where(hazard, np.float32(0.9), np.float32(0.12))
    lintel = canvas.inside(box(x, canvas.y - np.float32(top), (half + 0.03, 0.03)))
    canvas.paint(lintel, np.stack([yellow, yellow * np.float32(0.82), yellow * np.float32(0.2)]), lit=0.3)


_RED, _CREAM, _GREEN, _STEEL = (0.62, 0.2, 0.16), (0.93, 0.88, 0.75), (0.2, 0.42, 0.18), (0.5, 0.54, 0.58)

_PAVEMENT = partial(band, top=GROUND, bottom=CURB, color=(0.62, 0.6, 0.57), cell=(0.2, 0.05), rough=0.25)
_LAWN = partial(band, top=GROUND, bottom=CURB, color=(0.36, 0.55, 0.2), cell=(0.06, 0.03), rough=0.6)

_BENCH: tuple[tuple[Color, Points], ...] = (
    ((0.3, 0.2, 0.12), ((-0.11, 0.0), (-0.09, 0.0), (-0.09, 0.07), (-0.11, 0.07))),
    ((0.3, 0.2, 0.12), ((0.09, 0.0), (0.11, 0.0), (0.11, 0.07), (0.09, 0.07))),
    ((0.55, 0.36, 0.18), ((-0.13, 0.05), (0.13, 0.05), (0.13, 0.075), (-0.13, 0.075))),
    ((0.55, 0.36, 0.18), ((-0.13, 0.09), (0.13, 0.09), (0.13, 0.14), (-0.13, 0.14))),
)
_SAIL: tuple[tuple[Color, Points], ...] = (
    ((0.97, 0.96, 0.93), ((0.0, 0.02), (0.0, 0.22), (0.1, 0.03))),
    ((0.9, 0.35, 0.2), ((-0.012, 0.02), (-0.012, 0.18), (-0.08, 0.03))),
    ((0.35, 0.2, 0.15), ((-0.07, 0.015), (0.09, 0.015), (0.06, -0.015), (-0.05, -0.015))),
)
_PARASOL: tuple[tuple[Color, Points], ...] = (
    ((0.9, 0.9, 0.85), ((-0.008, 0.0), (0.008, 0.0), (0.008, 0.17), (-0.008, 0.17))),
    ((0.93, 0.3, 0.25), ((-0.13, 0.13), (0.13, 0.13), (0.08, 0.19), (0.0, 0.215), (-0.08, 0.19))),
    ((0.97, 0.93, 0.85), ((-0.075, 0.13), (-0.02, 0.13), (0.0, 0.215), (-0.045, 0.2))),
    ((0.97, 0.93, 0.85), ((0.03, 0.13), (0.085, 0.13), (0.045, 0.2), (0.0, 0.215))),
)
_CONTAINER: tuple[tuple[Color, Points], ...] = (
    ((0.15, 0.36, 0.55), ((-0.2, 0.0), (0.2, 0.0), (0.2, 0.13), (-0.2, 0.13))),
    ((0.1, 0.25, 0.4), ((-0.2, 0.12), (0.2, 0.12), (0.2, 0.14), (-0.2, 0.14))),
    ((0.75, 0.4, 0.12), ((-0.16, 0.14), (0.18, 0.14), (0.18, 0.26), (-0.16, 0.26))),
)

PLACES: Mapping[str, tuple[Part, ...]] = MappingProxyType(
    {
        "brick row": (
            partial(
                houses, period=0.75, width=0.75, top=0.02, vary=0.05, texture=bricks, key=101,
                walls=((0.58, 0.27, 0.2), (0.52, 0.24, 0.19), (0.62, 0.34, 0.25)), roof=(0.28, 0.24, 0.25),
            ),
            partial(windows, spacing=0.25, rows=(0.17, 0.47), half=(0.055, 0.085), key=103),
            _PAVEMENT,
        ),
        "park": (
            partial(skyline, top=0.47, rise=0.2, cell=0.25, color=(0.2, 0.34, 0.2), key=201),
            partial(band, top=0.46, bottom=GROUND, color=(0.4, 0.6, 0.22), cell=(0.08, 0.03), rough=0.5),
            partial(
                trees, spacing=0.5, foot=0.55, height=0.26, radius=0.17, key=203,
                leaves=((0.25, 0.5, 0.2), (0.33, 0.55, 0.18), (0.55, 0.5, 0.15)),
            ),
            partial(figures, spacing=0.75, foot=0.64, shapes=_BENCH, share=0.6, key=205),
            partial(
                trees, spacing=1.0, foot=0.67, height=0.42, radius=0.2, share=0.8, key=207,
                leaves=((0.18, 0.42, 0.16), (0.3, 0.48, 0.14)),
            ),
            partial(band, top=GROUND, bottom=CURB, color=(0.74, 0.65, 0.48), cell=(0.1, 0.03), rough=0.3),
        ),
        "offices": (
            partial(
                towers, period=0.5, width=0.42, top=0.1, vary=0.12, key=301,
                glasses=((0.3, 0.38, 0.45), (0.35, 0.42, 0.42)),
            ),
            partial(
                towers, period=0.75, width=0.6, top=0.12, vary=0.2, key=303,
                glasses=((0.32, 0.55, 0.7), (0.28, 0.6, 0.62), (0.45, 0.55, 0.72)),
            ),
            partial(band, top=0.58, bottom=GROUND, color=(0.3, 0.33, 0.37), cell=(0.2, 0.1), rough=0.2),
            partial(band, top=GROUND, bottom=CURB, color=(0.72, 0.73, 0.74), cell=(0.2, 0.05), rough=0.15),
        ),
        "seaside": (
            partial(skyline, top=0.41, rise=0.06, cell=0.8, color=(0.45, 0.55, 0.62), key=401),
            partial(band, top=0.4, bottom=0.57, color=(0.14, 0.45, 0.62), cell=(0.14, 0.02), rough=0.7),
            partial(figures, spacing=0.75, foot=0.47, shapes=_SAIL, share=0.7, key=403),
            partial(band, top=0.56, bottom=GROUND, color=(0.9, 0.8, 0.56), cell=(0.08, 0.03), rough=0.2),
            partial(figures, spacing=0.5, foot=0.63, shapes=_PARASOL, share=0.7, key=405),
            partial(rails, spacing=0.125, foot=0.67, height=0.11, color=(0.95, 0.95, 0.95), levels=2),
            partial(band, top=GROUND, bottom=CURB, color=(0.8, 0.74, 0.62), cell=(0.12, 0.03), rough=0.2),
        ),
        "shops": (
            partial(
                houses, period=0.5, width=0.5, top=0.06, vary=0.08, texture=plaster, key=501,
                walls=((0.85, 0.75, 0.55), (0.6, 0.7, 0.72), (0.85, 0.6, 0.5), (0.75, 0.78, 0.6)),
            ),
            partial(windows, spacing=0.25, rows=(0.17,), half=(0.05, 0.055), frame=(0.4, 0.3, 0.25), key=503),
            partial(
                awnings, period=0.5, top=0.36, drop=0.1, key=505,
                cloths=((0.8, 0.15, 0.15), (0.12, 0.4, 0.25), (0.15, 0.25, 0.6), (0.85, 0.5, 0.1)),
            ),
            _PAVEMENT,
        ),
        "suburb": (
            partial(skyline, top=0.5, rise=0.15, cell=0.4, color=(0.32, 0.45, 0.3), key=601),
            partial(
                houses, period=1.0, width=0.66, top=0.34, vary=0.02, texture=planks, gable=0.24, key=603,
                walls=((0.95, 0.93, 0.86), (0.95, 0.86, 0.55), (0.68, 0.82, 0.88), (0.9, 0.72, 0.68)),
                roof=(0.45, 0.2, 0.16),
            ),
            partial(windows, spacing=1.0, rows=(0.26, 0.48), half=(0.1, 0.06), lit=0.7, key=605),
            partial(
                trees, spacing=0.5, foot=GROUND, height=0.06, radius=0.09, leaves=((0.22, 0.45, 0.17),),
                share=0.6, key=607,
            ),
            partial(rails, spacing=0.0625, foot=0.68, height=0.1, color=(0.97, 0.97, 0.95), levels=2),
            _LAWN,
        ),
        "warehouses": (
            partial(
                houses, period=1.5, width=1.42, top=0.16, vary=0.04, texture=corrugated, key=701,
                walls=((0.5, 0.55, 0.58), (0.42, 0.5, 0.46), (0.58, 0.5, 0.42)), roof=(0.25, 0.27, 0.3),
            ),
            partial(
                shutters, spacing=0.75, half=0.2, top=0.36, key=703,
                colors=((0.75, 0.77, 0.78), (0.2, 0.35, 0.55), (0.62, 0.25, 0.18)),
            ),
            partial(figures, spacing=1.5, foot=0.68, shapes=_CONTAINER, share=0.8, key=705),
            partial(band, top=GROUND, bottom=CURB, color=(0.5, 0.5, 0.48), cell=(0.1, 0.05), rough=0.4),
        ),
        "old town": (
            partial(
                houses, period=0.5, width=0.5, top=0.24, vary=0.05, texture=timber, gable=0.3, key=801,
                walls=((0.96, 0.92, 0.82), (0.95, 0.85, 0.6), (0.9, 0.74, 0.62)), roof=(0.6, 0.28, 0.17),
            ),
            partial(
                windows, spacing=0.25, rows=(0.33, 0.55), half=(0.045, 0.04), frame=(0.35, 0.2, 0.12), lit=0.6, key=803
            ),
            partial(band, top=GROUND, bottom=CURB, color=(0.55, 0.5, 0.46), cell=(0.07, 0.03), rough=0.6),
        ),
    }
)  # fmt: skip
"""Every place, by the name of its class, as the parts that draw it from the back to the front."""


def draw_place(canvas: Canvas, name: str) -> Canvas:
    """The strip of one place with its road: curb stone, asphalt, a dashed line in the middle."""
    for part in PLACES[name]:
        part(canvas)
    band(canvas, top=CURB, bottom=2.0, color=(0.34, 0.34, 0.36), cell=(0.08, 0.03), rough=0.2)
    band(canvas, top=CURB - 0.004, bottom=CURB + 0.014, color=(0.78, 0.77, 0.74), cell=(0.25, 0.1), rough=0.2)
    x, _ = repeat(canvas.x, 0.375)
    canvas.paint(canvas.inside(box(x, canvas.y - np.float32(0.97), (0.11, 0.012))), (0.92, 0.9, 0.8))
    return canvas
