"""The dice of `streets`: every random choice in a picture, by name, from (seed, index) alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from louver.data.streets_drawing import Floats, Integers, mix, pick, uniform

__all__ = ["Dice"]

# What a throw decides. Its place in this list is the key of its stream: append, never reorder, or all pictures change.
_THROWS = (
    "identity", "place", "weather", "pedestrian", "door_number", "camera",
    "pan", "mirror", "zoom", "down", "exposure", "warmth", "haze",
    "vehicle_x", "vehicle_y", "vehicle_scale", "vehicle_squeeze", "vehicle_side",
    "door_x", "door_side", "door_leaf", "plate",
    "person_x", "person_y", "person_scale", "person_side", "person_facing", "person_outfit",
    "fall_x", "fall_y", "lamp_x", "lamp_glow", "grain",
)  # fmt: skip


class Dice:
    """Independent throws for the pictures at `index`: each a function of (seed, index, what it decides)."""

    def __init__(self, seed: int, index: Integers) -> None:
        self._pictures = mix(index, seed)

    def bits(self, what: str) -> NDArray[np.uint64]:
        """64 bits a picture."""
        return mix(self._pictures, _THROWS.index(what) + 1)

    def pick(self, what: str, count: int) -> Integers:
        """One of 0..count-1 a picture."""
        return pick(self.bits(what), count)

    def real(self, what: str, low: float, high: float) -> Floats:
        """A number in [low, high) a picture, shaped (n, 1, 1) to multiply planes."""
        return uniform(self.bits(what), low, high).reshape(-1, 1, 1)

    def sign(self, what: str) -> Floats:
        """-1 or 1 a picture, shaped (n, 1, 1)."""
        return (self.pick(what, 2) * 2 - 1).astype(np.float32).reshape(-1, 1, 1)
