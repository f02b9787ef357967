"""Puts a picture of `streets` together: a stretch of a place, a door, a vehicle, a person, weather, a camera.

Everything is drawn once, as strips of street and as sprites at twice the picture's resolution with edges softened over
one pixel; a picture then only looks dots up. That is what makes thousands of pictures a second possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from louver.data.streets_conditions import CAMERAS, WEATHERS, Camera
from louver.data.streets_dice import Dice
from louver.data.streets_drawing import (
    Canvas,
    Color,
    Floats,
    Integers,
    capsule,
    inside,
    mix,
    number_plates,
    uniform,
)
from louver.data.streets_figures import (
    DOOR_SPRITE,
    PERSON_SPRITE,
    Bitmaps,
    Sprite,
    draw_doors,
    draw_people,
)
from louver.data.streets_places import CURB, GROUND, PLACES, STRIP, draw_place
from louver.data.streets_vehicles import VEHICLE_SPRITE, draw_vehicles

Dots = NDArray[np.uint32]

__all__ = ["World", "build_vehicles", "build_world", "photograph"]


# Porches by place, in the order of PLACES, so that each house door suits its street.
_PORCHES: tuple[Color, ...] = (
    (0.82, 0.76, 0.66), (0.6, 0.45, 0.33), (0.72, 0.74, 0.78), (0.95, 0.95, 0.97),
    (0.55, 0.5, 0.47), (0.92, 0.9, 0.84), (0.66, 0.68, 0.66), (0.86, 0.74, 0.55),
)  # fmt: skip
_PLATES: tuple[tuple[Color, Color], ...] = (  # ground and ink
    ((0.97, 0.97, 0.95), (0.08, 0.08, 0.1)),
    ((0.06, 0.12, 0.4), (0.98, 0.98, 0.98)),
    ((0.98, 0.86, 0.3), (0.1, 0.08, 0.05)),
    ((0.05, 0.06, 0.06), (0.96, 0.96, 0.93)),
)
_PLATE_HEIGHT = 0.345  # of the plate's middle above the door's foot
_LAMP = np.array((1.0, 0.84, 0.56), np.float32).reshape(1, 3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class World:
    """All that is drawn once for a picture size. A dot is one word of four bytes: red, green, blue and one more."""

    size: int
    dots: int  # bitmap dots a scene unit
    strips: Dots  # (places, rows, columns); the fourth byte is explained in `_strip`
    people: Dots  # sprites (figures, rows, columns); the fourth byte is coverage
    doors: Dots
    plates: NDArray[np.bool_]
    across: Floats  # (cameras, size, size): the scene coordinates that a camera's pixels see
    down: Floats
    vignette: Floats
    falling: Mapping[str, Floats]  # (size, size) coverage, by what falls


_LEFT, _TOP = -0.9, -0.35  # the strips begin a little before what any camera can see
_WIDTH, _HEIGHT = STRIP - 2 * _LEFT, 1.9


def _dots(size: int) -> int:
    return 2 * size if size <= 128 else size  # in larger pictures half a dot of jitter cannot be seen


@lru_cache(maxsize=2)
def build_vehicles(size: int, n_identities: int) -> Dots:
    """Sprites (n_identities, rows, columns) of vehicles for pictures of (size, size). The last two sets are kept."""
    return _pack(draw_vehicles(n_identities, scale=_dots(size), pixel=1 / size))


@lru_cache(maxsize=2)
def build_world(size: int) -> World:
    """Draw every place, person and door for pictures of (size, size). The last two worlds are kept."""
    dots, pixel = _dots(size), 1 / size
    lenses = [_lens(camera, size) for camera in CAMERAS.values()]
    across, down, vignette = (np.stack(planes) for planes in zip(*lenses, strict=True))
    return World(
        size=size,
        dots=dots,
        strips=_pack(np.stack([_strip(name, dots, pixel) for name in PLACES])),
        people=_pack(draw_people(scale=dots, pixel=pixel)),
        doors=_pack(draw_doors(_PORCHES, scale=dots, pixel=pixel)),
        plates=number_plates(max(1, size // 64)),
        across=across,
        down=down,
        vignette=vignette,
        falling={
            "rain": _drops(size, count=40, reach=0.06, radius=0.006) * np.float32(0.45),
            "snow": _drops(size, count=55, reach=0.0, radius=0.011),
        },
    )


def _pack(bitmaps: Bitmaps) -> Dots:
    """(…, h, w, 4) bytes as (…, h, w) words: looking up one word costs a quarter of looking up four bytes."""
    return np.ascontiguousarray(bitmaps).view(np.uint32)[..., 0]


def _middles(count: int, scale: int, start: float) -> Floats:
    """Coordinates of the middles of `count` dots."""
    return (np.arange(count, dtype=np.float32) + np.float32(0.5)) / np.float32(scale) + np.float32(start)


def _strip(name: str, dots: int, pixel: float) -> Bitmaps:
    """One place as bytes (rows, columns, 4).

    Sky and lamps never share a dot, so one byte tells both: at 128 neither, toward 255 the sky shows through, toward 1
    the dot shines at night.
    """
    x, y = _middles(round(_WIDTH * dots), dots, _LEFT), _middles(round(_HEIGHT * dots), dots, _TOP)
    canvas = draw_place(Canvas(x=x, y=y, pixel=pixel), name)
    shine = np.float32(128) + np.float32(127) * (canvas.open_sky - canvas.lit)
    planes = np.concatenate([np.clip(canvas.rgb, 0, 1) * 255, shine[None]])
    return np.moveaxis((planes + np.float32(0.5)).astype(np.uint8), 0, -1)


def _lens(camera: Camera, size: int) -> tuple[Floats, Floats, Floats]:
    """Scene coordinates across and down, and brightness, of each pixel (size, size) of a camera."""
    x, y = _middles(size, size, -0.5).reshape(1, -1), _middles(size, size, -0.5).reshape(-1, 1)
    bulge = np.float32(camera.zoom) * (1 + np.float32(camera.barrel) * (x * x + y * y - np.float32(0.2)))
    across = np.float32(0.5) + bulge * (x - np.float32(camera.roll) * y)
    down = np.float32(0.5 + camera.look_down) + bulge * (y + np.float32(camera.roll) * x)
    return across, down, 1 - np.float32(camera.vignette) * (x * x + y * y)


def _drops(size: int, *, count: int, reach: float, radius: float) -> Floats:
    """Coverage (size, size) by slanting streaks of rain or, without `reach`, by flakes; opposite edges join."""
    x, y = _middles(size, size, 0.0).reshape(1, -1), _middles(size, size, 0.0).reshape(-1, 1)
    cover = np.zeros((size, size), np.float32)
    ends = ((reach * 0.3, -reach - 0.001), (-reach * 0.3, reach))
    for left, top, large in uniform(mix(np.arange(count * 3), 951)).reshape(count, 3).tolist():
        dx, dy = x - np.float32(left), y - np.float32(top)
        dx, dy = dx - np.floor(dx + np.float32(0.5)), dy - np.floor(dy + np.float32(0.5))
        cover = np.maximum(cover, inside(capsule(dx, dy, ends, radius * (0.6 + 0.8 * large)), 1 / size))
    return cover


def _weathers(which: Integers, field: str) -> Floats:
    """A field of each picture's weather, shaped to multiply planes (n, 3, h, w)."""
    table = np.array([getattr(weather, field) for weather in WEATHERS.values()], np.float32)
    return table[which].reshape(len(which), -1, 1, 1)


