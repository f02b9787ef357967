"""Under what conditions a picture of `streets` is taken: the weather and the camera."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from louver.data.streets_drawing import Color

__all__ = ["CAMERAS", "WEATHERS", "Camera", "Weather"]


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How a weather colors a scene. `haze` is how much of the background it hides, `glow` how bright lamps are."""

    light: Color
    zenith: Color
    horizon: Color
    haze: float = 0.0
    snow: float = 0.0
    wet: float = 0.0
    glow: float = 0.0
    falls: str = ""


WEATHERS: Mapping[str, Weather] = MappingProxyType(
    {
        "clear": Weather(light=(1.06, 1.03, 0.96), zenith=(0.28, 0.52, 0.88), horizon=(0.7, 0.84, 0.97)),
        "overcast": Weather(light=(0.84, 0.87, 0.92), zenith=(0.66, 0.7, 0.75), horizon=(0.86, 0.88, 0.9), haze=0.08),
        "rain": Weather(
            light=(0.72, 0.77, 0.85), zenith=(0.5, 0.54, 0.6), horizon=(0.7, 0.74, 0.78),
            haze=0.2, wet=0.35, glow=0.5, falls="rain",
        ),
        "fog": Weather(light=(0.9, 0.92, 0.94), zenith=(0.78, 0.8, 0.82), horizon=(0.84, 0.85, 0.86), haze=0.58),
        "snow": Weather(
            light=(0.9, 0.93, 1.0), zenith=(0.7, 0.75, 0.82), horizon=(0.86, 0.88, 0.92),
            haze=0.15, snow=0.8, falls="snow",
        ),
        "night": Weather(light=(0.34, 0.37, 0.52), zenith=(0.1, 0.12, 0.25), horizon=(0.3, 0.3, 0.45), glow=1.0),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Where a camera looks and how it colors: `zoom` < 1 is closer, `roll` a slope, `barrel` the lens's bulge."""

    zoom: float
    look_down: float = 0.0
    roll: float = 0.0
    barrel: float = 0.0
    tint: Color = (1.0, 1.0, 1.0)
    contrast: float = 1.0
    vignette: float = 0.0
    grain: float


CAMERAS: Mapping[str, Camera] = MappingProxyType(
    {
        "phone": Camera(zoom=0.94, roll=-0.04, tint=(1.05, 1.0, 0.94), contrast=1.08, vignette=0.05, grain=4.0),
        "pole": Camera(zoom=1.08, look_down=0.05, tint=(0.95, 1.0, 1.05), contrast=0.95, vignette=0.2, grain=6.0),
        "dashboard": Camera(zoom=0.98, look_down=-0.05, contrast=1.15, vignette=0.1, grain=5.0),
        "doorbell": Camera(zoom=1.05, barrel=0.35, tint=(1.03, 0.98, 1.0), vignette=0.9, grain=6.0),
        "security": Camera(zoom=1.0, look_down=0.02, roll=0.05, tint=(0.9, 1.06, 0.88), contrast=0.9, grain=11.0),
    }
)
