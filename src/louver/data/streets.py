"""`streets`, the generated world: vehicles to recognise, and places, people and door numbers that must not leak.

The world of vehicles is fixed: identity 7 has the same body, color and livery for every seed and every number of
identities. A seed chooses scenes. What happens in a picture depends on (seed, index) alone, through integer hashing, so
the first k pictures are the same however many are asked for, and the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np

from louver.data.streets_conditions import CAMERAS, WEATHERS
from louver.data.streets_dice import Dice
from louver.data.streets_drawing import Integers
from louver.data.streets_places import PLACES
from louver.data.streets_scene import build_vehicles, build_world, photograph
from louver.data.streets_vehicles import BODIES, COLORS, MAX_IDENTITIES, vehicle_of
from louver.errors import DataError
from louver.types import Images

__all__ = ["CLASSES", "street_labels", "streets"]

_SMALLEST = 48  # below this the plate of 13 x 9 pixels no longer fits on its door
_CHUNK_PIXELS = 24 * 64 * 64  # the planes in work then stay in the processor's cache, and memory stays bounded

CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "body": tuple(body.name for body in BODIES),
        "color": tuple(name for name, _ in COLORS),
        "place": tuple(PLACES),
        "weather": tuple(WEATHERS),
        "pedestrian": ("none", "person"),
        "door_number": tuple(f"{number:02d}" for number in range(100)),
        "camera": tuple(CAMERAS),
    }
)
"""The names of every label's values, in order; identities have none."""

_PRIVATE = ("place", "weather", "pedestrian", "door_number", "camera")


def streets(n: int, *, seed: int, size: int = 64, n_identities: int = 96) -> Images:
    """Pictures (n, 3, size, size) uint8 of street scenes, one vehicle in each, with eight label columns (n,) int64.

    identity: which vehicle, 0..n_identities-1. It determines body, color and livery.
    body: sedan, hatchback, van, pickup, bus or truck. From 48 identities on, each comes in every color.
    color: main paint, 0..7.
    place: the street behind, 0..7. weather: 0..5. camera: viewpoint, lens and tint, 0..4.
    pedestrian: 1 if a person walks in front. door_number: 0..99, on the house door as two digits.

    Identity, place, weather, pedestrian, door_number and camera are uniform and independent of each other.
    `streets(n, seed=s)` begins with `streets(k, seed=s)` for every k < n.

    Raises:
        DataError: n < 1, a seed outside 0..2**64-1, size < 48, or n_identities outside 1..1536.

    >>> streets(5, seed=0).pixels.shape
    (5, 3, 64, 64)
    """
    labels = street_labels(n, seed=seed, n_identities=n_identities)
    if size < _SMALLEST:
        raise DataError(
            f"streets: expected a size of at least {_SMALLEST} pixels, got {size}; "
            "take a larger one, as below it the door number cannot be read"
        )
    world, vehicles = build_world(size), build_vehicles(size, n_identities)
    pixels = np.empty((n, 3, size, size), np.uint8)
    step = max(1, _CHUNK_PIXELS // size**2)

    def fill(start: int) -> None:
        chunk = slice(start, min(n, start + step))
        shown = {column: values[chunk] for column, values in labels.items()}
        pixels[chunk] = photograph(world, vehicles, shown, Dice(seed, np.arange(chunk.start, chunk.stop)))

    # Two threads, as numpy lets others run while it works; chunks depend on nothing but their own index.
    with ThreadPoolExecutor(max_workers=2) as threads:
        for _ in threads.map(fill, range(0, n, step)):
            pass
    return Images(pixels=pixels, labels=labels, classes=dict(CLASSES), name="streets")


def street_labels(n: int, *, seed: int, n_identities: int = 96) -> dict[str, Integers]:
    """The labels of `streets(n, seed=seed, n_identities=n_identities)`, each (n,), without drawing a picture.

    Raises:
        DataError: n < 1, a seed outside 0..2**64-1, or n_identities outside 1..1536.

    >>> sorted(street_labels(5, seed=0))
    ['body', 'camera', 'color', 'door_number', 'identity', 'pedestrian', 'place', 'weather']
    """
    if n < 1:
        raise DataError(f"streets: expected at least 1 picture, got n={n}; ask for one or more")
    if not 0 <= seed < 2**64:
        raise DataError(f"streets: expected a seed in 0..2**64-1, got {seed}; choose one in that range")
    if not 1 <= n_identities <= MAX_IDENTITIES:
        raise DataError(
            f"streets: expected n_identities in 1..{MAX_IDENTITIES}, got {n_identities}; "
            "choose a number in that range, as beyond it vehicles would begin to look alike"
        )
    dice = Dice(seed, np.arange(n))
    identity = dice.pick("identity", n_identities)
    body, color, _ = vehicle_of(identity)
    private = {column: dice.pick(column, len(CLASSES[column])) for column in _PRIVATE}
    return {"identity": identity, "body": body, "color": color, **private}