def _cameras(which: Integers, field: str) -> Floats:
    """A field of each picture's camera, shaped to multiply planes (n, 3, h, w)."""
    table = np.array([getattr(camera, field) for camera in CAMERAS.values()], np.float32)
    return table[which].reshape(len(which), -1, 1, 1)


@dataclass(kw_only=True)
class _Scene:
    """A chunk of pictures in the making. Frames are in 0..255; the light falls on them at the end."""

    frame: Floats  # (n, 3, size, size)
    across: Floats  # (n, size, size): the scene coordinates that each pixel sees
    down: Floats
    haze: Floats  # (n, 1, 1, 1)
    haze_color: Floats  # (n, 3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class _Placing:
    """Which sprite stands where in which picture, everything (n, 1, 1) but `figure` (n,). A negative scale mirrors."""

    pictures: Integers | slice
    figure: Integers
    x: Floats
    foot: Floats
    scale_x: Floats
    scale_y: Floats


def photograph(world: World, vehicles: Dots, labels: Mapping[str, Integers], dice: Dice) -> NDArray[np.uint8]:
    """Pictures (n, 3, size, size) with these labels, painted from the back to the front, then seen by their camera."""
    scene = _look(world, labels, dice)
    _lay_street(world, scene, labels, dice)
    everyone = slice(None)

    door_x = np.float32(0.5) + dice.sign("door_side") * dice.real("door_x", 0.15, 0.31)
    leaves = len(world.doors) // len(PLACES)
    upright = np.ones_like(door_x)
    door = _Placing(
        pictures=everyone, figure=labels["place"] * leaves + dice.pick("door_leaf", leaves),
        x=door_x, foot=upright * np.float32(GROUND), scale_x=upright, scale_y=upright,
    )  # fmt: skip
    _stamp(scene, world, world.doors, DOOR_SPRITE, door, rows=(0.0, 0.85), hidden=0.35)

    scale = dice.real("vehicle_scale", 0.9, 1.06)
    vehicle = _Placing(
        pictures=everyone, figure=labels["identity"],
        x=dice.real("vehicle_x", 0.43, 0.57), foot=dice.real("vehicle_y", 0.85, 0.91),
        scale_x=scale * dice.real("vehicle_squeeze", 0.86, 1.0) * dice.sign("vehicle_side"), scale_y=scale,
    )  # fmt: skip
    _stamp(scene, world, vehicles, VEHICLE_SPRITE, vehicle, rows=(0.34, 1.0), hidden=0.3)

    walking = np.flatnonzero(labels["pedestrian"])
    height = dice.real("person_scale", 0.9, 1.08)[walking]
    person = _Placing(
        pictures=walking, figure=dice.pick("person_outfit", len(world.people))[walking],
        x=(np.float32(0.5) + dice.sign("person_side") * dice.real("person_x", 0.24, 0.42))[walking],
        foot=dice.real("person_y", 0.92, 0.97)[walking],
        scale_x=height * dice.sign("person_facing")[walking], scale_y=height,
    )  # fmt: skip
    _stamp(scene, world, world.people, PERSON_SPRITE, person, rows=(0.34, 1.0), hidden=0.2)

    _let_fall(scene, world, labels["weather"], dice)
    # Last, under its porch: neither rain nor snow may hide a digit.
    _screw_on_plate(scene, world, labels["door_number"], dice.pick("plate", len(_PLATES)), door_x)
    return _expose(scene, world, labels, dice, door_x, vehicle)


