"""Brushes for `streets`: integer noise, signed distances, a canvas to paint on, a small font.

Everything here gives the same bits on every machine. Randomness is integer hashing, never a library's generator; the
arithmetic is float32 `+ - * /` and `sqrt`, element by element, each rounded once as IEEE 754 demands. Sums over an
axis, products of matrices and `sin`, `exp` or `pow` are left out on purpose: their last bit depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Canvas",
    "Color",
    "Floats",
    "Integers",
    "Points",
    "box",
    "capsule",
    "disk",
    "inside",
    "mix",
    "noise",
    "number_plates",
    "over",
    "pick",
    "polygon",
    "repeat",
    "uniform",
]

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Color = tuple[float, float, float]
Points = Sequence[tuple[float, float]]

# The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(counter: Integers | NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """64 well-mixed bits for every element of `counter`; another `key` gives an unrelated stream."""
    bits = counter.astype(np.uint64) * np.uint64(_STEP) + np.uint64(key * _FIRST % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_FIRST)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_SECOND)
    return bits ^ (bits >> np.uint64(31))


def uniform(bits: NDArray[np.uint64], low: float = 0.0, high: float = 1.0) -> Floats:
    """Float32 in [low, high) from the top 24 bits, which float32 holds exactly."""
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return np.float32(low) + np.float32(high - low) * unit


def pick(bits: NDArray[np.uint64], count: int) -> Integers:
    """Integers in 0..count-1, each as likely as the others to within 2**-32."""
    return ((bits >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def noise(x: Floats, y: Floats, cell: tuple[float, float], key: int, *, wrap: float) -> Floats:
    """Smooth noise (h, w) in [0,1) at `x` (1, w) and `y` (h, 1), on a lattice of `cell` (width, height).

    It repeats after `wrap` in x.
    """
    columns = max(1, round(wrap / cell[0]))
    across, down = x[0] * np.float32(columns / wrap), y * np.float32(1 / cell[1])
    left, top = np.floor(across), np.floor(down)
    fx, fy = _smooth(across - left), _smooth(down - top)
    column, row = left.astype(np.int64) % columns, top[:, 0].astype(np.int64)
    first = int(row.min())
    numbers = np.arange(first, int(row.max()) + 2).reshape(-1, 1) + 4096
    lattice = uniform(mix(np.arange(columns) + numbers * 8192, key))
    level: Floats = lattice[:, column] * (1 - fx) + lattice[:, (column + 1) % columns] * fx
    between: Floats = level[row - first] * (1 - fy) + level[row - first + 1] * fy
    return between


def _smooth(t: Floats) -> Floats:
    smooth: Floats = t * t * (3 - 2 * t)
    return smooth


def repeat(x: Floats, period: float, *, wrap: float) -> tuple[Floats, Integers]:
    """Distance from the middle of the slot that holds `x`, and that slot's number; slots repeat after `wrap`."""
    slot = np.floor(x / np.float32(period))
    return x - (slot + np.float32(0.5)) * np.float32(period), slot.astype(np.int64) % round(wrap / period)


def box(x: Floats, y: Floats, half: tuple[float, float], *, rounding: float = 0.0) -> Floats:
    """Signed distance to a box about the origin; negative inside."""
    dx, dy = abs(x) - np.float32(half[0] - rounding), abs(y) - np.float32(half[1] - rounding)
    within: Floats = np.minimum(np.maximum(dx, dy), 0) - np.float32(rounding)
    return disk(np.maximum(dx, 0), np.maximum(dy, 0), 0.0) + within


def disk(x: Floats, y: Floats, radius: float | Floats) -> Floats:
    """Signed distance to a disk about the origin; negative inside."""
    distance: Floats = np.sqrt(x * x + y * y) - np.asarray(radius, np.float32)
    return distance


def capsule(x: Floats, y: Floats, ends: Points, radius: float) -> Floats:
    """Signed distance to a thick line with round ends; negative inside."""
    (x0, y0), (x1, y1) = ends
    dx, dy = x1 - x0, y1 - y0
    along = (x - np.float32(x0)) * np.float32(dx) + (y - np.float32(y0)) * np.float32(dy)
    t: Floats = np.clip(along / np.float32(dx * dx + dy * dy), 0, 1)
    return disk(x - (np.float32(x0) + t * np.float32(dx)), y - (np.float32(y0) + t * np.float32(dy)), float(radius))


