"""A contact sheet: pictures a person can look at before trusting what is computed from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from louver.data.pictures import require_pillow
from louver.errors import DataError
from louver.storage import write_bytes
from louver.types import Images

__all__ = ["contact_sheet"]

_MARGIN = 6
_LINE = 12
_TALLEST = 160


def contact_sheet(images: Images, path: Path | str, *, columns: int = 8, n: int = 48, scale: int | None = None) -> Path:
    """Writes the first `n` pictures as one PNG with their labels below, and returns its path.

    A label is its class name where that is known, else `column number`. `scale` enlarges by a whole factor; by default
    small pictures grow to what a person can see. The file appears whole or not at all.

    Raises:
        DataError: no images, or a number below one.
        StorageError: the disk is full, or the folder cannot be written.
        MissingExtraError: Pillow is not installed.
    """
    if not len(images):
        raise DataError(f"{images.name}: expected at least one image for a contact sheet, got none")
    for what, value in (("columns", columns), ("n", n), ("scale", scale)):
        if value is not None and value < 1:
            raise DataError(f"contact sheet: expected {what} of 1 or more, got {value}")
    require_pillow()
    from PIL import Image, ImageDraw, ImageFont

    count = min(n, len(images))
    _, h, w = images.image_shape
    factor = scale or max(1, _TALLEST // max(h, w))
    captions = [_caption(images, index) for index in range(count)]
    lines = max(len(caption) for caption in captions)
    font = ImageFont.load_default(size=10)
    text_width = max((font.getlength(line) for caption in captions for line in caption), default=0)
    cell_width = max(w * factor, int(np.ceil(text_width)))
    cell_height = h * factor + lines * _LINE
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB",
        (columns * (cell_width + _MARGIN) + _MARGIN, rows * (cell_height + _MARGIN) + _MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, levels in enumerate(_levels(images, count)):
        left = _MARGIN + index % columns * (cell_width + _MARGIN)
        top = _MARGIN + index // columns * (cell_height + _MARGIN)
        # Nearest neighbor: a person should see the pixels that the network sees.
        sheet.paste(Image.fromarray(levels).resize((w * factor, h * factor), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(captions[index]):
            draw.text((left, top + h * factor + number * _LINE), line, fill="black", font=font)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return write_bytes(Path(path), content.getvalue())


def _levels(images: Images, count: int) -> NDArray[np.uint8]:
    """The first pictures as (count, h, w, 3) levels."""
    pixels = images.pixels[:count]
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255).astype(np.uint8)
    colored = np.repeat(pixels, 3, axis=1) if pixels.shape[1] == 1 else pixels
    return np.ascontiguousarray(colored.transpose(0, 2, 3, 1)).astype(np.uint8, copy=False)


def _caption(images: Images, index: int) -> tuple[str, ...]:
    lines: list[str] = []
    for column, values in images.labels.items():
        value, names = int(values[index]), images.classes.get(column, ())
        is_named = 0 <= value < len(names)
        # A bare "07" or "none" says nothing without its column; a single column needs no such help.
        lines.append(
            names[value] if is_named and len(images.labels) == 1 else f"{column} {names[value] if is_named else value}"
        )
    return tuple(lines)