def _look(world: World, labels: Mapping[str, Integers], dice: Dice) -> _Scene:
    """Point each camera: no two pictures have quite the same framing."""
    camera, weather = labels["camera"], labels["weather"]
    zoom = dice.real("zoom", 0.96, 1.04)
    middle = np.float32(0.5) * (1 - zoom)
    across = world.across[camera] * zoom + middle
    down = world.down[camera] * zoom + (middle + dice.real("down", -0.02, 0.02))
    haze = _weathers(weather, "haze") * dice.real("haze", 0.75, 1.15)[..., None]
    frame = np.empty((len(camera), 3, world.size, world.size), np.float32)
    return _Scene(frame=frame, across=across, down=down, haze=haze, haze_color=_weathers(weather, "horizon") * 245)


def _lay_street(world: World, scene: _Scene, labels: Mapping[str, Integers], dice: Dice) -> None:
    """A stretch of the place's strip with sky, lamps, haze and what lies on the ground."""
    weather = labels["weather"]
    pan = dice.real("pan", 0.0, STRIP) - np.float32(_LEFT)
    turn = dice.sign("mirror") * np.float32(world.dots)
    columns = scene.across * turn
    columns += pan * np.float32(world.dots) - np.float32(0.5) * turn
    rows = scene.down * np.float32(world.dots)
    rows -= np.float32(_TOP * world.dots)
    frame, shine = _unpack(_look_up(world.strips, labels["place"], rows, columns))
    shine = (shine - 128) * np.float32(1 / 127)
    above = slice(0, round(0.8 * world.size))  # no camera sees sky lower than this
    zenith, horizon = _weathers(weather, "zenith") * 255, _weathers(weather, "horizon") * 255
    fall = np.clip(scene.down[:, above] * 2, 0, 1)[:, None]
    sky = (horizon - zenith) * fall
    sky += zenith
    sky *= np.maximum(shine[:, above], 0)[:, None]
    frame[:, :, above] += sky

    hidden = scene.haze * np.clip(np.float32(1.25) - scene.down * np.float32(0.7), 0, 1)[:, None]
    frame *= 1 - hidden
    frame += scene.haze_color * hidden

    # Light dims the whole picture at the end, so what shines is made brighter by as much here.
    lamp = _LAMP * 225 * _weathers(weather, "glow") / _weathers(weather, "light")
    shining = np.flatnonzero(_weathers(weather, "glow"))
    frame[shining] += (lamp[shining] - frame[shining]) * np.maximum(-shine[shining], 0)[:, None]

    snowy = np.flatnonzero(_weathers(weather, "snow"))
    lying = np.clip((scene.down[snowy] - np.float32(GROUND)) * 30, 0, 1)[:, None] * _weathers(weather, "snow")[snowy]
    frame[snowy] += (np.float32(238) - frame[snowy]) * lying

    wet = np.flatnonzero(_weathers(weather, "wet"))
    curb = round(CURB * world.size)
    mirrored = frame[wet, :, 2 * curb - world.size : curb][:, :, ::-1]
    frame[wet, :, curb:] += (mirrored - frame[wet, :, curb:]) * _weathers(weather, "wet")[wet]
    scene.frame = frame


