"""Encoded pictures to arrays: decoding, the size and channels asked for, and refusals that name the picture."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from louver.errors import DataError, MissingExtraError
from louver.types import Images

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "Wanted", "fit", "from_pil", "picture", "require_pillow", "stack", "wanted"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_Picture = NDArray[np.uint8]
_MODES = {1: "L", 3: "RGB"}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as in every codec here


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the caller asks of every picture: (height, width) and channels; None leaves them as they come."""

    size: tuple[int, int] | None = None
    channels: int | None = None


def wanted(size: int | tuple[int, int] | None, channels: int | None) -> Wanted:
    """The checked wish of a caller; a single `size` is a square.

    Raises:
        DataError: a size below one, or channels other than 1 and 3.
    """
    if isinstance(size, int):
        size = (size, size)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise DataError(f"expected a size of one or two positive numbers (height, width), got {size}")
    if channels not in (None, 1, 3):
        raise DataError(f"expected 1 channel (gray) or 3 (color), got {channels}")
    return Wanted(size=size, channels=channels)


def require_pillow() -> None:
    """Nothing, if Pillow is there.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("reading pictures needs Pillow: pip install 'louver[lab]'") from error


def picture(content: bytes | Path, name: str, wish: Wanted) -> _Picture:
    """(h, w, 1 or 3) levels of one encoded picture, resized to cover `wish.size` and cropped to its center.

    Raises:
        DataError: the picture is missing, corrupt, cut short or of an unusual depth.
        MissingExtraError: Pillow is not installed.
    """
    require_pillow()
    from PIL import Image

    # Pillow's decoders each break in their own way on bad bytes; every kind they are known to raise is here.
    broken = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, Image.DecompressionBombError)
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            if wish.size is not None and opened.format == "JPEG":
                # The decoder may skip detail that the resize throws away; twice the size keeps what it needs.
                cover = max(side / own for side, own in zip(wish.size, opened.size[::-1], strict=True))
                opened.draft(None, (int(2 * cover * opened.width) + 1, int(2 * cover * opened.height) + 1))
            opened.load()
            return from_pil(opened, name, wish)
    except DataError:
        raise
    except broken as error:
        raise DataError(
            f"{name}: expected a picture, got what cannot be decoded ({error}); replace or remove it"
        ) from error


def from_pil(opened: Image.Image, name: str, wish: Wanted) -> _Picture:
    """(h, w, 1 or 3) levels of a decoded picture; see `picture`."""
    if opened.mode.startswith(("I", "F")):
        raise DataError(f"{name}: expected 8 bits a channel, got Pillow mode {opened.mode!r}; convert it to 8 bits")
    channels = wish.channels or (1 if opened.mode in ("1", "L", "LA") else 3)
    if opened.mode in ("P", "PA"):
        opened = opened.convert("RGBA")
    if opened.mode != _MODES[channels]:
        opened = opened.convert(_MODES[channels])
    if wish.size is not None:
        opened = _cover(opened, wish.size)
    levels = np.asarray(opened)
    return levels if levels.ndim == 3 else levels[:, :, None]


def stack(count: int, pictures: Iterable[tuple[str, _Picture]], source: str) -> NDArray[np.uint8]:
    """(n, c, h, w) of `count` pictures, each with the name that a refusal calls it by.

    Raises:
        DataError: sizes differ, or gray and color are mixed; names the first picture that differs.
    """
    out: NDArray[np.uint8] | None = None
    first = ""
    for index, (name, levels) in enumerate(pictures):
        h, w, c = levels.shape
        if out is None:
            out, first = np.empty((count, c, h, w), np.uint8), name
        if c != out.shape[1]:
            kinds = {1: "gray", 3: "color"}
            raise DataError(
                f"{source}: expected {kinds[out.shape[1]]} pictures like {first}, got a {kinds[c]} one, {name}; "
                "convert it, or load with channels=3 (or 1)"
            )
        if (h, w) != out.shape[2:]:
            raise DataError(
                f"{source}: expected pictures of {out.shape[2]} x {out.shape[3]} (height x width) like {first}, "
                f"got {h} x {w} in {name}; load with size=(height, width)"
            )
        out[index] = levels.transpose(2, 0, 1)
    assert out is not None
    return out


def fit(images: Images, wish: Wanted) -> Images:
    """The same pictures at the size and with the channels asked for; unchanged where they are so already.

    Raises:
        MissingExtraError: a resize is needed and Pillow is not installed.
    """
    pixels = images.pixels
    if wish.channels not in (None, pixels.shape[1]):
        pixels = pixels.repeat(3, axis=1) if wish.channels == 3 else _gray(pixels)
    if wish.size not in (None, pixels.shape[2:]):
        assert wish.size is not None
        pixels = _resized(pixels, wish.size)
    return images if pixels is images.pixels else dataclasses.replace(images, pixels=pixels)


def _gray(pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.uint8] | NDArray[np.float32]:
    gray = np.tensordot(_LUMA, pixels, axes=(0, 1))[:, None].astype(np.float32)
    return np.rint(gray).astype(np.uint8) if pixels.dtype == np.uint8 else gray.clip(0, 1)


def _resized(
    pixels: NDArray[np.uint8] | NDArray[np.float32], size: tuple[int, int]
) -> NDArray[np.uint8] | NDArray[np.float32]:
    require_pillow()
    from PIL import Image

    # Plane by plane: Pillow holds one float plane at most, and uint8 planes come out as they would in color.
    out = np.empty((*pixels.shape[:2], *size), pixels.dtype)
    for plane in np.ndindex(pixels.shape[:2]):
        out[plane] = np.asarray(_cover(Image.fromarray(pixels[plane]), size))
    return out


def _cover(opened: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    height, width = size
    scale = min(opened.height / height, opened.width / width)
    top, left = (opened.height - scale * height) / 2, (opened.width - scale * width) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return opened.resize((width, height), Image.Resampling.BILINEAR, box=box)