def polygon(x: Floats, y: Floats, points: Points, *, rounding: float = 0.0) -> Floats:
    """Signed distance to a simple polygon, its corners rounded outward; negative inside."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), 1e9, np.float32)
    is_inside = np.zeros(nearest.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        nearest = np.minimum(nearest, capsule(x, y, ((x0, y0), (x1, y1)), 0.0))
        if y0 != y1:
            crossing = np.float32(x0) + (y - np.float32(y0)) * np.float32((x1 - x0) / (y1 - y0))
            is_inside ^= ((y < np.float32(y0)) != (y < np.float32(y1))) & (x < crossing)
    distance: Floats = np.where(is_inside, -nearest, nearest) - np.float32(rounding)
    return distance


def inside(distance: Floats, pixel: float) -> Floats:
    """Coverage in [0,1] of a shape, its edge softened over one `pixel`: this is all the antialiasing there is."""
    cover: Floats = np.clip(np.float32(0.5) - distance * np.float32(1 / pixel), 0, 1)
    return cover


def over(under: Floats, cover: Floats, color: Color | Floats) -> Floats:
    """Planes (3, h, w) with `color` laid over them where `cover` (h, w) says."""
    top = np.asarray(color, np.float32).reshape(3, 1, 1) if isinstance(color, tuple) else color
    return under + (top - under) * cover


class Canvas:
    """What is painted on: planes `rgb` (3, h, w) in [0,1], and `open_sky` and `lit`, both (h, w).

    `x` (1, w) and `y` (h, 1) are scene coordinates, one unit a picture's side, y downward; `pixel` is the width of the
    edges' softness. Paint covers sky and lamps alike, so that what stands in front hides both.
    """

    def __init__(self, *, x: Floats, y: Floats, pixel: float) -> None:
        shape = (y.size, x.size)
        self.x, self.y, self.pixel = x.reshape(1, -1), y.reshape(-1, 1), pixel
        self.rgb: Floats = np.zeros((3, *shape), np.float32)
        self.open_sky: Floats = np.ones(shape, np.float32)
        self.lit: Floats = np.zeros(shape, np.float32)

    def inside(self, distance: Floats) -> Floats:
        """Coverage of a shape at this canvas's softness."""
        return inside(distance, self.pixel)

    def paint(self, cover: Floats, color: Color | Floats, *, lit: float | Floats = 0.0) -> Self:
        """Lay `color` over what is there; where it is `lit` it shines at night."""
        touched = np.flatnonzero(cover.any(axis=1))  # most parts cover few rows: half of the drawing time
        if not len(touched):
            return self
        rows = slice(int(touched[0]), int(touched[-1]) + 1)

        def here(planes: Floats) -> Floats:
            return planes[..., rows, :] if planes.shape[-2] == cover.shape[0] else planes

        bare = 1 - cover[rows]
        self.rgb[:, rows] = over(self.rgb[:, rows], cover[rows], color if isinstance(color, tuple) else here(color))
        self.open_sky[rows] *= bare
        self.lit[rows] = self.lit[rows] * bare + cover[rows] * (here(lit) if isinstance(lit, np.ndarray) else lit)
        return self


# A hand-made 5x7 font, one string a digit, rows from the top.
_DIGITS = (
    "01110 10001 10001 10001 10001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


def number_plates(unit: int) -> NDArray[np.bool_]:
    """The ink of plates 00 to 99, (100, 9 unit, 13 unit): two 5x7 digits, one dot apart and one from the edge."""
    glyphs = np.array([[[dot == "1" for dot in row] for row in digit.split()] for digit in _DIGITS])
    plates = np.zeros((100, 9, 13), bool)
    numbers = np.arange(100)
    plates[:, 1:8, 1:6] = glyphs[numbers // 10]
    plates[:, 1:8, 7:12] = glyphs[numbers % 10]
    return plates.repeat(unit, axis=1).repeat(unit, axis=2)
