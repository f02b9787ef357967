"""Who may see which pictures: four roles, disjoint by content and not by file name or index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from louver.errors import ConfigError, DataError
from louver.types import Images, Roles

__all__ = ["assign_roles", "drop_overlap"]

_PRIORITY = ("test", "validation", "train", "auxiliary")
"""Who keeps a picture that two roles hold: a test image lost would change what the numbers are measured on."""

_Floats = NDArray[np.float32]
_Pairs = NDArray[np.int64]

# Two pictures are one when their difference could be the work of a codec or a resize. In levels of 0..255:
#
# * _THUMB: root mean square distance of two thumbnails (8 x 8 gray, 4 x 4 color). Only a sieve: pairs beyond it are not
#   looked at. JPEG of quality 60 reaches 3.2 on 28 x 28 pictures, and less on larger ones.
# * _LUMA: a JPEG coder moves a coefficient of an 8 x 8 block by half a quantization step at most; clipping to 0..255
#   and another resize filter add a part of the coefficient itself (_RELATIVE). In that unit the lowest ten coefficients
#   of quality 60 reach 1.9 on CIFAR-10 and vehicles, 3.0 on faces, 4.0 on Fashion-MNIST; other resize filters reach
#   3.6. Only clipping moves the mean of a block, by 8 levels at most (_CLIPPED). The two most alike CIFAR-10 pictures,
#   training against test, that show different things are at 6.6.
# * _CHROMA: mean color of 16 x 16 pixels, the block of a coder that halves the color planes; 7.8 at most in `streets`.
# * _LOCAL: a codec disturbs every block that has texture (at most 5.4 times the typical block, plus one level so that
#   rounding is no texture). A block that alone changed was edited: another digit on the same door is at 26 and more.
_THUMB = 4.0
_LUMA = 4.0
_RELATIVE = 0.05
_CLIPPED = 9.0
_CHROMA = 10.0
_LOCAL = 6.0
_TEXTURE = 4.0

_BLOCK = 8
_CHUNK_BYTES = 32 << 20
_STEPS = np.array([[16, 11, 10, 16], [12, 12, 14, 0], [14, 13, 0, 0], [14, 0, 0, 0]], np.float32) * np.float32(0.8)
"""Quantization steps of JPEG quality 60 (ITU-T T.81, table K.1, times 0.8) for the lowest ten coefficients."""


def assign_roles(
    *,
    train: Images,
    validation: Images,
    test: Images,
    auxiliary: Images,
    on_overlap: Literal["error", "drop"] = "error",
) -> Roles:
    """The four roles, once no picture is found in two of them.

    A picture counts as the same when it is equal, or re-encoded (JPEG of quality 60 or more, float or uint8, resized
    by another filter). "drop" takes it out of the role with the lower priority: test, validation, train, auxiliary.
    Call `drop_overlap` to learn how many went.

    Raises:
        DataError: an overlap (the first pair is named), an empty test or auxiliary role, or differing image shapes.
        ConfigError: `on_overlap` is neither "error" nor "drop".
    """
    if on_overlap not in ("error", "drop"):
        raise ConfigError(f'expected on_overlap "error" or "drop", got {on_overlap!r}')
    if on_overlap == "drop":
        return drop_overlap(train=train, validation=validation, test=test, auxiliary=auxiliary)[0]
    roles = {"test": test, "validation": validation, "train": train, "auxiliary": auxiliary}
    _check_shapes(roles)
    for number, lower in enumerate(_PRIORITY):
        for higher in _PRIORITY[:number]:
            for pairs in _same_pictures(roles[lower], roles[higher]):
                raise DataError(_overlap_message(lower, roles[lower], higher, roles[higher], pairs[0]))
    return Roles(train=train, validation=validation, test=test, auxiliary=auxiliary)


def drop_overlap(*, train: Images, validation: Images, test: Images, auxiliary: Images) -> tuple[Roles, dict[str, int]]:
    """The four roles without the pictures that a role of higher priority holds, and how many each role lost.

    Raises:
        DataError: an empty test or auxiliary role, also when all of it was dropped, or differing image shapes.
    """
    given = {"test": test, "validation": validation, "train": train, "auxiliary": auxiliary}
    _check_shapes(given)
    kept: dict[str, Images] = {}
    dropped: dict[str, int] = {}
    for lower in _PRIORITY:
        images = given[lower]
        keep = np.ones(len(images), bool)
        for higher in kept.values():
            for pairs in _same_pictures(images, higher):
                keep[pairs[:, 0]] = False
        kept[lower] = images if keep.all() else images.take(np.flatnonzero(keep))
        dropped[lower] = int(len(images) - keep.sum())
    if not len(kept["auxiliary"]):
        raise DataError(
            f"auxiliary: expected images that no other role holds, got {len(auxiliary)} of which all "
            "are in test, validation or train; take them from another set"
        )
    roles = Roles(train=kept["train"], validation=kept["validation"], test=kept["test"], auxiliary=kept["auxiliary"])
    return roles, dropped


def _check_shapes(roles: dict[str, Images]) -> None:
    for role in ("test", "auxiliary"):
        if not len(roles[role]):
            raise DataError(
                f"{role}: expected at least one image, got none ({roles[role].name}); name a source that has some"
            )
    wanted = roles["test"].image_shape
    for role, images in roles.items():
        if len(images) and images.image_shape != wanted:
            c, h, w = wanted
            mend = f"size=({h}, {w})" if images.image_shape[1:] != (h, w) else f"channels={c}"
            raise DataError(
                f"{role}: expected images of shape {wanted} as in test ({roles['test'].name}), "
                f"got {images.image_shape} ({images.name}); load them with {mend}"
            )


def _overlap_message(lower: str, ours: Images, higher: str, theirs: Images, pair: _Pairs) -> str:
    i, j = int(pair[0]), int(pair[1])
    is_equal = bool((ours.floats(slice(i, i + 1)) == theirs.floats(slice(j, j + 1))).all())
    how = "equal" if is_equal else "the same picture, re-encoded or resized"
    return (
        f"expected roles that share no picture, got {lower} image {i} ({ours.name}) and {higher} image {j} "
        f'({theirs.name}): {how}; take them from disjoint sources, or drop such images with on_overlap="drop"'
    )


def _same_pictures(ours: Images, theirs: Images) -> Iterator[_Pairs]:
    """Pairs (index in `ours`, index in `theirs`) of the same picture, in order of the first; one of each of `ours`."""
    if not len(ours) or not len(theirs):
        return
    left, right = _thumbnails(ours), _thumbnails(theirs)
    # Centered, so that squares stay small beside what float32 keeps of them.
    center = right.mean(0, keepdims=True)
    left -= center
    right -= center
    limit = np.float32(_THUMB**2 * left.shape[1])
    right_t = np.ascontiguousarray(np.concatenate([right, np.ones((len(right), 1), np.float32)], 1).T)
    right_t[:-1] *= -2
    squares = (right**2).sum(1)
    rows = max(1, _CHUNK_BYTES // (4 * len(right)))
    for start in range(0, len(left), rows):
        part = left[start : start + rows]
        own = ((part**2).sum(1) - limit)[:, None]
        # |a|² − 2ab − limit, from one matrix product, beside −|b|²: no second pass over the largest array.
        near = np.concatenate([part, own], 1) @ right_t < -squares
        candidates = np.argwhere(near)
        candidates[:, 0] += start
        found = _verify(ours, theirs, candidates)
        if len(found):
            yield found


def _verify(ours: Images, theirs: Images, candidates: _Pairs) -> _Pairs:
    c, h, w = ours.image_shape
    batch = max(1, _CHUNK_BYTES // (4 * c * h * w))
    found: list[_Pairs] = []
    for start in range(0, len(candidates), batch):
        pairs = candidates[start : start + batch]
        found.append(pairs[_is_reencoding(_levels(ours, pairs[:, 0]), _levels(theirs, pairs[:, 1]))])
    if not found:
        return candidates
    pairs = np.concatenate(found)
    return pairs[np.unique(pairs[:, 0], return_index=True)[1]]


def _is_reencoding(a: _Floats, b: _Floats) -> NDArray[np.bool_]:
    """Which of the k pairs of pictures, (k, c, h, w) in 0..255, are one picture up to a codec or a resize."""
    luma_a, color_a = _luma_chroma(a)
    luma_b, color_b = _luma_chroma(b)
    difference = luma_a - luma_b
    moved = np.abs(_low_coefficients(difference))
    slack = _RELATIVE * np.abs(_low_coefficients(luma_a))
    slack[..., 0, 0] = _CLIPPED
    allowed = _LUMA * (_STEPS / 2 + 2 + slack)
    is_same = (moved <= allowed)[..., _STEPS > 0].all((1, 2))
    for one, other in zip(color_a, color_b, strict=True):
        is_same &= (np.abs(_blocks(one - other, 2 * _BLOCK).mean((2, 3))) <= _CHROMA).all(1)
    change = np.sqrt((_blocks(difference, _BLOCK) ** 2).mean((2, 3)))
    has_texture = _blocks(luma_a, _BLOCK).std((2, 3)) >= _TEXTURE
    typical = np.zeros(len(a), np.float32)
    any_texture = has_texture.any(1)
    typical[any_texture] = np.nanmedian(np.where(has_texture, change, np.nan)[any_texture], axis=1)
    same: NDArray[np.bool_] = is_same & (change.max(1) <= _LOCAL * (typical + 1))
    return same


def _luma_chroma(pixels: _Floats) -> tuple[_Floats, tuple[_Floats, ...]]:
    if pixels.shape[1] == 1:
        return pixels[:, 0], ()
    red, green, blue = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    luma = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    return luma, (np.float32(0.564) * (blue - luma), np.float32(0.713) * (red - luma))


def _blocks(plane: _Floats, side: int) -> _Floats:
    """(k, h, w) as (k, blocks, side, side), from the top left as codecs do.

    Where a length is no multiple, the last blocks overlap: a block filled up would hold pixels that no codec wrote.
    """
    short = [max(0, side - length) for length in plane.shape[1:]]
    plane = np.pad(plane, ((0, 0), (0, short[0]), (0, short[1])), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(plane, (side, side), axis=(1, 2))
    tall, wide = (_starts(length, side) for length in plane.shape[1:])
    return windows[:, tall[:, None], wide].reshape(len(plane), len(tall) * len(wide), side, side)


def _starts(length: int, side: int) -> NDArray[np.int64]:
    starts = np.arange(0, length - side + 1, side)
    return starts if length % side == 0 else np.append(starts, length - side)


def _low_coefficients(plane: _Floats) -> _Floats:
    """The lowest 4 x 4 coefficients of the orthonormal cosine transform of each 8 x 8 block."""
    frequency, place = np.arange(len(_STEPS))[:, None], np.arange(_BLOCK)[None]
    cosines = np.sqrt(2 / _BLOCK) * np.cos((2 * place + 1) * frequency * np.pi / (2 * _BLOCK))
    cosines[0] /= np.sqrt(2)
    basis: _Floats = cosines.astype(np.float32)
    low: _Floats = np.matmul(basis @ _blocks(plane, _BLOCK), basis.T, dtype=np.float32)
    return low


def _thumbnails(images: Images) -> _Floats:
    """(n, d): a gray thumbnail and two small color ones, in levels; a codec's error all but cancels in their cells."""
    c, h, w = images.image_shape
    rows = max(1, _CHUNK_BYTES // (4 * c * h * w))
    parts: list[_Floats] = []
    for start in range(0, len(images), rows):
        luma, color = _luma_chroma(_levels(images, slice(start, start + rows)))
        planes = [_pool(luma, 8, 4), *(_pool(plane, 4, 8) for plane in color)]
        parts.append(np.concatenate([plane.reshape(len(luma), -1) for plane in planes], 1))
    return np.concatenate(parts)


def _pool(plane: _Floats, most: int, cell: int) -> _Floats:
    tall, wide = (_averaging(side, min(most, max(1, side // cell))) for side in plane.shape[1:])
    pooled: _Floats = np.matmul(tall @ plane, wide.T, dtype=np.float32)
    return pooled


def _averaging(side: int, cells: int) -> _Floats:
    matrix = np.zeros((cells, side), np.float32)
    for row, part in enumerate(np.array_split(np.arange(side), cells)):
        matrix[row, part] = 1 / len(part)
    return matrix


def _levels(images: Images, index: NDArray[np.int64] | slice) -> _Floats:
    chosen = images.pixels[index]
    return chosen.astype(np.float32) if chosen.dtype == np.uint8 else chosen * np.float32(255)