def _look_up(bitmaps: Dots, which: Integers, rows: Floats, columns: Floats) -> Dots:
    """The dots at fractional `rows` and `columns` (n, h, w) of bitmap `which` (n,); beyond an edge, the edge's dot."""
    _, height, width = bitmaps.shape
    spot, column = rows.astype(np.int32), columns.astype(np.int32)
    np.clip(spot, 0, height - 1, out=spot)
    np.clip(column, 0, width - 1, out=column)
    spot *= width
    spot += column
    dots: Dots = bitmaps.reshape(-1).take(spot + (which * (height * width)).reshape(-1, 1, 1))
    return dots


def _unpack(dots: Dots) -> tuple[Floats, Floats]:
    """Words (n, h, w) as planes red, green, blue (n, 3, h, w) and the fourth byte (n, h, w), all in 0..255."""
    planes = np.moveaxis(dots[..., None].view(np.uint8), -1, 1).astype(np.float32, order="C")
    return planes[:, :3], planes[:, 3]


def _stamp(
    scene: _Scene, world: World, sprites: Dots, sprite: Sprite, placing: _Placing,
    *, rows: tuple[float, float], hidden: float,
) -> None:  # fmt: skip
    """Lay sprites over the frames, looking only at the `rows` (shares of the picture) where they can be.

    `hidden` is the share of the background's haze that reaches them: they are nearer.
    """
    which = placing.pictures
    band = slice(round(rows[0] * world.size), round(rows[1] * world.size))
    dots = np.float32(world.dots)
    stretch_x, stretch_y = dots / placing.scale_x, dots / placing.scale_y
    x = scene.across[which, band] * stretch_x
    x -= placing.x * stretch_x + np.float32(sprite.left) * dots
    y = scene.down[which, band] * stretch_y
    y -= placing.foot * stretch_y - np.float32(sprite.top) * dots
    color, cover = _unpack(_look_up(sprites, placing.figure, y, x))
    cover = (cover * np.float32(1 / 255))[:, None]
    haze = scene.haze[which] * np.float32(hidden)
    color *= 1 - haze
    color += cover * (haze * scene.haze_color[which])
    under = scene.frame[which, :, band]
    under *= 1 - cover
    under += color
    scene.frame[which, :, band] = under


