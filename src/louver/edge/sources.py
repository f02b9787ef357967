"""Pictures from files, folders, arrays and cameras, brought to the shape that a bundle takes.

A picture is brought to size as the lab does it: the largest centered part of the wanted shape, resized with the
bilinear filter in one step (which is a resize of the shorter side and a center crop). One channel is gray by ITU-R
601, three are red, green, blue. So a device sees what was audited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from louver.errors import DataError, MissingExtraError
from louver.storage import DAMAGED, read_npz

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "images_from"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB"}

_Picture = NDArray[np.float32]


def images_from(sources: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[str, _Picture]]:
    """(name, float32 of `shape` in [0,1]) of every picture, source by source; a folder's sorted by path.

    A source is a picture, a folder of pictures (and of folders of them), an .npy or .npz file, or camera[:N], which
    does not end.

    Raises:
        DataError: a source that is none of these, or does not fit.
        MissingExtraError: Pillow or OpenCV is needed and not installed.
    """
    for source in sources:
        path = Path(source)
        if source == "camera" or source.startswith("camera:"):
            yield from _camera(source, shape)
        elif path.is_dir():
            paths = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
            if not paths:
                raise DataError(f"{path}: expected pictures ({', '.join(sorted(SUFFIXES))}), got none; name another")
            yield from ((str(one), _from_file(one, shape)) for one in paths)
        elif not path.is_file():
            raise DataError(
                f"expected a picture, a folder, .npy, .npz or camera[:N], got {source!r}; name what is there"
            )
        elif path.suffix in (".npy", ".npz"):
            yield from _from_arrays(path, shape)
        else:
            yield str(path), _from_file(path, shape)


def _from_file(path: Path, shape: tuple[int, ...]) -> _Picture:
    pillow = _pillow()
    height, width = _sides(path, shape)
    # Pillow's decoders each break in their own way on bad bytes; every kind they are known to raise is here.
    broken = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, pillow.DecompressionBombError)
    try:
        with pillow.open(path) as opened:
            if opened.format == "JPEG":
                # The decoder may skip detail that the resize throws away; twice the size keeps what it needs.
                cover = max(height / opened.height, width / opened.width)
                opened.draft(None, (int(2 * cover * opened.width) + 1, int(2 * cover * opened.height) + 1))
            opened.load()
            return _fitted(opened, str(path), shape)
    except DataError:
        raise
    except broken as error:
        raise DataError(
            f"{path}: expected a picture, got what cannot be decoded ({error}); replace or remove it"
        ) from error


def _fitted(opened: Image.Image, name: str, shape: tuple[int, ...]) -> _Picture:
    channels, (height, width) = shape[0], _sides(name, shape)
    if opened.mode.startswith(("I", "F")):
        raise DataError(f"{name}: expected 8 bits a channel, got Pillow mode {opened.mode!r}; convert it to 8 bits")
    if opened.mode in ("P", "PA"):
        opened = opened.convert("RGBA")
    if opened.mode != _MODES[channels]:
        opened = opened.convert(_MODES[channels])
    scale = min(opened.height / height, opened.width / width)
    top, left = (opened.height - scale * height) / 2, (opened.width - scale * width) / 2
    box = (left, top, left + scale * width, top + scale * height)
    levels = np.asarray(opened.resize((width, height), _pillow().Resampling.BILINEAR, box=box))
    return _unit(levels.reshape(height, width, channels).transpose(2, 0, 1))


def _from_arrays(path: Path, shape: tuple[int, ...]) -> Iterator[tuple[str, _Picture]]:
    try:
        if path.suffix == ".npy":
            # Mapped, so that a file larger than the memory is read picture by picture.
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            arrays = read_npz(path)
            if len(arrays) != 1 and "images" not in arrays:
                raise DataError(
                    f"{path}: expected one array, or one called images, got {', '.join(sorted(arrays)) or 'none'}; "
                    "rename it"
                )
            images = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path}: expected arrays, got what cannot be read ({error}); replace it") from error
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape or images.dtype not in (np.uint8, np.float32):
        wanted = ", ".join(map(str, shape))
        raise DataError(
            f"{path}: expected uint8 or float32 of shape [n, {wanted}], got {images.dtype} of {list(images.shape)}; "
            "bring it to that shape"
        )
    for i in range(len(images)):
        image = np.asarray(images[i])
        yield f"{path}[{i}]", _unit(image) if image.dtype == np.uint8 else image


def _camera(source: str, shape: tuple[int, ...]) -> Iterator[tuple[str, _Picture]]:
    number = source.partition(":")[2] or "0"
    if not number.isdecimal():
        raise DataError(f"{source}: expected camera or camera:N, a number from 0 on; give one")
    pillow = _pillow()
    with _opened_camera(source, int(number)) as camera:
        n_frames = 0
        while True:
            is_read, frame = camera.read()
            if not is_read:
                if n_frames:
                    return
                raise DataError(f"{source}: expected a camera that gives pictures, got none; look at its connection")
            red_first = np.ascontiguousarray(frame[:, :, ::-1])
            yield f"{source}[{n_frames}]", _fitted(pillow.fromarray(red_first), source, shape)
            n_frames += 1


@contextmanager
def _opened_camera(source: str, number: int) -> Iterator[Any]:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{source} needs OpenCV: pip install 'louver[camera]'") from error
    camera = cv2.VideoCapture(number)
    try:
        yield camera
    finally:
        camera.release()


def _pillow() -> Any:  # noqa: ANN401 - the module, which may be missing
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading pictures needs Pillow: pip install 'louver[edge]'") from error
    return PIL.Image


def _sides(name: Path | str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 3 or shape[0] not in _MODES:
        raise DataError(
            f"{name}: expected a bundle that takes pictures of 1 or 3 channels, this one takes {shape}; give .npy files"
        )
    return shape[1], shape[2]


def _unit(levels: NDArray[np.uint8]) -> _Picture:
    """Levels 0 to 255 as float32 in [0,1], exactly as the lab makes them."""
    out = levels.astype(np.float32)
    out /= 255
    return np.ascontiguousarray(out)
