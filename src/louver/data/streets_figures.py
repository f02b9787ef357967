"""What stands in a street of `streets`: how a sprite is made, and the people and house doors.

A sprite is drawn about its own foot: x to the right, y upward, one unit a picture's side. It is kept as uint8
(height, width, 4): red, green, blue already multiplied by the coverage that is the fourth channel, so that sampling
between its dots never bleeds color from outside the shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from louver.data.streets_drawing import Color, Floats, box, capsule, disk, inside, polygon

__all__ = [
    "DOOR_SPRITE",
    "PERSON_SPRITE",
    "Bitmaps",
    "Figure",
    "Sprite",
    "draw_doors",
    "draw_people",
    "to_bitmap",
]

Bitmaps = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """The stretch of a figure's own coordinates that its bitmap shows."""

    left: float
    right: float
    bottom: float
    top: float

    def shape(self, scale: int) -> tuple[int, int]:
        """(height, width) at `scale` dots a unit."""
        return round((self.top - self.bottom) * scale), round((self.right - self.left) * scale)

    def grid(self, scale: int) -> tuple[Floats, Floats]:
        """Coordinates x (1, width) and y (height, 1) of the dots' middles; row 0 is the top."""
        height, width = self.shape(scale)
        x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(scale) + np.float32(self.left)
        y = np.float32(self.top) - (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(scale)
        return x.reshape(1, -1), y.reshape(-1, 1)


PERSON_SPRITE = Sprite(left=-0.13, right=0.13, bottom=-0.03, top=0.5)
DOOR_SPRITE = Sprite(left=-0.27, right=0.27, bottom=-0.05, top=0.66)


class Figure:
    """A sprite in the making: premultiplied `rgb` (3, h, w), `cover` (h, w), and how much of each dot is `body` paint.

    The paint is kept apart from the fixed colors so that one drawing of a body serves every identity.
    """

    def __init__(self, sprite: Sprite, scale: int, pixel: float) -> None:
        self.x, self.y = sprite.grid(scale)
        self.pixel = pixel
        height, width = sprite.shape(scale)
        self.rgb: Floats = np.zeros((3, height, width), np.float32)
        self.cover: Floats = np.zeros((height, width), np.float32)
        self.body: Floats = np.zeros((height, width), np.float32)

    def paint(self, distance: Floats, color: Color | Floats | None, *, opacity: float = 1.0) -> None:
        """Lay a shape over the figure: in `color`, or as body paint where that is None."""
        top = inside(distance, self.pixel) * np.float32(opacity)
        keep = 1 - top
        fixed = (0.0, 0.0, 0.0) if color is None else color
        planes = np.asarray(fixed, np.float32).reshape(3, 1, 1) if isinstance(fixed, tuple) else fixed
        self.rgb = self.rgb * keep + planes * top
        self.cover = self.cover * keep + top
        self.body = self.body * keep + (top if color is None else 0)

    def bitmap(self) -> Bitmaps:
        """The finished sprite (h, w, 4)."""
        return to_bitmap(self.rgb, self.cover)


def to_bitmap(rgb: Floats, cover: Floats) -> Bitmaps:
    """Premultiplied planes (3, h, w) and coverage (h, w), in 0..1, as bytes (h, w, 4)."""
    planes = np.concatenate([np.minimum(np.clip(rgb, 0, 1), cover), cover[None]])
    # Pixels that look past a sprite see its outermost dots, so those must be empty.
    planes[:, (0, -1)] = 0
    planes[:, :, (0, -1)] = 0
    return np.ascontiguousarray(np.moveaxis((planes * 255 + np.float32(0.5)).astype(np.uint8), 0, -1))


_SHIRTS: tuple[Color, ...] = (
    (0.9, 0.45, 0.1), (0.85, 0.2, 0.35), (0.2, 0.55, 0.75), (0.95, 0.9, 0.85), (0.3, 0.6, 0.3), (0.95, 0.8, 0.2),
)  # fmt: skip
_TROUSERS: tuple[Color, ...] = ((0.15, 0.2, 0.38), (0.12, 0.12, 0.14), (0.5, 0.38, 0.24), (0.78, 0.74, 0.66))
_SKINS: tuple[Color, ...] = ((0.96, 0.8, 0.68), (0.85, 0.64, 0.48), (0.62, 0.42, 0.3), (0.4, 0.26, 0.18))
_HAIRS: tuple[Color, ...] = ((0.12, 0.09, 0.08), (0.4, 0.25, 0.12), (0.8, 0.65, 0.35), (0.6, 0.58, 0.56))
_STRIDES = (-0.01, 0.03, 0.055, 0.075)
_OUTFITS = 24


def draw_people(*, scale: int, pixel: float) -> Bitmaps:
    """Sprites (96, h, w, 4): 24 outfits in 4 strides each."""
    return np.stack(
        [
            _person(
                stride,
                shirt=_SHIRTS[outfit % len(_SHIRTS)],
                trousers=_TROUSERS[(outfit // len(_SHIRTS) + outfit) % len(_TROUSERS)],
                skin=_SKINS[(outfit * 3 + outfit // len(_SHIRTS)) % len(_SKINS)],
                hair=_HAIRS[(outfit + outfit // len(_HAIRS)) % len(_HAIRS)],
                scale=scale,
                pixel=pixel,
            )
            for outfit in range(_OUTFITS)
            for stride in _STRIDES
        ]
    )


def _person(
    stride: float, *, shirt: Color, trousers: Color, skin: Color, hair: Color, scale: int, pixel: float
) -> Bitmaps:
    """Someone walking to the right, the feet `stride` before and behind."""
    figure = Figure(PERSON_SPRITE, scale, pixel)
    x, y = figure.x, figure.y
    darker = (shirt[0] * 0.7, shirt[1] * 0.7, shirt[2] * 0.7)
    figure.paint(disk(x * np.float32(0.16), y, 0.012), (0.02, 0.02, 0.03), opacity=0.5)
    figure.paint(capsule(x, y, ((-0.01, 0.33), (-0.035 - stride * 0.7, 0.2)), 0.017), darker)  # the far arm
    for foot in (-stride - 0.012, stride + 0.012):
        figure.paint(capsule(x, y, ((foot * 0.3, 0.22), (foot, 0.03)), 0.023), trousers)
        figure.paint(capsule(x, y, ((foot, 0.014), (foot + 0.022, 0.014)), 0.013), (0.08, 0.07, 0.07))
    figure.paint(polygon(x, y, ((-0.028, 0.2), (0.028, 0.2), (0.035, 0.34), (-0.035, 0.34)), rounding=0.018), shirt)
    hand = 0.03 + stride * 0.8
    figure.paint(capsule(x, y, ((0.005, 0.33), (hand, 0.215)), 0.018), darker)
    figure.paint(disk(x - np.float32(hand), y - np.float32(0.2), 0.015), skin)
    figure.paint(capsule(x, y, ((0.0, 0.36), (0.0, 0.39)), 0.018), skin)
    figure.paint(disk(x + np.float32(0.006), y - np.float32(0.427), 0.045), hair)
    figure.paint(disk(x - np.float32(0.008), y - np.float32(0.414), 0.036), skin)
    return figure.bitmap()


_LEAVES: tuple[Color, ...] = (
    (0.55, 0.1, 0.12), (0.1, 0.28, 0.2), (0.12, 0.2, 0.42), (0.4, 0.25, 0.14), (0.2, 0.2, 0.22), (0.85, 0.6, 0.15),
)  # fmt: skip


def draw_doors(walls: tuple[Color, ...], *, scale: int, pixel: float) -> Bitmaps:
    """Sprites (len(walls) * 6, h, w, 4): in a porch of every wall color, a door of every leaf color."""
    return np.stack([_door(wall, leaf, scale, pixel) for wall in walls for leaf in _LEAVES])


def _door(wall: Color, leaf: Color, scale: int, pixel: float) -> Bitmaps:
    """A porch with a small gable, a frame, a paneled leaf, a knob and a step; the plate is laid on later."""
    figure = Figure(DOOR_SPRITE, scale, pixel)
    x, y = figure.x, figure.y
    roof = ((-0.22, 0.53), (0.22, 0.53), (0.0, 0.63))
    pale = (min(1.0, wall[0] * 1.15), min(1.0, wall[1] * 1.15), min(1.0, wall[2] * 1.15))
    deep = (leaf[0] * 0.65, leaf[1] * 0.65, leaf[2] * 0.65)
    figure.paint(box(x, y - np.float32(0.27), (0.18, 0.28)), wall)
    figure.paint(polygon(x, y, roof, rounding=0.01), (0.3, 0.22, 0.2))
    figure.paint(box(x, y - np.float32(0.225), (0.148, 0.245)), pale)
    figure.paint(box(x, y - np.float32(0.21), (0.128, 0.23)), leaf)
    for across in (-0.058, 0.058):
        figure.paint(box(x - np.float32(across), y - np.float32(0.13), (0.043, 0.09)), deep)
        figure.paint(box(x - np.float32(across + 0.004), y - np.float32(0.125), (0.036, 0.082)), leaf)
    figure.paint(disk(x - np.float32(0.1), y - np.float32(0.22), 0.016), (0.95, 0.8, 0.35))
    figure.paint(box(x, y + np.float32(0.01), (0.19, 0.022)), (0.7, 0.69, 0.66))
    return figure.bitmap()