def _screw_on_plate(scene: _Scene, world: World, number: Integers, style: Integers, door_x: Floats) -> None:
    """Set the number plate on the pixel grid, above the middle of the door: resampled digits could not be read."""
    pictures = np.arange(len(number))
    height, width = world.plates.shape[1:]
    aside, above = scene.across - door_x, scene.down - np.float32(GROUND - _PLATE_HEIGHT)
    nearest = (aside * aside + above * above).reshape(len(pictures), -1).argmin(axis=1)
    top = np.clip(nearest // world.size - height // 2, 0, world.size - height)
    left = np.clip(nearest % world.size - width // 2, 0, world.size - width)
    ground, ink = (np.array(colors, np.float32)[style][:, None, None] * 255 for colors in zip(*_PLATES, strict=True))
    plate = np.where(world.plates[number][..., None], ink, ground)
    rows = (top[:, None] + np.arange(height))[:, :, None]
    columns = (left[:, None] + np.arange(width))[:, None, :]
    scene.frame[pictures[:, None, None], :, rows, columns] = plate


def _let_fall(scene: _Scene, world: World, weather: Integers, dice: Dice) -> None:
    """Rain or snow, from elsewhere on its tile in every picture."""
    rows = np.arange(world.size).reshape(1, -1, 1) + dice.pick("fall_y", world.size).reshape(-1, 1, 1)
    columns = np.arange(world.size).reshape(1, 1, -1) + dice.pick("fall_x", world.size).reshape(-1, 1, 1)
    for kind, tile in world.falling.items():
        here = np.flatnonzero(np.array([w.falls == kind for w in WEATHERS.values()])[weather])
        cover = tile[rows[here] % world.size, columns[here] % world.size][:, None]
        scene.frame[here] += (np.float32(240) - scene.frame[here]) * cover


def _expose(
    scene: _Scene, world: World, labels: Mapping[str, Integers], dice: Dice, door_x: Floats, vehicle: _Placing
) -> NDArray[np.uint8]:
    """Let the light fall on the scene, then the camera's tint, vignette, contrast and grain."""
    camera, weather = labels["camera"], labels["weather"]
    frame = scene.frame
    dark = np.flatnonzero(_weathers(weather, "light")[:, 0] < np.float32(0.5))
    frame[dark] *= 1 + _pools(scene, dark, door_x, vehicle, dice)[:, None] * (_LAMP / _weathers(weather, "light")[dark])
    warmth = dice.real("warmth", -0.05, 0.05)[..., None] * np.array((1, 0, -1), np.float32).reshape(1, 3, 1, 1)
    exposure = dice.real("exposure", 0.9, 1.08)[..., None]
    contrast = _cameras(camera, "contrast")
    gain = _weathers(weather, "light") * _cameras(camera, "tint") * (exposure * contrast + warmth)
    frame *= gain
    frame *= world.vignette[camera][:, None]
    frame += 110 * (1 - contrast)
    frame += (_grain(world.size, dice) * _cameras(camera, "grain")[:, 0])[:, None]
    np.clip(frame, 0, 255, out=frame)
    frame += np.float32(0.5)
    return frame.astype(np.uint8)


def _pools(scene: _Scene, dark: Integers, door_x: Floats, vehicle: _Placing, dice: Dice) -> Floats:
    """Light (n, h, w) added at night by the porch lamp, a street lamp and the headlights."""
    front = vehicle.x + np.float32(0.42) * vehicle.scale_x
    every = np.ones_like(door_x)
    pools = (
        (door_x, every * np.float32(0.3), 0.16, every * np.float32(0.9)),
        (dice.real("lamp_x", 0.2, 0.8), every * np.float32(0.75), 0.4, dice.real("lamp_glow", 0.4, 0.75)),
        (front, vehicle.foot - np.float32(0.08), 0.1, every * np.float32(0.8)),
    )
    light = np.zeros_like(scene.down[dark])
    for x, y, reach, strength in pools:
        aside = (scene.across[dark] - x[dark]) * np.float32(1 / reach)
        above = (scene.down[dark] - y[dark]) * np.float32(1 / reach)
        light += strength[dark] / (1 + aside * aside + above * above)
    return light


def _grain(size: int, dice: Dice) -> Floats:
    """Sensor noise (n, size, size) about 0, triangular in (-1, 1), its own in every picture."""
    # One hash gives four pixels: 64 bits are eight bytes, and a triangular throw is the sum of two.
    quarter = mix(dice.bits("grain").reshape(-1, 1) + np.arange(-(-size * size // 4)).astype(np.uint64), 977)
    shifts = np.arange(0, 64, 16, dtype=np.uint64)
    halves = (quarter[..., None] >> shifts).astype(np.uint16).reshape(len(quarter), -1)[:, : size * size]
    total = ((halves & np.uint16(255)) + (halves >> np.uint16(8))).astype(np.float32)
    return (total * np.float32(1 / 255) - 1).reshape(-1, size, size)
